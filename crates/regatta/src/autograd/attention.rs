//! Attention over heads, in tiles where tensors are f32 on Flex, and elsewhere of Burn's own operations.

use super::custom::{Back, custom, fused, numbers, tensor_of, value};
use super::residual::{Drops, drop_elements};
use super::work::{Cost, Work};
use crate::random::Stream;
use burn::backend::{TensorMetadata, flex::FlexTensor};
use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Tensor};
use regatta_kernel::attention::{Attention, Dropout, Operands, Strides, View};

/// Queries, keys and values.
// One is alive at a time, so its size does not matter.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Seen {
    /// Of one projection, `[batch, time, 3 * heads * width]`.
    Itself(Tensor<3>),
    /// Queries `[batch, time, heads * width]`; keys and values of another sequence, `[batch, seen, 2 * heads * width]`.
    Other(Tensor<3>, Tensor<3>),
    /// Each by itself, `[batch, heads, time, width]`.
    Apart([Tensor<4>; 3]),
}

/// How queries see keys, on this rank.
#[derive(Clone, Copy)]
pub(crate) struct Rule {
    /// Heads here.
    pub(crate) heads: usize,
    /// The first of them, of all.
    pub(crate) first: usize,
    /// Heads in the whole model.
    pub(crate) all: usize,
    /// Causal, where given: query `i` sees the keys up to `past + i`.
    pub(crate) past: Option<usize>,
    /// Of the weights that are dropped.
    pub(crate) rate: f64,
    /// What decides which; none are without.
    pub(crate) noise: Option<Stream>,
}

/// What the heads see, side by side, `[batch, time, heads * width]`.
pub(crate) fn attention(seen: Seen, rule: Rule) -> Tensor<3> {
    let heads = rule.heads;
    match seen {
        Seen::Itself(all) if fused(&all) => {
            let [batch, time, row] = all.dims();
            tiled(rule.sizes(batch, [time, time], row / (3 * heads)), [value(all)])
        }
        Seen::Other(queries, others) if fused(&queries) && fused(&others) => {
            let [batch, time, row] = queries.dims();
            let sizes = rule.sizes(batch, [time, others.dims()[1]], row / heads);
            tiled(sizes, [value(queries), value(others)])
        }
        Seen::Apart(all) if all.iter().all(fused) => {
            let [batch, _, time, width] = all[0].dims();
            tiled(rule.sizes(batch, [time, all[1].dims()[2]], width), all.map(value))
        }
        seen => decomposed(seen, rule),
    }
}

/// `[batch, time, n * heads * width]` to n times `[batch, heads, time, width]`.
pub(crate) fn apart<const N: usize>(x: Tensor<3>, heads: usize) -> [Tensor<4>; N] {
    let [batch, time, row] = x.dims();
    let x = x.reshape([batch, time, N * heads, row / (N * heads)]).swap_dims(1, 2);
    std::array::from_fn(|i| x.clone().narrow(1, i * heads, heads))
}

