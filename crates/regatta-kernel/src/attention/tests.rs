use super::*;
use proptest::prelude::*;

/// Attention computed from the definition, in f64, with operands `[batch, heads, time, width]`.
struct Reference<'a> {
    sizes: Attention<'a>,
    queries: Vec<f64>,
    keys: Vec<f64>,
    values: Vec<f64>,
}

impl Reference<'_> {
    /// The softmax of a query's scores, and the dropout factors of the weights.
    fn weights(&self, pair: usize, i: usize) -> (Vec<f64>, Vec<f64>) {
        let Attention { heads, time, seen, width, .. } = self.sizes;
        let query = &self.queries[(pair * time + i) * width..][..width];
        let mut scores: Vec<f64> = (0..seen)
            .map(|j| {
                let hidden = self.sizes.hidden.is_some_and(|hidden| hidden[i * seen + j])
                    || self.sizes.past.is_some_and(|past| j > past + i);
                let key = &self.keys[(pair * seen + j) * width..][..width];
                let product: f64 = query.iter().zip(key).map(|(a, b)| a * b).sum();
                if hidden { f64::NEG_INFINITY } else { product / (width as f64).sqrt() }
            })
            .collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        scores
            .iter_mut()
            .for_each(|score| *score = if largest.is_finite() { (*score - largest).exp() } else { 0.0 });
        let sum: f64 = scores.iter().sum();
        scores.iter_mut().for_each(|score| *score /= if sum > 0.0 { sum } else { 1.0 });
        let factors = (0..seen).map(|j| {
            let Some(dropout) = self.sizes.dropout else { return 1.0 };
            let head = dropout.rows.sample(pair / heads) * dropout.all + dropout.first + pair % heads;
            let uniform = dropout.stream.uniform(((head * time + i) * seen + j) as u64);
            if uniform < dropout.rate as f32 { 0.0 } else { 1.0 / (1.0 - dropout.rate) }
        });
        (scores, factors.collect())
    }

    fn output(&self) -> Vec<f64> {
        let Attention { batch, heads, time, seen, width, .. } = self.sizes;
        let mut output = vec![0.0; batch * heads * time * width];
        for pair in 0..batch * heads {
            for i in 0..time {
                let (weights, factors) = self.weights(pair, i);
                for j in 0..seen {
                    let value = &self.values[(pair * seen + j) * width..][..width];
                    let out = &mut output[(pair * time + i) * width..][..width];
                    out.iter_mut().zip(value).for_each(|(out, v)| *out += weights[j] * factors[j] * v);
                }
            }
        }
        output
    }

    fn gradients(&self, gradient: &[f64]) -> [Vec<f64>; 3] {
        let Attention { batch, heads, time, seen, width, .. } = self.sizes;
        let mut of_queries = vec![0.0; self.queries.len()];
        let (mut of_keys, mut of_values) = (vec![0.0; self.keys.len()], vec![0.0; self.values.len()]);
        for pair in 0..batch * heads {
            for i in 0..time {
                let (weights, factors) = self.weights(pair, i);
                let query = (pair * time + i) * width;
                let of_weights: Vec<f64> = (0..seen)
                    .map(|j| {
                        let value = (pair * seen + j) * width;
                        (0..width).map(|d| gradient[query + d] * self.values[value + d]).sum::<f64>()
                            * factors[j]
                    })
                    .collect();
                let mean: f64 = of_weights.iter().zip(&weights).map(|(a, b)| a * b).sum();
                for j in 0..seen {
                    let key = (pair * seen + j) * width;
                    let of_score = weights[j] * (of_weights[j] - mean) / (width as f64).sqrt();
                    for d in 0..width {
                        of_values[key + d] += weights[j] * factors[j] * gradient[query + d];
                        of_queries[query + d] += of_score * self.keys[key + d];
                        of_keys[key + d] += of_score * self.queries[query + d];
                    }
                }
            }
        }
        [of_queries, of_keys, of_values]
    }
}

