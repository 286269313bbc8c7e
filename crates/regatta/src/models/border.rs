//! The borders of layers that are split over ranks, as data: what tensor parallelism communicates (Shoeybi et al. 2019,
//! "Megatron-LM", section 3).

/// The communication at a border of split layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Crossing {
    /// A tensor enters split layers, see [`Split::enter`](crate::layers::Split::enter).
    Enter,
    /// A tensor leaves split layers, see [`Split::leave`](crate::layers::Split::leave).
    Leave,
    /// The loss: an all-reduce in the forward pass only.
    Reduce,
}

/// A border of split layers in a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Border {
    /// The name of the border, such as `attention out`.
    pub what: &'static str,
    /// The dimension by which the layers are split.
    pub dim: &'static str,
    /// The communication.
    pub crossing: Crossing,
    /// Numbers of the whole tensor that is communicated, for one sample.
    pub numbers: usize,
}

impl Border {
    /// A tensor of `numbers` numbers for each sample enters layers that are split by `dim`.
    pub fn enter(what: &'static str, dim: &'static str, numbers: usize) -> Self {
        Self { what, dim, crossing: Crossing::Enter, numbers }
    }

    /// A tensor of `numbers` numbers for each sample leaves layers that are split by `dim`.
    pub fn leave(what: &'static str, dim: &'static str, numbers: usize) -> Self {
        Self { what, dim, crossing: Crossing::Leave, numbers }
    }

    /// The borders of a [`TransformerLayer`](crate::layers::TransformerLayer) in the order of the forward pass. `numbers` is
    /// the size of a sequence, tokens times width; `cross` is that of the source, if the layer has cross attention.
    pub fn of_transformer_layer(numbers: usize, cross: Option<usize>) -> Vec<Self> {
        let mut borders = vec![
            Self::enter("attention in", "heads", numbers),
            Self::leave("attention out", "heads", numbers),
        ];
        if let Some(source) = cross {
            borders.push(Self::enter("cross attention in", "heads", numbers));
            borders.push(Self::enter("cross attention's source in", "heads", source));
            borders.push(Self::leave("cross attention out", "heads", numbers));
        }
        borders.push(Self::enter("feed-forward in", "mlp", numbers));
        borders.push(Self::leave("feed-forward out", "mlp", numbers));
        borders
    }

    /// The border of [`Vocabulary::embed`](crate::layers::Vocabulary::embed) that returns `numbers` numbers for each sample.
    pub fn of_embedding(numbers: usize) -> Vec<Self> {
        vec![Self::leave("tokens", "vocab", numbers)]
    }

    /// The borders of [`Vocabulary::logits`](crate::layers::Vocabulary::logits) and
    /// [`Vocabulary::loss`](crate::layers::Vocabulary::loss) for `time` tokens whose embeddings have `numbers` numbers
    /// together, with label smoothing of `smoothing`.
    pub fn of_vocabulary(numbers: usize, time: usize, smoothing: f64) -> Vec<Self> {
        // The sum of exponentials and the target's logit of each token; smoothing also needs the sum of logits.
        let sums = if smoothing > 0.0 { 3 } else { 2 };
        let reduce = |what, numbers| Self { what, dim: "vocab", crossing: Crossing::Reduce, numbers };
        vec![
            Self::enter("logits in", "vocab", numbers),
            reduce("largest logits", time),
            reduce("sums", sums * time),
        ]
    }
}
