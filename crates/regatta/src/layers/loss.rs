//! Losses.

use burn::tensor::{Int, Tensor};

/// Mean cross entropy (natural logarithm) of `logits` `[samples, classes]` against `targets` `[samples]`, as `[1]`. The mean
/// leaves out samples whose target is [`IGNORED`](crate::models::IGNORED).
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    crate::autograd::cross_entropy(logits, targets, 0.0, None)
}
