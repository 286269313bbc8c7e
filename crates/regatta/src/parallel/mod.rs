//! How one model is spread over ranks: by data, by tensor, by stage, sharded, and every product of these.

mod axes;
mod buckets;
mod carried;
mod copies;
mod data;
mod engine;
mod gradients;
mod hand;
mod leaves;
mod links;
mod params;
mod pool;
mod share;
mod timeline;
mod units;
mod whole;

pub use axes::Axes;
pub(crate) use axes::line;
pub use buckets::{Buckets, ParamSpec, param_specs};
pub use carried::{Carried, Purpose};
pub use data::GradientSync;
pub use engine::{Engine, StepResult};
pub use gradients::{CommTime, Gradients};
pub use params::ParamStore;
pub use share::Share;
pub use timeline::Timeline;
pub use units::{Segment, Unit, Units};
pub use whole::Parameters;
