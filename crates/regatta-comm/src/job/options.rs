//! What a job may choose about its communication.

use crate::algorithm::Algorithm;
use crate::algorithm::select::Table;
use crate::error::{Error, Result};
use crate::member::late::OnLate;
use crate::member::trace_folder;
use crate::rendezvous::{Secret, Tls};
use crate::transport::TransportKind;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

/// Connections of a pair of ranks, and threads of a rank.
const COUNTS: RangeInclusive<usize> = 1..=64;

/// Choices for a group; the defaults suit most. Each field has a method of its name, which changes it.
///
/// ```
/// # use regatta_comm::{Options, TransportKind};
/// # use std::time::Duration;
/// let options = Options::default().transport(TransportKind::Tcp).deadline(Duration::from_secs(5));
/// assert_eq!(options.transport, Some(TransportKind::Tcp));
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Options {
    /// The transport; none: the fastest that every pair of ranks shares.
    pub transport: Option<TransportKind>,
    /// The algorithm for all operations that it offers; none: what the tuning table says.
    pub algorithm: Option<Algorithm>,
    /// The tuning table; none: rank 0's, which comes from `REGATTA_TUNING` or ships.
    pub tuning: Option<Table>,
    /// A wait without progress for this long is an error.
    pub deadline: Duration,
    /// A wait without progress for this long is reported.
    pub warn: Duration,
    /// What is done with the report; by default it is written to standard error.
    pub on_late: OnLate,
    /// How long ranks may take to find each other at the start.
    pub join: Duration,
    /// TCP connections between each pair of ranks, 1 to 64; more than one helps where a network limits each connection.
    pub tcp_streams: usize,
    /// Threads of a rank that share the work of a large operation over shared memory, 1 to 64.
    pub lanes: usize,
    /// What the ranks of the job know and nobody else; none: the launcher's (`REGATTA_SECRET`).
    pub secret: Option<Secret>,
    /// When connections are encrypted.
    pub tls: Tls,
    /// The folder that the last operations are written to when something fails; none: they are not.
    pub trace: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            transport: None,
            algorithm: None,
            tuning: None,
            deadline: Duration::from_secs(30),
            warn: Duration::from_secs(10),
            on_late: OnLate::default(),
            join: Duration::from_secs(60),
            tcp_streams: 1,
            lanes: 1,
            secret: None,
            tls: Tls::Auto,
            trace: None,
        }
    }
}

macro_rules! setters {
    ($($name:ident: $type:ty),* $(,)?) => {
        impl Options {
            $(
                #[doc = concat!("Changes [`", stringify!($name), "`](Self#structfield.", stringify!($name), ").")]
                #[must_use]
                pub fn $name(self, $name: $type) -> Self {
                    Self { $name: $name.into(), ..self }
                }
            )*
        }
    };
}

setters! {
    transport: impl Into<Option<TransportKind>>,
    algorithm: impl Into<Option<Algorithm>>,
    tuning: impl Into<Option<Table>>,
    deadline: Duration,
    warn: Duration,
    on_late: OnLate,
    join: Duration,
    tcp_streams: usize,
    lanes: usize,
    secret: impl Into<Option<Secret>>,
    tls: Tls,
    trace: impl Into<Option<PathBuf>>,
}

impl Options {
    /// The defaults, changed by the environment: `REGATTA_TRANSPORT`, `REGATTA_ALGORITHM`, `REGATTA_TUNING` (a file),
    /// `REGATTA_DEADLINE_S`, `REGATTA_WARN_S` (a third of the deadline), `REGATTA_JOIN_S`, `REGATTA_TCP_STREAMS`,
    /// `REGATTA_SHM_LANES`, `REGATTA_SECRET` or `REGATTA_SECRET_FILE`, `REGATTA_TLS` (`auto`, `on` or `off`) and
    /// `REGATTA_TRACE` (a folder, or `off`; a private folder among the temporary files).
    ///
    /// # Errors
    /// A variable with a value that is none of its.
    pub fn from_env() -> Result<Self> {
        // What is not UTF-8 is refused where it is read as a number or a word.
        let read = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        Self::from(&|name| read(name).filter(|value| !value.is_empty()))
    }

    /// Refuses times that no wait could keep, and a secret that anybody could guess.
    ///
    /// # Errors
    /// Which of them, and what is allowed.
    pub(crate) fn check(&self) -> Result<()> {
        if self.deadline.is_zero() {
            return Err(Error::Usage("a deadline of 0 s ends every wait before it begins".into()));
        }
        self.check_counts()?;
        self.secret.as_ref().map_or(Ok(()), Secret::check).map_err(Error::Usage)
    }

    fn check_counts(&self) -> Result<()> {
        let counts = [
            ("tcp_streams", "REGATTA_TCP_STREAMS", self.tcp_streams),
            ("lanes", "REGATTA_SHM_LANES", self.lanes),
        ];
        match counts.into_iter().find(|(.., count)| !COUNTS.contains(count)) {
            None => Ok(()),
            Some((option, variable, count)) => Err(Error::Usage(format!(
                "the option {option} ({variable}) is {count}: give a number from {} to {}",
                COUNTS.start(),
                COUNTS.end()
            ))),
        }
    }

