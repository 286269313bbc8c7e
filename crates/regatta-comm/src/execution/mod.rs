//! Carries operations out: checks, numbers, records them, and runs those with a handle on a thread.

mod check;
pub(crate) mod engine;
pub(crate) mod operation;
pub(crate) mod operations;
pub(crate) mod pending;
pub(crate) mod promptness;
pub(crate) mod queue;
pub(crate) mod traffic;
