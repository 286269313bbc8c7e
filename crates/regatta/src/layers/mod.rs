//! The parts that models are made of, with initial weights that depend on seed and path alone.

mod dropout;
mod init;
mod loss;

pub use dropout::{Context, dropout};
pub use init::Init;
pub use loss::cross_entropy;