fn to_f64(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

fn largest(values: &[f64]) -> f64 {
    values.iter().map(|x| x.abs()).max_by(f64::total_cmp).unwrap_or(0.0)
}

/// The largest difference, divided by the largest expected value or by `least` if that is larger. Values that cancel
/// out to nearly 0 have no precise digits.
fn error(found: &[f64], expected: &[f64], least: f64) -> f64 {
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().all(|x| x.is_finite()));
    let differences: Vec<f64> = found.iter().zip(expected).map(|(a, b)| a - b).collect();
    largest(&differences) / largest(expected).max(least)
}

/// The elements of a tensor with these strides, in the order `[batch, head, time, width]`.
fn gather(sizes: &Attention<'_>, values: &[f32], begin: usize, strides: Strides, time: usize) -> Vec<f64> {
    let mut all = vec![];
    for batch in 0..sizes.batch {
        for head in 0..sizes.heads {
            for i in 0..time {
                let row = begin + batch * strides.batch + head * strides.head + i * strides.time;
                all.extend(to_f64(&values[row..row + sizes.width]));
            }
        }
    }
    all
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Fused,
    Cross,
    Apart,
}

/// Index of the operand, start in it, strides and number of times.
type Place = (usize, usize, Strides, usize);

/// Random operands in one of the layouts, and the places of queries, keys and values in them.
fn operands(sizes: &Attention<'_>, kind: Kind, seed: u64, scale: f32) -> (Vec<Vec<f32>>, [Place; 3]) {
    let Attention { batch, heads, time, seen, width, .. } = *sizes;
    let row = heads * width;
    let stream = Stream::new(seed);
    match kind {
        Kind::Fused => {
            let strides = Strides::projected(time, 3, heads, width);
            let all = stream.normal(batch * time * 3 * row, scale);
            (vec![all], [0, 1, 2].map(|part| (0, part * row, strides, time)))
        }
        Kind::Cross => {
            let queries = stream.at(0).normal(batch * time * row, scale);
            let others = stream.at(1).normal(batch * seen * 2 * row, scale);
            let strides = Strides::projected(seen, 2, heads, width);
            let first = (0, 0, Strides::projected(time, 1, heads, width), time);
            (vec![queries, others], [first, (1, 0, strides, seen), (1, row, strides, seen)])
        }
        Kind::Apart => {
            let parts = [time, seen, seen].map(|time| (Strides::apart(heads, time, width), time));
            let mut values = vec![];
            let mut i = 0;
            let places = parts.map(|(strides, time)| {
                values.push(stream.at(i as u64).normal(batch * time * row, scale));
                i += 1;
                (i - 1, 0, strides, time)
            });
            (values, places)
        }
    }
}

