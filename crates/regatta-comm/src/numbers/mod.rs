//! The numbers that ranks exchange: their types, and the loops that combine them.

pub(crate) mod bool;
pub(crate) mod complex;
pub(crate) mod element;
mod float16;
mod int128;
pub(crate) mod kernel;
pub(crate) mod memory;
pub(crate) mod sized;
mod types;
