//! Records who set the values of a configuration. Flags override environment variables, which override the file, which
//! overrides the defaults.

use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::fmt;
use toml::{Table, Value};

/// The settings that an environment variable can set, each with the variable.
pub const VARIABLES: [(&str, &str); 4] = [
    ("parallel.deadline_s", "REGATTA_DEADLINE_S"),
    ("parallel.transport", "REGATTA_TRANSPORT"),
    ("parallel.algorithm", "REGATTA_ALGORITHM"),
    ("parallel.threads", "REGATTA_THREADS"),
];

/// Who set a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The configuration file of this name.
    File(String),
    /// The environment variable of this name.
    Variable(String),
    /// The command-line flag of this name.
    Flag(String),
    /// The program itself.
    Program,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(name) | Self::Variable(name) | Self::Flag(name) => f.write_str(name),
            Self::Program => f.write_str("the program"),
        }
    }
}

/// A change of one key, which overrides the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Override {
    /// `key.path=value`, with a TOML value or a bare string.
    pub set: String,
    /// Who made it.
    pub origin: Origin,
}

impl Override {
    /// The change that a flag of this name makes.
    pub fn flag(name: &str, set: impl Into<String>) -> Self {
        Self { set: set.into(), origin: Origin::Flag(name.into()) }
    }

    /// A change that the program itself makes.
    pub fn program(set: impl Into<String>) -> Self {
        Self { set: set.into(), origin: Origin::Program }
    }

    /// The changes by the variables in [`VARIABLES`]; `get` returns the value of a variable. Apply them before those
    /// of flags, which override them.
    pub fn environment(get: impl Fn(&str) -> Option<String>) -> Vec<Self> {
        let change = |(key, variable): (&str, &str)| {
            let value = get(variable).filter(|value| !value.is_empty())?;
            Some(Self { set: format!("{key}={value}"), origin: Origin::Variable(variable.into()) })
        };
        VARIABLES.into_iter().filter_map(change).collect()
    }
}

/// Who set each key that was set.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sources {
    origins: BTreeMap<String, Origin>,
    /// Values as they were written, for keys that override the file.
    texts: BTreeMap<String, String>,
}

impl Sources {
    /// The keys of the file `name`.
    pub(super) fn of_file(table: &Table, name: &str) -> Self {
        let mut sources = Self::default();
        for (section, keys) in table {
            for key in keys.as_table().into_iter().flat_map(Table::keys) {
                sources.origins.insert(format!("{section}.{key}"), Origin::File(name.into()));
            }
        }
        sources
    }

    /// Who set `key`; none if it has its default.
    pub fn of(&self, key: &str) -> Option<&Origin> {
        self.origins.get(key)
    }

    /// The value of `key` as it was written in a flag or a variable.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.texts.get(key).map(String::as_str)
    }

    /// Applies `change` to `table` and records its origin.
    pub(super) fn apply(&mut self, table: &mut Table, change: &Override) -> Result<()> {
        let origin = || match &change.origin {
            Origin::Variable(name) => name.clone(),
            _ => "--set".into(),
        };
        let bad = |problem: String| Error::Config { origin: origin(), key: change.set.clone(), problem };
        let (key, text) = change.set.split_once('=').ok_or_else(|| bad("must be key.path=value".into()))?;
        let value = match format!("v = {text}").parse::<Table>() {
            Ok(mut parsed) if parsed.len() == 1 => parsed.remove("v").unwrap_or(Value::String(text.into())),
            _ => Value::String(text.into()),
        };
        let key = key.trim();
        let parts: Vec<&str> = key.split('.').collect();
        let Some((last, sections)) = parts.split_last().filter(|_| parts.iter().all(|part| !part.is_empty()))
        else {
            return Err(bad("the key is empty".into()));
        };
        let mut at = table;
        for (depth, part) in sections.iter().enumerate() {
            let next = at.entry(part.to_string()).or_insert_with(|| Value::Table(Table::new()));
            at = next.as_table_mut().ok_or_else(|| {
                let before = parts[..=depth].join(".");
                bad(format!("`{before}` is a value, not a section, so `{key}` cannot be set"))
            })?;
        }
        at.insert(last.to_string(), value);
        // Dimensions of the layout are recorded under the key `parallel.layout`.
        let named = parts.iter().take(2).copied().collect::<Vec<_>>().join(".");
        self.origins.insert(named, change.origin.clone());
        self.texts.insert(key.into(), text.into());
        Ok(())
    }
}
