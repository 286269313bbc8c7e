//! Attention over heads: a tiled kernel where tensors are f32 on Flex, Burn's operations elsewhere.

use super::custom::{Back, custom, fused, numbers, tensor_of, value};
use super::residual::{DropoutPart, drop_elements};
use super::work::{Cost, Work};
use burn::backend::{TensorMetadata, flex::FlexTensor};
use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Tensor};
use regatta_kernel::attention::{Attention, Dropout, Operands, Strides, View};
use regatta_kernel::dropout::Noise;

/// Queries, keys and values. `width` is the width of a head.
// One is alive at a time, so its size does not matter.
#[allow(clippy::large_enum_variant)]
pub(crate) enum AttentionInput {
    /// Self-attention: all three from one projection, `[batch, time, 3 * heads * width]`.
    Fused(Tensor<3>),
    /// Cross attention: queries `[batch, time, heads * width]`, and the keys and values of another sequence
    /// `[batch, source time, 2 * heads * width]`.
    Cross(Tensor<3>, Tensor<3>),
    /// Three tensors `[batch, heads, time, width]`.
    Separate([Tensor<4>; 3]),
}

/// The heads of this rank, their mask and their dropout.
#[derive(Clone, Copy)]
pub(crate) struct AttentionOptions {
    /// The number of heads on this rank.
    pub(crate) heads: usize,
    /// The first of them, as an index into the model's heads.
    pub(crate) first_head: usize,
    /// The number of heads in the model.
    pub(crate) all_heads: usize,
    /// For causal attention: query `i` attends to the keys up to `past + i`.
    pub(crate) past: Option<usize>,
    /// The rate of dropout of attention weights.
    pub(crate) rate: f64,
    /// The random numbers of dropout; without them, no weight is dropped.
    pub(crate) noise: Option<Noise>,
}

/// The heads' outputs side by side, `[batch, time, heads * width]` (Vaswani et al. 2017, "Attention Is All You Need",
/// section 3.2).
pub(crate) fn attention(input: AttentionInput, options: AttentionOptions) -> Tensor<3> {
    let heads = options.heads;
    match input {
        AttentionInput::Fused(all) if fused(&all) => {
            let [batch, time, row] = all.dims();
            tiled(options.sizes(batch, [time, time], row / (3 * heads)), [value(all)])
        }
        AttentionInput::Cross(queries, others) if fused(&queries) && fused(&others) => {
            let [batch, time, row] = queries.dims();
            let sizes = options.sizes(batch, [time, others.dims()[1]], row / heads);
            tiled(sizes, [value(queries), value(others)])
        }
        AttentionInput::Separate(all) if all.iter().all(fused) => {
            let [batch, _, time, width] = all[0].dims();
            tiled(options.sizes(batch, [time, all[1].dims()[2]], width), all.map(value))
        }
        input => decomposed(input, options),
    }
}

/// Splits `[batch, time, N * heads * width]` into N tensors `[batch, heads, time, width]`.
pub(crate) fn split_heads<const N: usize>(x: Tensor<3>, heads: usize) -> [Tensor<4>; N] {
    let [batch, time, row] = x.dims();
    let x = x.reshape([batch, time, N * heads, row / (N * heads)]).swap_dims(1, 2);
    std::array::from_fn(|i| x.clone().narrow(1, i * heads, heads))
}

impl AttentionOptions {
    /// The kernel's arguments for `time` queries and `seen` keys in each sequence.
    fn sizes(&self, batch: usize, [time, seen]: [usize; 2], width: usize) -> Attention<'static> {
        let &Self { heads, first_head: first, all_heads: all, past, rate, noise } = self;
        let dropout = noise.map(|Noise { stream, rows }| Dropout { stream, rows, rate, first, all });
        Attention { batch, heads, time, seen, width, past, hidden: None, dropout }
    }
}

