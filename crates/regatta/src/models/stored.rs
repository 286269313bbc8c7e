//! Serialisation of a model's configuration for manifests, summaries and TOML files: its keys, including `kind`.

use super::config::ModelConfig;
use super::registry;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _, ser::Error as _};
use toml::{Table, Value};

impl Serialize for ModelConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.table().map_err(S::Error::custom)?.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ModelConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut table = Table::deserialize(deserializer)?;
        let Some(Value::String(kind)) = table.remove("kind") else {
            return Err(D::Error::missing_field("kind"));
        };
        let entry = registry::find(&kind).ok_or_else(|| {
            let known = registry::kinds().join(", ");
            D::Error::custom(format!("unknown model.kind `{kind}`; this program knows {known}: use the program that has this model, or call \
                 models::register in yours"))
        })?;
        (entry.parse)(table).map_err(|error| D::Error::custom(error.to_string().trim_end()))
    }
}
