//! What only the ranks of a job know.

use crate::error::{Error, Result};
use crate::tls::Identity;
use ring::rand::{SecureRandom, SystemRandom};
use std::fmt;
use std::net::IpAddr;

/// Fewest bytes of a secret. What can be guessed is none: whoever reaches a rank's port can try.
const SHORTEST: usize = 16;

/// What the ranks of a job know and nobody else. Connections under it are encrypted, and a process without it cannot
/// join, read or stall the job. It has to be random: a guess can be tested against any rank's port.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// Any text; the same on all ranks.
    pub fn from_text(text: &str) -> Self {
        Self(text.as_bytes().to_vec())
    }

    /// A new secret, from the system's random numbers.
    ///
    /// # Errors
    /// A system without any.
    pub fn random() -> Result<Self> {
        let mut bytes = [0; 16];
        SystemRandom::new().fill(&mut bytes).map_err(Error::system("get random numbers"))?;
        Ok(Self::from_text(&bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()))
    }

    /// Whether it is long enough; else what is wrong.
    pub(crate) fn check(&self) -> Result<(), String> {
        match self.0.len() {
            len if len < SHORTEST => Err(format!(
                "the secret has {len} characters, and needs {SHORTEST} random ones or more, so that nobody guesses it: make \
                 one by `openssl rand -hex 16`"
            )),
            _ => Ok(()),
        }
    }

    /// The text that makes it, for the environment of other ranks.
    pub fn to_text(&self) -> String {
        String::from_utf8_lossy(&self.0).into_owned()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// When TCP connections between ranks are encrypted and authenticated (TLS 1.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tls {
    /// Everywhere but on loopback; without a secret, only loopback is allowed.
    #[default]
    Auto,
    /// Everywhere.
    On,
    /// Nowhere: for networks that nobody else is on.
    Off,
}

/// How the connections of a job are protected.
#[derive(Debug, Clone, Default)]
pub struct Security {
    /// What the ranks know.
    pub secret: Option<Secret>,
    /// When connections are encrypted.
    pub tls: Tls,
}

impl Security {
    /// For connections to the job's store at `ip`: encrypted wherever there is a secret, as they carry the keys to
    /// all others.
    ///
    /// # Errors
    /// No secret where one is needed.
    pub(crate) fn for_store(&self, ip: IpAddr) -> Result<Option<Identity>> {
        self.identity(ip, true)
    }

    /// For connections that carry data to or from `ip`. On loopback they are not encrypted.
    ///
    /// # Errors
    /// No secret where one is needed.
    pub(crate) fn for_data(&self, ip: IpAddr) -> Result<Option<Identity>> {
        self.identity(ip, self.tls == Tls::On)
    }

    fn identity(&self, ip: IpAddr, on_loopback: bool) -> Result<Option<Identity>> {
        match (&self.secret, self.tls) {
            (_, Tls::Off) => Ok(None),
            (Some(_), Tls::Auto) if ip.is_loopback() && !on_loopback => Ok(None),
            (Some(secret), _) => Ok(Some(Identity::new(&secret.0))),
            (None, Tls::Auto) if ip.is_loopback() => Ok(None),
            (None, _) => Err(Error::Env {
                variable: "REGATTA_SECRET".into(),
                problem: format!(
                    "is not set, but the job's ranks talk over the network (at {ip}): set it to the same random text \
                     on all ranks, as in `export REGATTA_SECRET=$(openssl rand -hex 16)`, or set REGATTA_TLS=off where \
                     nobody else is on the network"
                ),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    #[test]
    fn only_loopback_does_without_a_secret() {
        let (here, there) = (IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)));
        let none = Security::default();
        assert!(none.for_store(here).unwrap().is_none() && none.for_data(here).unwrap().is_none());
        assert!(none.for_store(IpAddr::V6(Ipv6Addr::LOCALHOST)).unwrap().is_none());
        let error = none.for_store(there).err().unwrap().to_string();
        assert!(error.contains("REGATTA_SECRET") && error.contains("10.0.0.1"), "{error}");
        let off = Security { secret: None, tls: Tls::Off };
        assert!(off.for_store(there).unwrap().is_none() && off.for_data(there).unwrap().is_none());
        let (one, two) = (Secret::random().unwrap(), Secret::random().unwrap());
        assert!(one != two && !format!("{one:?}").contains(&one.to_text()));
        assert_eq!(Secret::from_text(&one.to_text()), one);
        let some = Security { secret: Some(one), tls: Tls::Auto };
        assert!(some.for_store(here).unwrap().is_some() && some.for_data(here).unwrap().is_none());
        assert!(some.for_data(there).unwrap().is_some());
        assert!(Security { tls: Tls::On, ..some }.for_data(here).unwrap().is_some());
    }
}
