use super::*;
use proptest::prelude::*;

/// Attention as it is defined, in f64, on operands `[batch, heads, time, width]`.
struct Plain<'a> {
    sizes: Attention<'a>,
    queries: Vec<f64>,
    keys: Vec<f64>,
    values: Vec<f64>,
}

impl Plain<'_> {
    /// Softmax of a query's scores, and the factors of dropout.
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
            let head = (pair / heads) * dropout.all + dropout.first + pair % heads;
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

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |most: f64, x| most.max(x.abs()))
}

/// The largest difference over the largest number, which is at least `least`: where all cancels out no digit is left.
fn error(found: &[f64], wanted: &[f64], least: f64) -> f64 {
    assert_eq!(found.len(), wanted.len());
    assert!(found.iter().all(|x| x.is_finite()));
    let differences: Vec<f64> = found.iter().zip(wanted).map(|(a, b)| a - b).collect();
    largest(&differences) / largest(wanted).max(least)
}

/// Element `[batch, head, time, d]` of a tensor with these strides.
fn gather(sizes: &Attention<'_>, values: &[f32], begin: usize, strides: Strides, time: usize) -> Vec<f64> {
    let mut all = vec![];
    for batch in 0..sizes.batch {
        for head in 0..sizes.heads {
            for i in 0..time {
                let row = begin + batch * strides.batch + head * strides.head + i * strides.time;
                all.extend(wide(&values[row..row + sizes.width]));
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

/// Operand, beginning, distances and times of a part.
type Place = (usize, usize, Strides, usize);

/// Random operands in one of the layouts, and where queries, keys and values lie.
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

/// Forward and backward against the definition.
fn compare(sizes: Attention<'_>, kind: Kind, seed: u64, scale: f32) {
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
    let plain = Plain { sizes, queries: part(0, &values), keys: part(1, &values), values: part(2, &values) };
    let (output, sums) = sizes.forward(&given);
    let beside = sizes.side_by_side();
    let found = gather(&sizes, &output, 0, beside, sizes.time);
    let off = error(&found, &plain.output(), 1e-3);
    assert!(off < 1e-5, "output: {off:e} {sizes:?}");
    let gradient = Stream::new(seed + 1).normal(output.len(), 1.0);
    let found = sizes.backward(&given, [&output, &sums, &gradient]);
    let wanted = plain.gradients(&gather(&sizes, &gradient, 0, beside, sizes.time));
    let least = 0.1 * wanted.iter().map(|wanted| largest(wanted)).fold(1e-3, f64::max);
    for (of, wanted) in wanted.iter().enumerate() {
        let off = error(&part(of, &found), wanted, least);
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
        let dropout = Dropout { stream, rate: 0.2, first: 1, all: heads + 2 };
        let sizes = Attention {
            batch, heads, time, seen, width,
            past: causal.then_some(seen - time),
            hidden: masked.then_some(&mask),
            dropout: dropped.then_some(dropout),
        };
        compare(sizes, kind, u64::from(seed), 1.0);
    }
}
