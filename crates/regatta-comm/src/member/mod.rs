//! What a rank knows of a group and of its job while operations go on: calls, news, waits, notes, records.

pub(crate) mod call;
pub(crate) mod context;
pub(crate) mod directory;
pub(crate) mod health;
pub(crate) mod joining;
pub(crate) mod late;
pub(crate) mod notes;
pub(crate) mod recorder;
pub(crate) mod rounds;
pub(crate) mod timer;
pub(crate) mod trace_folder;
pub(crate) mod wait;
pub(crate) mod waits;
