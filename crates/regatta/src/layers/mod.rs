//! The parts that models are made of. Their dimensions have names; from these and the layout follow the part that a rank
//! holds and the collectives of forward and backward. Initial weights depend on seed and path alone.

mod attention;
mod context;
mod convolution;
mod dropout;
mod feed_forward;
mod init;
mod linear;
mod loss;
mod norm;
mod split;
mod vocabulary;

pub use attention::{Attention, CrossAttention, Deviations};
pub use context::{Cache, Context};
pub use convolution::{BatchNorm, Convolution};
pub use dropout::{dropout, dropout_part, residual_part};
pub use feed_forward::ActivationFunction;
pub(crate) use feed_forward::{feed_forward, feed_forward_layers};
pub use init::{Fill, Init, Made, Placement};
pub use linear::{Dims, Linear};
pub use loss::cross_entropy;
pub use norm::{Norm, NormKind};
pub use split::Split;
pub use vocabulary::Vocabulary;