/// Compares forward and backward with the definition.
fn compare(unit: impl Unit, sizes: Attention<'_>, kind: Kind, seed: u64, scale: f32) {
    let (values, places) = operands(&sizes, kind, seed, scale);
    let given = match kind {
        Kind::Fused => Operands::Fused(&values[0]),
        Kind::Cross => Operands::Cross(&values[0], &values[1]),
        Kind::Apart => {
            Operands::Apart(places.map(|(of, begin, strides, _)| View::new(&values[of][begin..], strides)))
        }
    };
    let part = |of: usize, all: &[Vec<f32>]| {
        let (operand, begin, strides, time) = places[of];
        gather(&sizes, &all[operand], begin, strides, time)
    };
    let reference =
        Reference { sizes, queries: part(0, &values), keys: part(1, &values), values: part(2, &values) };
    let (output, sums) = sizes.forward_on(unit, &given);
    let strides = sizes.output_strides();
    let found = gather(&sizes, &output, 0, strides, sizes.time);
    let off = error(&found, &reference.output(), 1e-3);
    assert!(off < 1e-5, "output: {off:e} {sizes:?}");
    let gradient = Stream::new(seed + 1).normal(output.len(), 1.0);
    let found = sizes.backward_on(unit, &given, [&output, &sums, &gradient]);
    let expected = reference.gradients(&gather(&sizes, &gradient, 0, strides, sizes.time));
    let least = 0.1 * expected.iter().map(|expected| largest(expected)).fold(1e-3, f64::max);
    for (of, expected) in expected.iter().enumerate() {
        let off = error(&part(of, &found), expected, least);
        assert!(off < 1e-5, "gradient {of}: {off:e} {sizes:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn agrees_with_the_definition_in_f64(
        (batch, heads, width) in (1usize..3, 1usize..4, 1usize..97),
        (time, more) in (1usize..200, 0usize..150),
        kind in prop::sample::select(vec![Kind::Fused, Kind::Cross, Kind::Apart]),
        (causal, dropped, masked) in (any::<bool>(), any::<bool>(), any::<bool>()),
        seed in any::<u32>(),
    ) {
        let seen = if kind == Kind::Fused { time } else { time + more };
        let stream = Stream::new(u64::from(seed));
        let mask: Vec<bool> = (0..(time * seen) as u64).map(|i| stream.uniform(i) < 0.3).collect();
        let rows = SampleRows { first: 3, stride: 2 };
        let dropout = Dropout { stream, rows, rate: 0.2, first: 1, all: heads + 2 };
        let sizes = Attention {
            batch, heads, time, seen, width,
            past: causal.then_some(seen - time),
            hidden: masked.then_some(&mask),
            dropout: dropped.then_some(dropout),
        };
        compare(Arch::new(), sizes, kind, u64::from(seed), 1.0);
    }
}

/// A vector unit that may not be the best of the machine.
#[derive(Clone, Copy)]
struct Only<S>(S);

impl<S: pulp::Simd> Unit for Only<S> {
    fn run(self, work: impl WithSimd<Output = ()>) {
        self.0.vectorize(work);
    }
}

fn causal(batch: usize, heads: usize, time: usize, width: usize) -> Attention<'static> {
    Attention { batch, heads, time, seen: time, width, past: Some(0), hidden: None, dropout: None }
}

#[test]
fn every_vector_unit_agrees() {
    let dropout = Dropout { stream: Stream::new(4), rows: SampleRows::ALL, rate: 0.1, first: 0, all: 2 };
    for dropout in [None, Some(dropout)] {
        for (time, past, width) in [(70, Some(0), 32), (131, Some(3), 7), (64, None, 40)] {
            let seen = time + past.unwrap_or(0);
            let sizes = Attention { seen, past, dropout, ..causal(1, 2, time, width) };
            compare(Only(pulp::Scalar::new()), sizes, Kind::Apart, 1, 1.0);
            #[cfg(target_arch = "x86_64")]
            {
                use pulp::x86::{V3, V4};
                V3::try_new().into_iter().for_each(|unit| compare(Only(unit), sizes, Kind::Apart, 1, 1.0));
                V4::try_new().into_iter().for_each(|unit| compare(Only(unit), sizes, Kind::Apart, 1, 1.0));
            }
        }
    }
}

/// The scores differ so much that each query needs its own maximum, and later blocks of keys raise it.
#[test]
fn large_scores_neither_overflow_nor_vanish() {
    let time = 300;
    let mut all = Stream::new(5).normal(3 * time * 8, 2.0);
    for (i, row) in all.chunks_exact_mut(24).enumerate() {
        // Growing keys give scores of both signs, up to hundreds.
        row[8..16].iter_mut().for_each(|key| *key *= 0.3 * i as f32);
    }
    let sizes = causal(1, 1, time, 8);
    let (output, sums) = sizes.forward(&Operands::Fused(&all));
    let strides = Strides::projected(time, 3, 1, 8);
    let part = |begin| gather(&sizes, &all, begin, strides, time);
    let reference = Reference { sizes, queries: part(0), keys: part(8), values: part(16) };
    // With scores in the hundreds, exponentials have three digits less.
    assert!(error(&to_f64(&output), &reference.output(), 1.0) < 1e-3);
    let gradients = sizes.backward(&Operands::Fused(&all), [&output, &sums, &output]);
    assert!(gradients[0].iter().all(|x| x.is_finite()));
}

