//! The key of a job, and what it makes of a handshake.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{CryptoProvider, ring as provider, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig,
    SignatureScheme,
};

/// What a rank shows and accepts in a handshake, derived from the job's secret.
#[derive(Clone)]
pub(crate) struct Identity {
    pub(super) client: Arc<ClientConfig>,
    pub(super) server: Arc<ServerConfig>,
}

impl Identity {
    /// The identity of every rank of the job whose secret this is.
    pub(crate) fn new(secret: &[u8]) -> Identity {
        let key = job_key(secret);
        Identity::showing(&key, &key)
    }

    /// Shows one key and accepts the other.
    pub(super) fn showing(own: &Arc<CertifiedKey>, accepted: &Arc<CertifiedKey>) -> Identity {
        // AES runs on instructions of its own on every machine that trains: fastest first.
        let crypto = Arc::new(CryptoProvider {
            cipher_suites: vec![
                provider::cipher_suite::TLS13_AES_128_GCM_SHA256,
                provider::cipher_suite::TLS13_AES_256_GCM_SHA384,
                provider::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            ],
            kx_groups: vec![provider::kx_group::X25519],
            ..provider::default_provider()
        });
        let verifier = Arc::new(OnlyKey { spki: accepted.cert[0].clone(), crypto: Arc::clone(&crypto) });
        let versions = &[&rustls::version::TLS13];

        let mut client = ClientConfig::builder_with_provider(Arc::clone(&crypto))
            .with_protocol_versions(versions)
            .expect("the suites above are those of TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&verifier) as Arc<dyn ServerCertVerifier>)
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(Arc::clone(own))));
        client.resumption = Resumption::disabled();
        client.enable_sni = false;

        let mut server = ServerConfig::builder_with_provider(crypto)
            .with_protocol_versions(versions)
            .expect("the suites above are those of TLS 1.3")
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(Arc::clone(own))));
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;

        Identity { client: Arc::new(client), server: Arc::new(server) }
    }
}

/// The Ed25519 key that HKDF-SHA256 makes of the secret.
pub(super) fn job_key(secret: &[u8]) -> Arc<CertifiedKey> {
    // PKCS #8 version 1 around an Ed25519 seed (RFC 8410, section 7).
    const PKCS8: [u8; 16] =
        [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
    let mut der = [0; PKCS8.len() + 32];
    der[..PKCS8.len()].copy_from_slice(&PKCS8);
    ring::hkdf::Salt::new(ring::hkdf::HKDF_SHA256, &[])
        .extract(secret)
        .expand(&[b"regatta job identity 1"], ring::hkdf::HKDF_SHA256)
        .and_then(|seed| seed.fill(&mut der[PKCS8.len()..]))
        .expect("32 bytes are one block of HKDF-SHA256");
    let key = provider::default_provider()
        .key_provider
        .load_private_key(PrivatePkcs8KeyDer::from(der.to_vec()).into())
        .expect("every 32 bytes are an Ed25519 seed");
    let spki = key.public_key().expect("an Ed25519 key has a public half");
    let raw = CertificateDer::from(spki.as_ref().to_vec());
    Arc::new(CertifiedKey::new(vec![raw], key))
}

/// Accepts one raw public key, from clients and servers alike.
#[derive(Debug)]
struct OnlyKey {
    spki: CertificateDer<'static>,
    crypto: Arc<CryptoProvider>,
}

impl OnlyKey {
    fn check(&self, shown: &CertificateDer<'_>) -> Result<(), Error> {
        let refused = Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
        (shown == &self.spki).then_some(()).ok_or(refused)
    }

    fn check_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let key = SubjectPublicKeyInfoDer::from(key.as_ref());
        let schemes = &self.crypto.signature_verification_algorithms;
        verify_tls13_signature_with_raw_key(message, &key, signed, schemes)
    }
}

/// The two verifier traits of rustls ask the same questions of a signature.
macro_rules! signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _key: &CertificateDer<'_>,
            _signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(Error::General("TLS 1.2 is not spoken here".into()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            key: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            self.check_signature(message, key, signed)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }

        fn requires_raw_public_keys(&self) -> bool {
            true
        }
    };
}

impl ServerCertVerifier for OnlyKey {
    fn verify_server_cert(
        &self,
        key: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(key).map(|()| ServerCertVerified::assertion())
    }

    signatures!();
}

impl ClientCertVerifier for OnlyKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        key: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(key).map(|()| ClientCertVerified::assertion())
    }

    signatures!();
}