    pub(crate) fn from(get: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let bad = |variable: &str, problem: String| Error::Env { variable: variable.into(), problem };
        let seconds = |name: &str, default: Duration| match get(name) {
            None => Ok(default),
            Some(text) => match text.parse::<f64>() {
                Ok(seconds) if (0.1..=1e6).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
                _ => Err(bad(name, format!("{text:?} is no number of seconds from 0.1 to 1000000"))),
            },
        };
        let count = |name: &str| match get(name) {
            None => Ok(1),
            Some(text) => match text.parse::<usize>() {
                Ok(count) if COUNTS.contains(&count) => Ok(count),
                _ => Err(bad(name, format!("{text:?} is no number from 1 to 64"))),
            },
        };
        let parsed = |name: &str, error: Error| bad(name, error.to_string());
        let defaults = Self::default();
        let transport = get("REGATTA_TRANSPORT").map(|text| text.parse()).transpose();
        let algorithm = get("REGATTA_ALGORITHM").map(|text| text.parse()).transpose();
        let tuning = get("REGATTA_TUNING").map(|path| {
            let text = std::fs::read_to_string(&path).map_err(Error::system(format!("read {path}")))?;
            Table::parse(&text)
        });
        let long = |name: &str, text: &str| {
            let secret = Secret::from_text(text);
            secret.check().map_err(|problem| bad(name, problem)).map(|()| secret)
        };
        let secret = match (get("REGATTA_SECRET"), get("REGATTA_SECRET_FILE")) {
            (Some(text), _) => Some(long("REGATTA_SECRET", &text)?),
            (None, Some(path)) => {
                let text = std::fs::read_to_string(&path);
                let text = text.map_err(|error| bad("REGATTA_SECRET_FILE", format!("{path}: {error}")))?;
                Some(long("REGATTA_SECRET_FILE", text.trim())?)
            }
            (None, None) => None,
        };
        let deadline = seconds("REGATTA_DEADLINE_S", defaults.deadline)?;
        let trace = get("REGATTA_TRACE");
        Ok(Self {
            transport: transport.map_err(|error| parsed("REGATTA_TRANSPORT", error))?,
            algorithm: algorithm.map_err(|error| parsed("REGATTA_ALGORITHM", error))?,
            tuning: tuning.transpose().map_err(|error| parsed("REGATTA_TUNING", error))?,
            deadline,
            warn: seconds("REGATTA_WARN_S", deadline / 3)?,
            join: seconds("REGATTA_JOIN_S", defaults.join)?,
            tcp_streams: count("REGATTA_TCP_STREAMS")?,
            lanes: count("REGATTA_SHM_LANES")?,
            secret,
            tls: match get("REGATTA_TLS").as_deref() {
                None | Some("auto") => Tls::Auto,
                Some("on") => Tls::On,
                Some("off") => Tls::Off,
                Some(other) => return Err(bad("REGATTA_TLS", format!("{other:?} is not auto, on or off"))),
            },
            trace: match trace.as_deref() {
                None => Some(trace_folder::default()),
                Some("off") => None,
                Some(folder) => Some(folder.into()),
            },
            ..defaults
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(vars: &[(&str, &str)]) -> Result<Options> {
        Options::from(&|name| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn variables_are_read_and_bad_ones_named() {
        let read = options(&[
            ("REGATTA_TRANSPORT", "tcp"),
            ("REGATTA_ALGORITHM", "tree"),
            ("REGATTA_DEADLINE_S", "6"),
            ("REGATTA_TCP_STREAMS", "4"),
            ("REGATTA_TLS", "on"),
            ("REGATTA_TRACE", "off"),
        ]);
        let read = read.unwrap();
        assert_eq!((read.transport, read.algorithm), (Some(TransportKind::Tcp), Some(Algorithm::Tree)));
        assert_eq!((read.deadline.as_secs(), read.warn.as_secs(), read.tcp_streams), (6, 2, 4));
        assert_eq!((read.tls, read.trace), (Tls::On, None));
        for (name, value) in [
            ("REGATTA_TRANSPORT", "pigeon"),
            ("REGATTA_ALGORITHM", "magic"),
            ("REGATTA_TUNING", "/nowhere/at/all"),
            ("REGATTA_DEADLINE_S", "soon"),
            ("REGATTA_SHM_LANES", "0"),
            ("REGATTA_TLS", "maybe"),
            ("REGATTA_SECRET_FILE", "/nowhere/at/all"),
        ] {
            let error = options(&[(name, value)]).unwrap_err().to_string();
            assert!(error.contains(name) && (error.contains(value) || name == "REGATTA_TUNING"), "{error}");
        }
    }
}
