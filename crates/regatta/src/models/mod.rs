//! Models as chains of blocks, and the registry of the models that this program knows.
//!
//! A model is a chain of blocks between the batch and the loss. Every parallel strategy divides a model into its blocks; the
//! model does not depend on any strategy. `docs/adding-a-model.md` shows how to add a model.

mod activation;
mod batch;
mod border;
mod cnn;
mod config;
mod encoder_decoder;
mod gpt;
mod mlp;
mod model;
mod registry;
mod resnet;
mod spec;
mod stored;

pub use crate::autograd::IGNORED;
pub use crate::layers::{ActivationFunction, NormKind};
pub use activation::Activation;
pub(crate) use activation::TensorMap;
pub use batch::Batch;
pub use border::{Border, Crossing};
pub use cnn::{Cnn, CnnConfig};
pub(crate) use config::BuiltModel;
pub use config::ModelConfig;
pub use encoder_decoder::{EncoderDecoder, EncoderDecoderConfig};
pub use gpt::{Gpt, GptConfig};
pub use mlp::{Mlp, MlpConfig};
pub use model::{BlockCost, Model, count_correct, held};
pub(crate) use registry::find;
pub use registry::{kinds, register};
pub use resnet::{Resnet, ResnetConfig};
pub use spec::{Limit, ModelSpec, Problem, Samples, at_least_one, divides_into_heads, largest, rates};
