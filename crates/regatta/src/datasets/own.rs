//! Data that a program provides itself: `data.kind = "own"`.

use super::run_data::Datasets;
use crate::config::Config;
use crate::error::{Error, Result};
use std::sync::{Arc, PoisonError, RwLock};

type Open = Arc<dyn Fn(&Config) -> Result<Datasets> + Send + Sync>;

/// The function that [`register`] was given.
static OWN: RwLock<Option<Open>> = RwLock::new(None);

/// Registers `open` as the function that opens the data of configurations with `data.kind = "own"`. It replaces an
/// earlier one. `open` is called on every rank, possibly more than once.
pub fn register(open: impl Fn(&Config) -> Result<Datasets> + Send + Sync + 'static) {
    *OWN.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(open));
}

/// Opens the program's own data.
///
/// # Errors
/// The program has not registered any data, or `open` fails.
pub(super) fn open(config: &Config) -> Result<Datasets> {
    let open = OWN.read().unwrap_or_else(PoisonError::into_inner).clone();
    let open = open.ok_or_else(|| {
        Error::Usage("data.kind = \"own\": this program does not provide data; use another kind".into())
    })?;
    open(config)
}