fn tiled<const N: usize>(sizes: Attention<'static>, inputs: [super::custom::Value; N]) -> Tensor<3> {
    custom(work(&sizes), inputs, move |inputs| {
        let (output, sums) = with_operands(&inputs, |operands| sizes.forward(operands));
        let Attention { batch, time, heads, width, .. } = sizes;
        let output = tensor_of(output, [batch, time, heads * width]);
        let kept = output.clone();
        let back: Back<N> = Box::new(move |gradient, wanted| {
            let given = [&*numbers(&kept), &sums, &numbers(&gradient)];
            let mut gradients =
                with_operands(&inputs, |operands| sizes.backward(operands, given)).into_iter();
            let mut wanted = wanted.into_iter();
            inputs.each_ref().map(|input| {
                let gradient = gradients.next()?;
                wanted.next()?.map(|_| tensor_of(gradient, input.shape()))
            })
        });
        (output, back)
    })
}

/// Forward has two products: queries with keys, and weights with values. Backward repeats the first and has four more, for
/// the gradients of queries, keys, values and weights.
fn work(sizes: &Attention<'_>) -> Work {
    let rows = (sizes.batch * sizes.heads * sizes.width) as f64;
    let (time, seen) = (sizes.time as f64, sizes.seen as f64);
    let cost = |flops, bytes| Cost { flops, bytes };
    Work {
        name: "attention",
        forward: cost(sizes.flops(), 4.0 * rows * 2.0 * (time + seen)),
        backward: cost(2.5 * sizes.flops(), 4.0 * rows * 4.0 * (time + seen)),
    }
}

/// Runs `body` on the operands in `tensors`, in the layout of their [`AttentionInput`].
fn with_operands<R>(tensors: &[FlexTensor], body: impl FnOnce(&Operands<'_>) -> R) -> R {
    match tensors {
        [all] => body(&Operands::Fused(&numbers(all))),
        [queries, others] => body(&Operands::Cross(&numbers(queries), &numbers(others))),
        [queries, keys, values] => {
            let all = [queries, keys, values].map(with_contiguous_rows);
            body(&Operands::Apart(all.each_ref().map(view)))
        }
        _ => unreachable!("attention has one, two or three operands"),
    }
}

/// The tensor, or a contiguous copy if the numbers of a row are not adjacent.
fn with_contiguous_rows(tensor: &FlexTensor) -> FlexTensor {
    let layout = tensor.layout();
    let rows = layout.strides().last() == Some(&1) && layout.has_positive_strides();
    if rows { tensor.clone() } else { tensor.to_contiguous() }
}

fn view(tensor: &FlexTensor) -> View<'_> {
    let layout = tensor.layout();
    let stride = |dimension: usize| layout.strides()[dimension].unsigned_abs();
    let strides = Strides { batch: stride(0), head: stride(1), time: stride(2) };
    View::new(&tensor.storage::<f32>()[layout.start_offset()..], strides)
}

