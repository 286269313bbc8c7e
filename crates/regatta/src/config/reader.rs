//! Reads the sections of a configuration, and makes errors that name the key.

use super::sources::{Origin, Sources};
use crate::error::{Error, Result};
use crate::models::{self, ModelConfig};
use serde::de::DeserializeOwned;
use toml::{Table, Value};

/// Reads sections, and makes errors that name the key and its origin.
pub(super) struct Reader<'a> {
    pub(super) origin: &'a str,
    pub(super) sources: &'a Sources,
}

impl Reader<'_> {
    pub(super) fn error(&self, key: &str, problem: impl Into<String>) -> Error {
        let origin = match self.sources.of(key) {
            Some(Origin::Variable(name)) => name,
            _ => self.origin,
        };
        Error::Config { origin: origin.into(), key: key.into(), problem: problem.into() }
    }

    pub(super) fn section<T: DeserializeOwned>(&self, table: &Table, name: &str) -> Result<T> {
        match table.get(name) {
            None => self.read(Table::new(), name),
            Some(Value::Table(section)) => self.read(section.clone(), name),
            Some(_) => Err(self.error(name, format!("must be a section, as in [{name}]"))),
        }
    }

    /// The section `[model]`, whose keys depend on its kind.
    pub(super) fn model(&self, table: &Table) -> Result<ModelConfig> {
        let kinds = models::kinds();
        let known = || kinds.join(", ");
        let Some(Value::Table(section)) = table.get("model") else {
            return Err(
                self.error("model", format!("missing: a section [model] with kind = one of {}", known()))
            );
        };
        let mut section = section.clone();
        let kind = section.remove("kind");
        let kind = kind.ok_or_else(|| self.error("model.kind", format!("missing: one of {}", known())))?;
        let name = kind.as_str().map_or_else(|| kind.to_string(), str::to_string);
        let entry = kind.as_str().and_then(models::find);
        let entry = entry.ok_or_else(|| self.error("model.kind", unknown("kind", &name, &kinds)))?;
        self.read_by(section, "model", entry.parse)
    }

    fn read<T: DeserializeOwned>(&self, section: Table, name: &str) -> Result<T> {
        self.read_by(section, name, Table::try_into)
    }

    fn read_by<T>(
        &self,
        mut section: Table,
        name: &str,
        parse: impl Fn(Table) -> Result<T, toml::de::Error>,
    ) -> Result<T> {
        // Each key alone first, so that the error of a wrong value names its key.
        for (key, value) in &mut section {
            let path = format!("{name}.{key}");
            let one = |value: &Value| Table::from_iter([(key.clone(), value.clone())]);
            let Err(error) = parse(one(value)) else { continue };
            if error.message().starts_with("missing field") {
                // The model has keys without defaults: the whole section is parsed below.
                continue;
            }
            // A flag's value is text if the key takes text, whatever it looks like: a folder may be called 1984.
            let text = self.sources.text(&path).map(|text| Value::String(text.into()));
            match text.filter(|text| parse(one(text)).is_ok()) {
                Some(text) => *value = text,
                None => return Err(self.error(&path, explain(&error.to_string(), key))),
            }
        }
        parse(section).map_err(|error| self.error(name, error.to_string()))
    }

    pub(super) fn at_least_one(&self, section: &str, counts: &[(&str, usize)]) -> Result<()> {
        match counts.iter().find(|(_, count)| *count == 0) {
            Some((key, _)) => Err(self.error(&format!("{section}.{key}"), "must be at least 1")),
            None => Ok(()),
        }
    }

    /// Checks each count against its upper bound.
    pub(super) fn at_most(&self, section: &str, counts: &[(&str, usize, usize)]) -> Result<()> {
        match counts.iter().find(|(_, count, most)| count > most) {
            Some((key, count, most)) => {
                Err(self.error(&format!("{section}.{key}"), format!("{count} is too large: at most {most}")))
            }
            None => Ok(()),
        }
    }

    pub(super) fn within(&self, key: &str, value: f64, low: f64, high: f64, closed: bool) -> Result<()> {
        let below = if closed { value <= high } else { value < high };
        if value >= low && below {
            return Ok(());
        }
        let (upto, high) = if closed { ("to", high) } else { ("to below", high) };
        Err(self.error(key, format!("{value} is out of range: {low} {upto} {high}")))
    }

    pub(super) fn one_of(&self, key: &str, value: Option<&str>, allowed: &[&str]) -> Result<()> {
        match value {
            Some(value) if !allowed.contains(&value) => {
                Err(self.error(key, unknown("value", value, allowed)))
            }
            _ => Ok(()),
        }
    }
}

/// Turns serde's message about one key into a sentence, with the nearest known key.
fn explain(message: &str, key: &str) -> String {
    let first = message.lines().next().unwrap_or(message);
    // The names of Rust's types say nothing to a user.
    let first = ["usize", "u64", "u32", "u8"].iter().fold(first.to_string(), |text, name| {
        text.replace(&format!("expected {name}"), "expected a whole number from 0 up")
    });
    let first = first.as_str();
    if !first.contains("unknown field") {
        let text = ["expected path string", "expected a string", "expected string"];
        let value = first.split('`').nth(1).filter(|_| text.iter().any(|text| first.contains(text)));
        return match value {
            Some(value) => format!("{first}: write text in quotes, as in {key} = \"{value}\""),
            None => first.to_string(),
        };
    }
    let known: Vec<&str> = first.split('`').skip(3).step_by(2).collect();
    unknown("key", key, &known)
}

pub(super) fn unknown(what: &str, given: &str, known: &[&str]) -> String {
    let nearest = known.iter().min_by_key(|candidate| edits(given, candidate));
    match nearest.filter(|candidate| edits(given, candidate) <= 1 + given.len() / 3) {
        Some(nearest) => format!("unknown {what} `{given}`; did you mean `{nearest}`?"),
        None => format!("unknown {what} `{given}`; known are {}", known.join(", ")),
    }
}

/// Edits (insert, delete, replace) between two words (Levenshtein 1966).
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, &y) in b.iter().enumerate() {
            let replace = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
