//! Who came to the job's store without the job's secret, said to the one who can compare the secrets.

use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

/// Most addresses that are named: whoever scans ports shall not fill the terminal.
const NAMED: usize = 4;

/// Addresses from which a handshake has failed.
#[derive(Default)]
pub(super) struct FailedHandshakes(Mutex<Vec<IpAddr>>);

impl FailedHandshakes {
    /// Takes note of a greeting that failed, where the secret is why. Each address is reported once, to standard error
    /// and to `publish`.
    pub(super) fn heard(&self, from: IpAddr, encrypted: bool, error: &io::Error, publish: impl FnOnce(&str)) {
        if !matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::InvalidData) {
            return;
        }
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= NAMED || known.contains(&from) {
            return;
        }
        known.push(from);
        drop(known);
        let text = match encrypted {
            true => format!(
                "somebody at {from} tried to reach the job's store without the job's secret: if that is a rank of this \
                 job, REGATTA_SECRET differs there"
            ),
            false => format!(
                "somebody at {from} tried to reach the job's store and was not understood: if that is a rank of this job, \
                 it has a secret (REGATTA_SECRET) and the store has none"
            ),
        };
        publish(&text);
        crate::say::say(format_args!("warning: {text}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_address_is_reported_once() {
        let failed = FailedHandshakes::default();
        let mut said = vec![];
        let mut attempt = |last: u8, kind: ErrorKind| {
            failed.heard(IpAddr::from([10, 0, 0, last]), true, &kind.into(), |text| {
                said.push(text.to_string())
            });
        };
        for last in [1, 1, 2, 3, 4, 5, 6] {
            attempt(last, ErrorKind::PermissionDenied);
        }
        attempt(9, ErrorKind::TimedOut);
        assert_eq!(said.len(), NAMED);
        assert!(said[0].contains("10.0.0.1") && said[0].contains("REGATTA_SECRET"), "{said:?}");
    }
}
