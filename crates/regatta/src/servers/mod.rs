//! Parameter servers (Li et al. 2014, "Scaling Distributed Machine Learning with the Parameter Server"): the last ranks of a
//! job keep shards of the parameters with the optimizer; workers push gradients to them and get parameters back.
//!
//! Every unit of parameters is split evenly over the servers, so that each has as many bytes of every unit. A worker's side
//! is [`ServedExchange`](crate::parallel::exchange::ServedExchange).

mod clocks;
mod courier;
mod link;
mod message;
mod round;
mod serve;
mod shard;

pub(crate) use courier::Courier;
pub use link::{Role, ServerEnd, ServerLink};
pub(crate) use message::{Commit, Kind};
pub use serve::Served;
pub(crate) use serve::serve;
pub(crate) use shard::Shard;