/// [`attention`] with Burn's operations.
fn decomposed(input: AttentionInput, options: AttentionOptions) -> Tensor<3> {
    let heads = options.heads;
    let [queries, keys, values] = match input {
        AttentionInput::Fused(all) => split_heads(all, heads),
        AttentionInput::Cross(queries, others) => {
            let ([queries], [keys, values]) = (split_heads(queries, heads), split_heads(others, heads));
            [queries, keys, values]
        }
        AttentionInput::Separate(all) => all,
    };
    let [batch, heads, time, width] = queries.dims();
    let [_, _, seen, _] = keys.dims();
    let scores = queries.matmul(keys.swap_dims(2, 3)).mul_scalar((width as f64).powf(-0.5));
    let scores = match options.past {
        Some(past) => {
            let mask = Tensor::<2, Bool>::tril_mask([time, seen], past as i64, &scores.device());
            scores.mask_fill(mask.unsqueeze::<4>(), f32::NEG_INFINITY)
        }
        None => scores,
    };
    let weights = softmax(scores, 3);
    let weights = match options.noise.filter(|_| options.rate > 0.0) {
        Some(Noise { stream: noise, rows }) => {
            let dropout = regatta_kernel::dropout::Dropout { noise, rate: options.rate as f32 };
            let part = options.first_head..options.first_head + heads;
            drop_elements(weights, DropoutPart { dropout, rows, part, full: options.all_heads })
        }
        None => weights,
    };
    weights.matmul(values).swap_dims(1, 2).reshape([batch, time, heads * width])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::{recording, to_vec, train_device};
    use crate::random::Stream;
    use burn::tensor::TensorData;
    use regatta_kernel::dropout::SampleRows;

    fn tensor<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
        let values = Stream::new(seed).normal(shape.iter().product(), 1.0);
        Tensor::from_data(TensorData::new(values, shape), &train_device()).require_grad()
    }

    fn close(found: &[f32], wanted: &[f32]) {
        assert_eq!(found.len(), wanted.len());
        let largest = wanted.iter().fold(1e-3f32, |most, x| most.max(x.abs()));
        let difference =
            found.iter().zip(wanted).map(|(a, b)| (a - b).abs()).max_by(f32::total_cmp).unwrap_or(0.0);
        assert!(difference < 1e-5 * largest, "{difference} of {largest}");
    }

    /// Compares the output and the gradients of the tiled kernel with those of Burn's operations.
    fn compare<const N: usize, const D: usize>(
        inputs: [Tensor<D>; N],
        options: AttentionOptions,
        arrange: impl Fn([Tensor<D>; N]) -> AttentionInput,
    ) {
        let ours = attention(arrange(inputs.clone()), options);
        let burn = decomposed(arrange(inputs.clone()), options);
        let scale = tensor(ours.dims(), 9).inner();
        let run = |output: Tensor<3>| {
            let gradients = (output.clone() * Tensor::from_inner(scale.clone())).sum().backward();
            let mut all = vec![to_vec(output).unwrap()];
            all.extend(inputs.iter().map(|input| to_vec(input.grad(&gradients).unwrap()).unwrap()));
            all
        };
        for (found, wanted) in run(ours).iter().zip(&run(burn)) {
            close(found, wanted);
        }
    }

    #[test]
    fn agrees_with_burn() {
        let noise = Some(Noise { stream: Stream::new(7), rows: SampleRows { first: 2, stride: 3 } });
        for (past, noise) in [(None, None), (Some(0), None), (None, noise), (Some(0), noise)] {
            let options = AttentionOptions { heads: 2, first_head: 1, all_heads: 4, past, rate: 0.3, noise };
            compare([tensor([2, 9, 30], 1)], options, |[all]| AttentionInput::Fused(all));
            let cross = [tensor([2, 9, 10], 2), tensor([2, 12, 20], 3)];
            compare(cross, options, |[queries, others]| AttentionInput::Cross(queries, others));
        }
        let options =
            AttentionOptions { heads: 3, first_head: 0, all_heads: 3, past: Some(4), rate: 0.0, noise: None };
        let parts = [tensor([2, 3, 5, 8], 4), tensor([2, 3, 9, 8], 5), tensor([2, 3, 9, 8], 6)];
        compare(parts, options, AttentionInput::Separate);
        // Views with other strides.
        let heads_inside = [tensor([2, 5, 3, 8], 4), tensor([2, 9, 3, 8], 5), tensor([2, 9, 3, 8], 6)];
        compare(heads_inside, options, |all| AttentionInput::Separate(all.map(|x| x.swap_dims(1, 2))));
        let time_inside = [tensor([2, 3, 8, 5], 4), tensor([2, 3, 8, 9], 5), tensor([2, 3, 8, 9], 6)];
        compare(time_inside, options, |all| AttentionInput::Separate(all.map(|x| x.swap_dims(2, 3))));
    }

    #[test]
    fn numbers_of_another_type_use_burns_operations() {
        let x = tensor([1, 4, 12], 1).inner();
        let options =
            AttentionOptions { heads: 2, first_head: 0, all_heads: 2, past: Some(0), rate: 0.0, noise: None };
        let (wanted, costs) = recording(|| attention(AttentionInput::Fused(x.clone()), options));
        // The four queries attend to 1 + 2 + 3 + 4 keys.
        assert_eq!((costs[0].name, costs[0].cost.flops), ("attention", 4.0 * 2.0 * 2.0 * 10.0));
        let x = AttentionInput::Fused(x.cast(burn::tensor::DType::F64));
        let (found, costs) = recording(|| attention(x, options));
        assert!(costs.is_empty());
        close(&to_vec(found.cast(burn::tensor::DType::F32)).unwrap(), &to_vec(wanted).unwrap());
    }
}
