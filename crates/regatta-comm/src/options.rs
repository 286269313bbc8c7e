//! What a job may choose about its communication.

use crate::algorithm::Algorithm;
use crate::error::{Error, Result};
use crate::transport::TransportKind;
use std::time::Duration;

/// Choices for a group; the defaults suit most.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The transport; none: the fastest that every pair of ranks shares.
    pub transport: Option<TransportKind>,
    /// The algorithm; none: what suits the transport.
    pub algorithm: Option<Algorithm>,
    /// A wait without progress for this long is an error.
    pub deadline: Duration,
    /// How long ranks may take to find each other at the start.
    pub join: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            transport: None,
            algorithm: None,
            deadline: Duration::from_secs(30),
            join: Duration::from_secs(60),
        }
    }
}

impl Options {
    /// The defaults, changed by `REGATTA_TRANSPORT`, `REGATTA_ALGORITHM`, `REGATTA_DEADLINE_S` and
    /// `REGATTA_JOIN_S`.
    ///
    /// # Errors
    /// A variable with a value that is none of its.
    pub fn from_env() -> Result<Self> {
        let get = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let bad = |variable: &str, problem: String| Error::Env { variable: variable.into(), problem };
        let seconds = |name: &str, default: Duration| match get(name) {
            None => Ok(default),
            Some(text) => match text.parse::<f64>() {
                Ok(seconds) if (0.1..=1e6).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
                _ => Err(bad(name, format!("{text:?} is no number of seconds from 0.1 to 1000000"))),
            },
        };
        let defaults = Self::default();
        let transport = get("REGATTA_TRANSPORT").map(|text| text.parse());
        let algorithm = get("REGATTA_ALGORITHM").map(|text| text.parse());
        Ok(Self {
            transport: transport
                .transpose()
                .map_err(|error: Error| bad("REGATTA_TRANSPORT", error.to_string()))?,
            algorithm: algorithm
                .transpose()
                .map_err(|error: Error| bad("REGATTA_ALGORITHM", error.to_string()))?,
            deadline: seconds("REGATTA_DEADLINE_S", defaults.deadline)?,
            join: seconds("REGATTA_JOIN_S", defaults.join)?,
        })
    }
}
