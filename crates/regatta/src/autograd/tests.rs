//! Compares every fused operation with Burn's operations in f64, on random shapes. An operation whose input is not f32 on
//! Flex uses Burn's operations.

use super::*;
use burn::tensor::{DType, Int, Tensor, TensorData};
use proptest::prelude::*;
use regatta_kernel::activation::Activation;
use regatta_kernel::dropout::{Dropout, Noise, SampleRows};
use regatta_kernel::norm::Norm as Rows;
use regatta_kernel::random::Stream;

fn tensor<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
    let values = Stream::new(seed).normal(shape.iter().product(), 1.0);
    Tensor::from_data(TensorData::new(values, shape), &train_device())
}

fn ids<const D: usize>(shape: [usize; D], seed: u64, below: i64) -> Tensor<D, Int> {
    let len: usize = shape.iter().product();
    let values: Vec<i64> =
        (0..len as u64).map(|i| (Stream::new(seed).bits(i) % below as u64) as i64).collect();
    Tensor::from_data(TensorData::new(values, shape), &train_device())
}

fn numbers_of<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    detached(tensor).into_data().iter::<f64>().collect()
}

/// The inputs of an operation: a tensor, a matrix and a vector.
type Inputs<const D: usize> = (Tensor<D>, Tensor<2>, Tensor<1>);

/// The output of `operation` and the gradients of its inputs, computed with numbers of type `dtype`.
fn run<const D: usize, const E: usize>(
    dtype: DType,
    (x, matrix, vector): &Inputs<D>,
    operation: &impl Fn(Inputs<D>) -> Tensor<E>,
) -> Vec<Vec<f64>> {
    let (x, matrix, vector) = (
        x.clone().cast(dtype).require_grad(),
        matrix.clone().cast(dtype).require_grad(),
        vector.clone().cast(dtype).require_grad(),
    );
    let output = operation((x.clone(), matrix.clone(), vector.clone()));
    let scale = tensor(output.dims(), 99).cast(dtype);
    let mut found = (output.clone() * scale).sum().backward();
    let mut all = vec![numbers_of(output)];
    all.push(x.grad_remove(&mut found).map(numbers_of).unwrap_or_default());
    all.push(matrix.grad_remove(&mut found).map(numbers_of).unwrap_or_default());
    all.push(vector.grad_remove(&mut found).map(numbers_of).unwrap_or_default());
    all
}

/// Asserts that the fused `operation` agrees with Burn's operations in f64. The largest difference of each result must be
/// under 1e-5 of its largest number, or of 0.1 if all its numbers are smaller (inputs are about 1). For gradients the bound
/// is at least 1e-5 of a tenth of the largest number in any gradient, because some gradients are almost zero: those of the
/// queries if there is a single key.
#[track_caller]
fn agree<const D: usize, const E: usize>(
    what: &str,
    inputs: Inputs<D>,
    operation: impl Fn(Inputs<D>) -> Tensor<E>,
) {
    let (found, costs) = recording(|| run(DType::F32, &inputs, &operation));
    assert!(costs.iter().any(|one| one.phase == Phase::Forward), "{what} is not fused");
    let (wanted, costs) = recording(|| run(DType::F64, &inputs, &operation));
    assert!(costs.is_empty(), "{what} of f64 is fused: there is nothing to compare with");
    let largest_of = |values: &[f64]| values.iter().fold(0.1f64, |most, x| most.max(x.abs()));
    let of_gradients = wanted[1..].iter().map(|values| largest_of(values)).fold(0.0, f64::max);
    for (index, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
        assert_eq!(found.len(), wanted.len(), "{what}: result {index}");
        let least = if index == 0 { 0.0 } else { 0.1 * of_gradients };
        let largest = largest_of(wanted).max(least);
        let off = found.iter().zip(wanted).map(|(a, b)| (a - b).abs()).max_by(f64::total_cmp).unwrap_or(0.0);
        assert!(off < 1e-5 * largest, "{what}: result {index} is off by {off:.1e} of {largest}");
    }
}

