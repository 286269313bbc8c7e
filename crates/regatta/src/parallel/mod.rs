//! Trains one model on many ranks: with data, tensor and pipeline parallelism, sharding, and combinations of these.

mod block_io;
mod carried;
mod engine;
pub mod exchange;
mod gradients;
mod groups;
mod links;
mod rank_plan;
mod timeline;
mod wire;

pub use carried::{Carried, Purpose};
pub use engine::{Engine, MicroBatch};
pub use exchange::CommTime;
pub use groups::Groups;
pub(crate) use groups::model_axes;
pub use rank_plan::{BlockUse, RankPlan};
pub use timeline::Timeline;
