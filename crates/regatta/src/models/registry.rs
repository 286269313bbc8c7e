//! The registry of models: one line for each built-in model.

use super::config::ModelConfig;
use super::spec::ModelSpec;
use super::{CnnConfig, EncoderDecoderConfig, GptConfig, MlpConfig, ResnetConfig};
use std::sync::{LazyLock, PoisonError, RwLock};
use toml::Table;

/// A kind of model.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    /// The value of `model.kind`.
    pub(crate) kind: &'static str,
    /// Reads the keys of `[model]` without `kind`.
    pub(crate) parse: fn(Table) -> Result<ModelConfig, toml::de::Error>,
}

const fn entry<S: ModelSpec>() -> Entry {
    Entry { kind: S::KIND, parse: |table| table.try_into::<S>().map(ModelConfig::new) }
}

static REGISTRY: LazyLock<RwLock<Vec<Entry>>> = LazyLock::new(|| {
    RwLock::new(vec![
        entry::<GptConfig>(),
        entry::<EncoderDecoderConfig>(),
        entry::<MlpConfig>(),
        entry::<CnnConfig>(),
        entry::<ResnetConfig>(),
    ])
});

/// Registers a model, so that configurations and checkpoints can use it. It replaces a model of the same kind.
pub fn register<S: ModelSpec>() {
    let mut registry = REGISTRY.write().unwrap_or_else(PoisonError::into_inner);
    registry.retain(|known| known.kind != S::KIND);
    registry.push(entry::<S>());
}

/// The kinds of all registered models.
pub fn kinds() -> Vec<&'static str> {
    REGISTRY.read().unwrap_or_else(PoisonError::into_inner).iter().map(|entry| entry.kind).collect()
}

/// The registered model of this kind.
pub(crate) fn find(kind: &str) -> Option<Entry> {
    let registry = REGISTRY.read().unwrap_or_else(PoisonError::into_inner);
    registry.iter().find(|entry| entry.kind == kind).copied()
}
