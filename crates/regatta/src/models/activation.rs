//! Activations: the tensors that blocks pass on.

use burn::tensor::Tensor;

/// The input of a block, and the output of the block before it.
#[derive(Debug, Clone)]
// A handful are alive at once, so their size does not matter.
#[allow(clippy::large_enum_variant)]
#[non_exhaustive]
pub enum Activation {
    /// The input of the first block, which reads the batch.
    Start,
    /// `[batch, features]`
    Two(Tensor<2>),
    /// `[batch, time, width]`
    Three(Tensor<3>),
    /// `[batch, height, width, channels]`
    Four(Tensor<4>),
    /// A decoder's `[batch, time, width]`, and the output of the encoder that it attends to, `[batch, source time, width]`.
    Pair(Tensor<3>, Tensor<3>),
}

/// A function of the tensors of an activation, for tensors of every rank.
pub(crate) trait TensorMap {
    /// Its value for one tensor.
    fn tensor<const D: usize>(&mut self, tensor: Tensor<D>) -> Tensor<D>;
}

impl Activation {
    /// The tensor of a [`Two`](Self::Two), `[batch, features]`.
    ///
    /// # Panics
    /// It is another activation: the block before returned one that this block does not take, which is a bug of the model.
    pub fn two(self) -> Tensor<2> {
        match self {
            Self::Two(x) => x,
            other => panic!("the block takes an activation [batch, features], not {other:?}"),
        }
    }

    /// The tensor of a [`Three`](Self::Three), `[batch, time, width]`.
    ///
    /// # Panics
    /// As [`two`](Self::two).
    pub fn three(self) -> Tensor<3> {
        match self {
            Self::Three(x) => x,
            other => panic!("the block takes an activation [batch, time, width], not {other:?}"),
        }
    }

    /// The tensor of a [`Four`](Self::Four), `[batch, height, width, channels]`.
    ///
    /// # Panics
    /// As [`two`](Self::two).
    pub fn four(self) -> Tensor<4> {
        match self {
            Self::Four(x) => x,
            other => panic!("the block takes an activation [batch, height, width, channels], not {other:?}"),
        }
    }

    /// The tensors of a [`Pair`](Self::Pair): the decoder's `[batch, time, width]` and the encoder's
    /// `[batch, source time, width]`.
    ///
    /// # Panics
    /// As [`two`](Self::two).
    pub fn pair(self) -> (Tensor<3>, Tensor<3>) {
        match self {
            Self::Pair(x, source) => (x, source),
            other => panic!("the block takes a pair of a decoder's and an encoder's tensor, not {other:?}"),
        }
    }

    /// Applies `map` to every tensor.
    pub(crate) fn map(self, map: &mut impl TensorMap) -> Self {
        match self {
            Self::Start => Self::Start,
            Self::Two(x) => Self::Two(map.tensor(x)),
            Self::Three(x) => Self::Three(map.tensor(x)),
            Self::Four(x) => Self::Four(map.tensor(x)),
            Self::Pair(x, source) => {
                let x = map.tensor(x);
                Self::Pair(x, map.tensor(source))
            }
        }
    }
}
