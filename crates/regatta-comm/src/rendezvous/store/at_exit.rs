//! Goodbyes when the process ends normally with its groups in statics, which Rust never drops.

use std::sync::{Mutex, Once, PoisonError, Weak};

/// Whoever has a goodbye to say.
pub(super) trait Leaving: Send + Sync {
    fn goodbye(&self);
}

/// Who says goodbye first: a store's clients do before its server.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Turn {
    Client,
    Server,
}

static LEAVING: Mutex<Vec<(Turn, Weak<dyn Leaving>)>> = Mutex::new(Vec::new());
static ONCE: Once = Once::new();

unsafe extern "C" {
    fn atexit(callback: extern "C" fn()) -> std::ffi::c_int;
}

extern "C" fn say() {
    let mut leaving = std::mem::take(&mut *LEAVING.lock().unwrap_or_else(PoisonError::into_inner));
    leaving.sort_by_key(|(turn, _)| *turn);
    for leaving in leaving.iter().filter_map(|(_, leaving)| leaving.upgrade()) {
        leaving.goodbye();
    }
}

pub(super) fn register(turn: Turn, who: Weak<dyn Leaving>) {
    // SAFETY: `atexit` is in every C library; the callback does not unwind: it has no panic to raise.
    ONCE.call_once(|| unsafe {
        atexit(say);
    });
    let mut leaving = LEAVING.lock().unwrap_or_else(PoisonError::into_inner);
    leaving.retain(|(_, leaving)| leaving.strong_count() > 0);
    leaving.push((turn, who));
}