#[test]
fn queries_without_keys_have_zero_output_and_gradient() {
    let time = 5;
    let hidden: Vec<bool> = (0..time * time).map(|i| i / time == 2).collect();
    let sizes = Attention { hidden: Some(&hidden), ..causal(1, 1, time, 4) };
    let all = Stream::new(1).normal(time * 12, 1.0);
    let (output, sums) = sizes.forward(&Operands::Fused(&all));
    assert_eq!(output[8..12], [0.0; 4]);
    let gradient = sizes.backward(&Operands::Fused(&all), [&output, &sums, &[1.0; 20]]);
    assert_eq!(gradient[0][24..28], [0.0; 4]);
    assert!(gradient[0].iter().all(|x| x.is_finite()));
}

/// A NaN in a key makes the output NaN for the queries that see the key, and for no others.
#[test]
fn nan_is_propagated() {
    let time = 40;
    let mut all = Stream::new(1).normal(time * 24, 1.0);
    all[20 * 24 + 8] = f32::NAN;
    let (output, _) = causal(1, 1, time, 8).forward(&Operands::Fused(&all));
    assert!(output[..20 * 8].iter().all(|x| x.is_finite()));
    assert!(output[20 * 8..].iter().all(|x| x.is_nan()));
}

#[test]
fn the_result_does_not_depend_on_the_threads() {
    let sizes = causal(3, 2, 100, 32);
    let all = Stream::new(1).normal(3 * 100 * 3 * 64, 1.0);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (output, sums) = sizes.forward(&Operands::Fused(&all));
            let gradients = sizes.backward(&Operands::Fused(&all), [&output, &sums, &output]);
            (output, sums, gradients)
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn empty_operands_give_empty_results() {
    for (batch, time) in [(0, 5), (2, 0)] {
        let sizes = causal(batch, 2, time, 8);
        let (output, sums) = sizes.forward(&Operands::Fused(&[]));
        assert!(output.is_empty() && sums.is_empty());
        assert_eq!(sizes.backward(&Operands::Fused(&[]), [&[], &[], &[]]), [vec![]]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]
    /// The gradients of `sum(output * direction)`, of the kernel and of the definition, against central differences
    /// of the definition in f64.
    #[test]
    fn gradients_agree_with_finite_differences(
        time in 1usize..6, more in 0usize..4, width in 1usize..6, seed in any::<u32>(),
    ) {
        let stream = Stream::new(u64::from(seed));
        let dropout = Dropout { stream, rows: SampleRows::ALL, rate: 0.3, first: 0, all: 2 };
        let seen = time + more;
        let sizes = Attention { seen, past: Some(more), dropout: Some(dropout), ..causal(1, 2, time, width) };
        let (values, places) = operands(&sizes, Kind::Apart, u64::from(seed), 1.0);
        let direction = stream.at(7).normal(2 * time * width, 1.0);
        let part = |of: usize| to_f64(&values[of]);
        let mut reference = Reference { sizes, queries: part(0), keys: part(1), values: part(2) };
        // The output of the kernel has another layout than that of the definition.
        let weights = gather(&sizes, &direction, 0, sizes.output_strides(), time);
        let expected = reference.gradients(&weights);
        let given = Operands::Apart(places.map(|(of, _, strides, _)| View::new(&values[of], strides)));
        let (output, sums) = sizes.forward(&given);
        let found = sizes.backward(&given, [&output, &sums, &direction]);
        for of in 0..3 {
            for i in 0..values[of].len() {
                let mut loss = |by: f64| {
                    let operands = [&mut reference.queries, &mut reference.keys, &mut reference.values];
                    operands.into_iter().nth(of).unwrap()[i] += by;
                    let sum: f64 = reference.output().iter().zip(&weights).map(|(a, b)| a * b).sum();
                    let operands = [&mut reference.queries, &mut reference.keys, &mut reference.values];
                    operands.into_iter().nth(of).unwrap()[i] -= by;
                    sum
                };
                let step = 1e-5;
                let difference = (loss(step) - loss(-step)) / (2.0 * step);
                prop_assert!((difference - expected[of][i]).abs() < 1e-7 * (1.0 + difference.abs()));
                prop_assert!((difference - f64::from(found[of][i])).abs() < 2e-5 * (1.0 + difference.abs()));
            }
        }
    }
}
