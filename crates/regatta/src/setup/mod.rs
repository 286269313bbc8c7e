//! The setup of a job before it trains or generates: creates each rank's engine, compares the ranks, and reads
//! checkpoints.

mod agree;
mod agreement;
mod load;
mod open;
mod rank;

pub(crate) use agree::agree_on;
pub use agreement::agree;
pub(crate) use load::{ISLAND, check_model, load, owned, wanted};
pub(crate) use open::{open_intact, open_to_read};
pub(crate) use rank::{engine, shard};
