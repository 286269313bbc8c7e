//! The parts of a model's parameters that one rank holds, and their memory.
//!
//! A model creates its parameters with a [`ParamBuilder`], twice. The first time the builder only describes them, without
//! memory ([`PlacedParam`]). The descriptions are laid out in units ([`Units`]). The second time the parameters are views of
//! a [`ParamStore`], and the builder draws only the numbers that this rank keeps.

mod bind;
mod builder;
mod device_copies;
mod leaves;
mod placed;
mod store;
mod units;
mod walk;

pub(crate) use bind::{bind, undeclared};
pub use builder::{Initializer, ParamBuilder};
pub(crate) use leaves::Leaves;
pub use placed::{PlacedParam, Placement};
pub use store::ParamStore;
pub use units::{UnitShapes, Units};
pub(crate) use walk::{ParamVisitor, visit_params};
