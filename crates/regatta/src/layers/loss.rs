//! Losses.

use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor};

/// Mean cross entropy (natural logarithm) of `logits` `[samples, classes]` against `targets` `[samples]`.
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let [samples, _] = logits.dims();
    log_softmax(logits, 1).gather(1, targets.reshape([samples, 1])).mean().neg()
}