fn dropout(rate: f32, seed: u64, part: usize) -> DropoutPart {
    let rows = SampleRows { first: 2, stride: 3 };
    DropoutPart {
        dropout: Dropout { noise: Stream::new(seed), rate },
        rows,
        part: 1..1 + part,
        full: part + 3,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn linear_layers(batch in 1usize..4, time in 1usize..20, input in 1usize..40, output in 1usize..40, seed: u64) {
        let given = || (tensor([batch, time, input], seed), tensor([input, output], seed ^ 1), tensor([output], seed ^ 2));
        let all = [Activation::Identity, Activation::Relu, Activation::Gelu, Activation::GeluTanh, Activation::Silu];
        for activation in all {
            // Near 0, the input of ReLU may have different signs in f32 and f64.
            let near = |(x, matrix, vector): Inputs<3>| {
                let sums = x.matmul(matrix.unsqueeze()) + vector.unsqueeze();
                numbers_of(sums).iter().any(|x| x.abs() < 1e-4)
            };
            if activation == Activation::Relu && near(given()) {
                continue;
            }
            agree("a linear layer", given(), |(x, matrix, vector)| linear(x, matrix, Some(vector), activation));
        }
        agree("a linear layer", given(), |(x, matrix, _)| linear(x, matrix, None, Activation::Gelu));
        let table = (tensor([batch, time, input], seed), tensor([output, input], seed ^ 1), tensor([1], 0));
        agree("a product with rows", table, |(x, table, _)| linear_by_rows(x, table));
    }

    #[test]
    fn norms(batch in 1usize..5, time in 1usize..40, width in 8usize..80, centred: bool, seed: u64) {
        // A norm over fewer than 8 numbers leaves little more than rounding in the gradient.
        let norm = Rows { centred, eps: 1e-5 };
        let given = || (tensor([batch, time, width], seed), tensor([1, width], seed ^ 1), tensor([width], seed ^ 2));
        agree("a norm", given(), |(x, gamma, beta)| normalise(x, gamma.reshape([width]), Some(beta), norm));
        agree("a norm", given(), |(x, gamma, _)| normalise(x, gamma.reshape([width]), None, norm));
    }

    #[test]
    fn losses(rows in 1usize..30, classes in 2usize..80, smooth: bool, seed: u64) {
        // Some targets are IGNORED.
        let targets = ids([rows], seed, classes as i64 + 1).sub_scalar(1);
        let smoothing = if smooth { 0.1 } else { 0.0 };
        let given = (tensor([rows, classes], seed).mul_scalar(3.0).detach(), tensor([1, 1], 0), tensor([1], 0));
        agree("cross entropy", given, |(x, ..)| cross_entropy(x, targets.clone(), smoothing, None));
    }

    #[test]
    fn embeddings(batch in 1usize..4, time in 1usize..20, rows in 1usize..30, width in 1usize..40, first in 0usize..4, seed: u64) {
        // The table is part of a larger one, with rows before and after it.
        let ids = ids([batch, time], seed, (rows + first + 2) as i64);
        let table = (tensor([1], 0), tensor([rows, width], seed ^ 1), tensor([1], 0));
        agree("an embedding", table, |(_, table, _)| rows_of(table, ids.clone(), first));
        let given = (tensor([batch, time, width], seed), tensor([first + time + 1, width], seed ^ 1), tensor([1], 0));
        agree("positions", given, |(x, table, _)| add_positions(x, table, first..first + time));
    }

    #[test]
    fn residuals(batch in 1usize..4, time in 1usize..20, width in 1usize..40, rate in 0.1f32..0.9, seed: u64) {
        let shape = [batch, time, width];
        let given = || (tensor(shape, seed), tensor([batch * time, width], seed ^ 1), tensor([1], 0));
        agree("a residual", given(), |(x, y, _)| residual(x, y.reshape(shape), None));
        agree("a residual", given(), |(x, y, _)| residual(x, y.reshape(shape), Some(dropout(rate, seed, time))));
        agree("dropout", given(), |(x, ..)| drop_elements(x, dropout(rate, seed, time)));
    }

    #[test]
    fn attentions(batch in 1usize..3, heads in 1usize..4, time in 1usize..40, seen in 1usize..40, width in 1usize..40, causal: bool, dropped: bool, seed: u64) {
        let rows = SampleRows { first: 1, stride: 2 };
        let noise = dropped.then(|| Noise { stream: Stream::new(seed), rows });
        let past = causal.then_some(0);
        let options = AttentionOptions { heads, first_head: 1, all_heads: heads + 2, past, rate: 0.2, noise };
        let one = (tensor([batch, time, 3 * heads * width], seed), tensor([1, 1], 0), tensor([1], 0));
        agree("attention", one, |(all, ..)| attention(AttentionInput::Fused(all), options));
        let options = AttentionOptions { past: None, ..options };
        let [row, both] = [heads * width, 2 * heads * width];
        let other = (tensor([batch, time, row], seed), tensor([batch * seen, both], seed ^ 1), tensor([1], 0));
        agree("attention", other, |(queries, others, _)| {
            attention(AttentionInput::Cross(queries, others.reshape([batch, seen, both])), options)
        });
    }
}
