//! Where the values of a configuration come from: flags over environment variables over the file over defaults.

use super::config::Config;
use super::effects;
use crate::error::{Error, Result};
use regatta_plan::Plan;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use toml::{Table, Value};

/// The settings that an environment variable has too, and the variable.
pub const VARIABLES: [(&str, &str); 4] = [
    ("parallel.deadline_s", "REGATTA_DEADLINE_S"),
    ("parallel.transport", "REGATTA_TRANSPORT"),
    ("parallel.algorithm", "REGATTA_ALGORITHM"),
    ("parallel.threads", "REGATTA_THREADS"),
];

/// Who gave a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The configuration's file.
    File(String),
    /// An environment variable.
    Variable(String),
    /// A flag of the command line.
    Flag(String),
    /// The program itself, for a purpose of its own.
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

/// A change of one key, over the file.
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

    /// A change that the program makes for a purpose of its own.
    pub fn program(set: impl Into<String>) -> Self {
        Self { set: set.into(), origin: Origin::Program }
    }

    /// The changes that environment variables make; `get` reads one. They come before those of flags, which win.
    pub fn environment(get: impl Fn(&str) -> Option<String>) -> Vec<Self> {
        let change = |(key, variable): (&str, &str)| {
            let value = get(variable).filter(|value| !value.is_empty())?;
            Some(Self { set: format!("{key}={value}"), origin: Origin::Variable(variable.into()) })
        };
        VARIABLES.into_iter().filter_map(change).collect()
    }
}

/// Who gave each key that somebody gave.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sources {
    origins: BTreeMap<String, Origin>,
    /// Values as they were written, for keys that were changed over the file.
    texts: BTreeMap<String, String>,
}

impl Sources {
    /// Those of a file of this name.
    pub(super) fn of_file(table: &Table, name: &str) -> Self {
        let mut sources = Self::default();
        for (section, keys) in table {
            for key in keys.as_table().into_iter().flat_map(Table::keys) {
                sources.origins.insert(format!("{section}.{key}"), Origin::File(name.into()));
            }
        }
        sources
    }

    /// Who gave `key`; none where it has its default.
    pub fn of(&self, key: &str) -> Option<&Origin> {
        self.origins.get(key)
    }

    /// The value of `key` as a flag or a variable has it.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.texts.get(key).map(String::as_str)
    }

    /// Changes `table` by `change`.
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
        // A dimension of the layout is no key of its own.
        let named = parts.iter().take(2).copied().collect::<Vec<_>>().join(".");
        self.origins.insert(named, change.origin.clone());
        self.texts.insert(key.into(), text.into());
        Ok(())
    }
}

/// A configuration, and who gave its values.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Who gave its values.
    pub sources: Sources,
}

impl Loaded {
    /// Reads `path` and applies `changes` in their order, so that the last one of a key wins.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn read(path: &Path, changes: &[Override]) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read the configuration", path))?;
        Self::parse(&text, &path.display().to_string(), changes)
    }

    /// Parses TOML text; `origin` names it in errors.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, origin: &str, changes: &[Override]) -> Result<Self> {
        let (config, sources) = Config::read(text, origin, changes)?;
        effects::check(&config, &sources, origin)?;
        Ok(Self { config, sources })
    }

    /// The settings that an environment variable has too, where they are not the default: with their value and who gave it.
    pub fn settings(&self) -> Vec<String> {
        let values = effects::values(&self.config);
        let defaults = effects::defaults();
        let told = |(key, _): (&str, &str)| {
            let (value, origin) = (values.get(key)?, self.sources.of(key)?);
            (defaults.get(key) != Some(value)).then(|| format!("{key} = {value} ({origin})"))
        };
        VARIABLES.into_iter().filter_map(told).collect()
    }

    /// Keys that somebody gave, but that have no effect under `plan`. One configuration may serve many plans, so this is
    /// no error.
    pub fn warnings(&self, plan: &Plan) -> Vec<String> {
        effects::under(&self.config, plan)
            .into_iter()
            .filter(|idle| effects::given(&self.config, &self.sources, &idle.key).is_some())
            .map(|idle| format!("{} has no effect: {}", idle.key, idle.why))
            .collect()
    }
}
