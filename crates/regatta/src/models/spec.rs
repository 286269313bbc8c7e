//! The configuration of a model, which also describes its costs, samples and limits.

use super::border::Border;
use super::model::{BlockCost, Model};
use crate::params::{ParamBuilder, Placement};
use burn::module::Module;
use regatta_plan::SPLITTABLE_DIMS;
use serde::{Serialize, de::DeserializeOwned};
use std::fmt;

/// The kind of samples that a model is trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Samples {
    /// Texts; the model predicts the next token of each token.
    Text {
        /// Tokens of a sample.
        time: usize,
    },
    /// Pairs of a source text and a target text, as in translation.
    Pairs {
        /// Tokens of a source.
        source_time: usize,
        /// Tokens of a target.
        time: usize,
    },
    /// Images and their classes.
    Images {
        /// Height of an image in pixels.
        height: usize,
        /// Width of an image in pixels.
        width: usize,
        /// Channels of an image.
        channels: usize,
    },
}

impl Samples {
    /// Height, width and channels of an image; none if samples are not images.
    pub fn image(self) -> Option<[usize; 3]> {
        match self {
            Self::Images { height, width, channels } => Some([height, width, channels]),
            Self::Text { .. } | Self::Pairs { .. } => None,
        }
    }

    /// The number of targets of a sample: the tokens to predict, or 1 for an image.
    pub fn tokens(self) -> usize {
        match self {
            Self::Text { time } | Self::Pairs { time, .. } => time,
            Self::Images { .. } => 1,
        }
    }

    /// The lengths of all sequences in a sample, in tokens; empty if samples are images.
    pub fn times(self) -> Vec<usize> {
        match self {
            Self::Text { time } => vec![time],
            Self::Pairs { source_time, time } => vec![source_time, time],
            Self::Images { .. } => vec![],
        }
    }
}

/// An invalid value in a model's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The key in the section `[model]`.
    pub key: String,
    /// What is wrong, and what is allowed.
    pub problem: String,
}

impl Problem {
    /// A problem with the value of `key`.
    pub fn new(key: &str, problem: impl Into<String>) -> Self {
        Self { key: key.into(), problem: problem.into() }
    }
}

/// Checks that the counts, given by key, are at least 1.
///
/// # Errors
/// The first count that is 0.
pub fn at_least_one<'a>(counts: impl IntoIterator<Item = (&'a str, usize)>) -> Result<(), Problem> {
    match counts.into_iter().find(|(_, count)| *count == 0) {
        Some((key, _)) => Err(Problem::new(key, "must be at least 1")),
        None => Ok(()),
    }
}

/// Checks that the rates, given by key, are at least 0 and below 1.
///
/// # Errors
/// The first rate that is out of this range.
pub fn rates(rates: &[(&str, f64)]) -> Result<(), Problem> {
    match rates.iter().find(|(_, rate)| !(0.0..1.0).contains(rate)) {
        Some((key, rate)) => Err(Problem::new(key, format!("{rate} is out of range: 0 to below 1"))),
        None => Ok(()),
    }
}

/// Checks that `heads` divides `embed`, the width of attention.
///
/// # Errors
/// It does not divide it.
pub fn divides_into_heads(embed: usize, heads: usize) -> Result<(), Problem> {
    if embed.is_multiple_of(heads) {
        return Ok(());
    }
    Err(Problem::new("embed", format!("{embed} is not a multiple of the {heads} heads (model.heads)")))
}

/// Upper bounds for the values of a model's configuration. They are far beyond the models that are trained today, and small
/// enough that products of values do not overflow and lists of that length fit into memory.
pub mod largest {
    /// Most layers, or blocks of all stages.
    pub const LAYERS: usize = 1 << 10;
    /// Largest width of a layer, in numbers.
    pub const WIDTH: usize = 1 << 17;
    /// Longest context, in tokens.
    pub const CONTEXT: usize = 1 << 20;
    /// Most channels of a convolution.
    pub const CHANNELS: usize = 1 << 12;
    /// Longest side of an image, in pixels.
    pub const SIDE: usize = 1 << 11;
}

/// A key of a model's configuration, its value, and the largest value that it may have.
pub type Limit = (&'static str, usize, usize);

/// A model's configuration: the section `[model]` whose `kind` is [`KIND`](Self::KIND). A model that implements this trait
/// and [`Model`] can be trained under every plan.
///
/// Use `#[serde(deny_unknown_fields, default)]`, so that a misspelt key is an error and a missing key has its default.
pub trait ModelSpec:
    Clone + PartialEq + fmt::Debug + Serialize + DeserializeOwned + Send + Sync + 'static
{
    /// The value of `kind` in a configuration.
    const KIND: &'static str;

    /// The type of the model.
    type Model: Model + Module;

    /// The kind of samples that the model is trained on.
    fn samples(&self) -> Samples;

    /// Builds the model. `classes` is the size of the vocabulary, or the number of classes of images. `params` creates the
    /// parameters.
    fn build(&self, classes: usize, params: &ParamBuilder) -> Self::Model;

    /// The cost of each block for one sample. The default estimates it from the parameters, as if each were a matrix that
    /// every token is multiplied with.
    fn costs(&self, classes: usize) -> Vec<BlockCost> {
        estimated_costs(self, classes)
    }

    /// The borders of split layers in `block`, in the order of the forward pass. A model whose layers can be split over ranks
    /// lists them, so that its communication can be predicted.
    fn borders(&self, _block: usize) -> Vec<Border> {
        vec![]
    }

    /// The upper bounds of its keys, see [`largest`].
    fn limits(&self) -> Vec<Limit> {
        vec![]
    }

    /// Checks the values of its keys, which are within their [`limits`](Self::limits).
    ///
    /// # Errors
    /// A value that is invalid, or does not fit the others.
    fn check(&self) -> Result<(), Problem> {
        Ok(())
    }

    /// The reason why the model runs only on the host's processor; none if it runs on every device.
    fn host_only(&self) -> Option<&'static str> {
        None
    }

    /// The longest text in tokens; none if the model does not generate text token by token.
    fn context(&self) -> Option<usize> {
        None
    }
}

/// The default of [`ModelSpec::costs`].
fn estimated_costs<S: ModelSpec>(spec: &S, classes: usize) -> Vec<BlockCost> {
    let params = ParamBuilder::describing(Placement::whole());
    let blocks = spec.build(classes, &params).num_blocks();
    let (declared, tokens) = (params.declared(), spec.samples().tokens() as f64);
    let cost = |block: usize| {
        let (mut flops, mut kept, mut unsplit) = (0.0, 0.0, 0.0);
        for param in declared.iter().filter(|param| param.blocks.contains(&block)) {
            flops += 2.0 * tokens * param.spec.len() as f64;
            // Backward needs the input and the output of a product.
            let split = param.spec.dims.iter().any(|dim| SPLITTABLE_DIMS.contains(&dim.name.as_str()));
            let numbers = tokens * param.spec.shape.iter().sum::<usize>() as f64;
            kept += numbers;
            unsplit += if split { 0.0 } else { numbers };
        }
        BlockCost { name: format!("block {block}"), flops: flops.max(1.0), kept, unsplit }
    };
    (0..blocks).map(cost).collect()
}