impl Rule {
    fn sizes(&self, batch: usize, [time, seen]: [usize; 2], width: usize) -> Attention<'static> {
        let &Self { heads, first, all, past, rate, noise } = self;
        let dropout = noise.map(|stream| Dropout { stream, rate, first, all });
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

/// Forward multiplies queries with keys and weights with values; backward does the first again and has the gradients of
/// queries, keys, values and weights to find.
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

/// Runs `body` on the operands that so many tensors are.
fn with_operands<R>(tensors: &[FlexTensor], body: impl FnOnce(&Operands<'_>) -> R) -> R {
    match tensors {
        [all] => body(&Operands::Fused(&numbers(all))),
        [queries, others] => body(&Operands::Cross(&numbers(queries), &numbers(others))),
        [queries, keys, values] => {
            let all = [queries, keys, values].map(readable);
            body(&Operands::Apart(all.each_ref().map(view)))
        }
        _ => unreachable!("attention has one, two or three operands"),
    }
}

/// The tensor, or a copy if its rows are not side by side.
fn readable(tensor: &FlexTensor) -> FlexTensor {
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

/// The same of Burn's operations.
fn decomposed(seen: Seen, rule: Rule) -> Tensor<3> {
    let heads = rule.heads;
    let [queries, keys, values] = match seen {
        Seen::Itself(all) => apart(all, heads),
        Seen::Other(queries, others) => {
            let ([queries], [keys, values]) = (apart(queries, heads), apart(others, heads));
            [queries, keys, values]
        }
        Seen::Apart(all) => all,
    };
    let [batch, heads, time, width] = queries.dims();
    let [_, _, seen, _] = keys.dims();
    let scores = queries.matmul(keys.swap_dims(2, 3)).mul_scalar((width as f64).powf(-0.5));
    let scores = match rule.past {
        Some(past) => {
            let mask = Tensor::<2, Bool>::tril_mask([time, seen], past as i64, &scores.device());
            scores.mask_fill(mask.unsqueeze::<4>(), f32::NEG_INFINITY)
        }
        None => scores,
    };
    let weights = softmax(scores, 3);
    let weights = match rule.noise.filter(|_| rule.rate > 0.0) {
        Some(noise) => {
            let dropout = regatta_kernel::dropout::Dropout { noise, rate: rule.rate as f32 };
            drop_elements(weights, Drops { dropout, part: rule.first..rule.first + heads, whole: rule.all })
        }
        None => weights,
    };
    weights.matmul(values).swap_dims(1, 2).reshape([batch, time, heads * width])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::{recording, to_vec, train_device};
    use burn::tensor::TensorData;

    fn tensor<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
        let values = Stream::new(seed).normal(shape.iter().product(), 1.0);
        Tensor::from_data(TensorData::new(values, shape), &train_device()).require_grad()
    }

    fn close(found: &[f32], wanted: &[f32]) {
        assert_eq!(found.len(), wanted.len());
        let largest = wanted.iter().fold(1e-3f32, |most, x| most.max(x.abs()));
        let apart =
            found.iter().zip(wanted).map(|(a, b)| (a - b).abs()).max_by(f32::total_cmp).unwrap_or(0.0);
        assert!(apart < 1e-5 * largest, "{apart} of {largest}");
    }

    /// Output and gradients, tiled and of Burn's operations.
    fn compare<const N: usize, const D: usize>(
        inputs: [Tensor<D>; N],
        rule: Rule,
        seen: impl Fn([Tensor<D>; N]) -> Seen,
    ) {
        let ours = attention(seen(inputs.clone()), rule);
        let burn = decomposed(seen(inputs.clone()), rule);
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
        let noise = Some(Stream::new(7));
        for (past, noise) in [(None, None), (Some(0), None), (None, noise), (Some(0), noise)] {
            let rule = Rule { heads: 2, first: 1, all: 4, past, rate: 0.3, noise };
            compare([tensor([2, 9, 30], 1)], rule, |[all]| Seen::Itself(all));
            let cross = [tensor([2, 9, 10], 2), tensor([2, 12, 20], 3)];
            compare(cross, rule, |[queries, others]| Seen::Other(queries, others));
        }
        let rule = Rule { heads: 3, first: 0, all: 3, past: Some(4), rate: 0.0, noise: None };
        let parts = [tensor([2, 3, 5, 8], 4), tensor([2, 3, 9, 8], 5), tensor([2, 3, 9, 8], 6)];
        compare(parts, rule, Seen::Apart);
        // Views with other strides.
        let turned = [tensor([2, 5, 3, 8], 4), tensor([2, 9, 3, 8], 5), tensor([2, 9, 3, 8], 6)];
        compare(turned, rule, |all| Seen::Apart(all.map(|x| x.swap_dims(1, 2))));
        let across = [tensor([2, 3, 8, 5], 4), tensor([2, 3, 8, 9], 5), tensor([2, 3, 8, 9], 6)];
        compare(across, rule, |all| Seen::Apart(all.map(|x| x.swap_dims(2, 3))));
    }

    #[test]
    fn another_type_takes_burns_operations() {
        let x = tensor([1, 4, 12], 1).inner();
        let rule = Rule { heads: 2, first: 0, all: 2, past: Some(0), rate: 0.0, noise: None };
        let (wanted, costs) = recording(|| attention(Seen::Itself(x.clone()), rule));
        // Queries see 1 + 2 + 3 + 4 keys.
        assert_eq!((costs[0].name, costs[0].cost.flops), ("attention", 4.0 * 2.0 * 2.0 * 10.0));
        let (found, costs) = recording(|| attention(Seen::Itself(x.cast(burn::tensor::DType::F64)), rule));
        assert!(costs.is_empty());
        close(&to_vec(found.cast(burn::tensor::DType::F32)).unwrap(), &to_vec(wanted).unwrap());
    }
}
