use super::*;
use crate::params::PlacedParam;
use proptest::prelude::*;
use regatta_kernel::random::Stream;
use regatta_plan::{AxisSet, Dim, TensorSpec};

fn param(path: &str, shape: &[usize]) -> PlacedParam {
    let dims =
        shape.iter().enumerate().map(|(index, &size)| Dim { name: format!("d{index}"), size }).collect();
    PlacedParam {
        spec: TensorSpec { path: path.into(), dims, shape: shape.to_vec() },
        ranges: shape.iter().map(|&size| 0..size).collect(),
        blocks: vec![0],
        split_over: AxisSet::NONE,
        partial_over: AxisSet::NONE,
        statistic: false,
    }
}

/// A unit of matrices and vectors, of which the last matrix is too small for factors.
fn units() -> Units {
    let shapes: [&[usize]; 5] = [&[40, 24], &[40], &[3, 3, 8, 16], &[5], &[2, 3]];
    let params = shapes.iter().enumerate().map(|(index, shape)| param(&format!("p{index}"), shape)).collect();
    in_one_unit(params)
}

fn in_one_unit(params: Vec<PlacedParam>) -> Units {
    let chunks: Vec<_> = std::iter::once(0..1).collect();
    Units::new(params, &chunks, 1 << 20, 1)
}

fn compress(kind: CompressKind) -> Compress {
    Compress { kind, millionths: 50_000, rank: 2, momentum: 0, warm_up: 0, ..Compress::default() }
}

/// What `worker` has as the gradient at `step`.
fn gradient(units: &Units, worker: usize, step: u64) -> Vec<f32> {
    let mut all = vec![0.0; units.units[0].len];
    let shapes = units.shapes(0);
    for range in shapes.matrices.into_iter().map(|(range, _)| range).chain(shapes.vectors) {
        let stream = Stream::new(3).at(worker as u64).at(step).at(range.start as u64);
        stream.fill_normal(0, 1.0 + range.start as f32 / 500.0, &mut all[range]);
    }
    all
}

/// Runs `work` on each of `workers` threads, and returns what all return.
fn on_all<R: Send>(workers: usize, work: impl Fn(Group) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let ranks: Vec<_> =
            Group::threads(workers).into_iter().map(|group| scope.spawn(|| work(group))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn exchange_one(exchange: &mut CompressedExchange, step: u64, gradients: &[f32]) -> Vec<f32> {
    exchange.begin(step);
    let mut buffer = exchange.buffer(0).unwrap();
    buffer.copy_from_slice(gradients);
    exchange.push(0, buffer).unwrap();
    exchange.finish().unwrap();
    exchange.combined(0).unwrap().to_vec()
}

fn kinds() -> impl Iterator<Item = CompressKind> {
    CompressKind::ALL.into_iter().filter(|kind| *kind != CompressKind::None)
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn nothing_is_lost_and_all_workers_have_the_same_bits() {
    const STEPS: u64 = 12;
    let units = units();
    for kind in kinds() {
        for workers in [2, 3, 5] {
            let outcomes = on_all(workers, |group| {
                let rank = group.rank();
                let mut exchange = CompressedExchange::new(group, &units, compress(kind)).unwrap();
                let mut sum = vec![0.0f32; units.units[0].len];
                let mut bits = vec![];
                for step in 0..STEPS {
                    let mean = exchange_one(&mut exchange, step, &gradient(&units, rank, step));
                    sum.iter_mut().zip(&mean).for_each(|(sum, x)| *sum += x);
                    bits.extend(mean.iter().map(|x| x.to_bits()));
                }
                let mut unsent = |name: &str| -> Vec<f32> {
                    let mut exchange_state = exchange.state();
                    let found = exchange_state.iter_mut().find(|state| state.name == name);
                    found.map_or(vec![0.0; sum.len()], |state| state.units[0].to_vec())
                };
                (bits, unsent("unsent"), unsent("unsent-mean"), sum)
            });
            let mut expected = vec![0.0f32; units.units[0].len];
            let mut sent = outcomes[0].3.clone();
            for (worker, (bits, unsent, unsent_mean, _)) in outcomes.iter().enumerate() {
                assert!(*bits == outcomes[0].0, "{kind} on {workers}: worker {worker} has other bits");
                for step in 0..STEPS {
                    let own = gradient(&units, worker, step);
                    expected.iter_mut().zip(own).for_each(|(sum, x)| *sum += x / workers as f32);
                }
                for ((sent, unsent), mean) in sent.iter_mut().zip(unsent).zip(unsent_mean) {
                    *sent += unsent / workers as f32 + mean;
                }
            }
            let (lost, all) = (distance(&sent, &expected), distance(&expected, &vec![0.0; expected.len()]));
            // Those that keep nothing are right on average.
            let bound = match kind {
                CompressKind::Bf16 => 5e-3,
                CompressKind::F16 => 1e-3,
                CompressKind::Int8 => 2e-2,
                CompressKind::Int4 => 0.3,
                _ => 1e-5,
            };
            assert!(lost < bound * all, "{kind} on {workers}: {lost} of {all} is lost");
            let vectors = units.shapes(0).vectors;
            let of_vectors = |all: &[f32]| -> Vec<f32> {
                vectors.iter().flat_map(|range| all[range.clone()].to_vec()).collect()
            };
            let lost = distance(&of_vectors(&outcomes[0].3), &of_vectors(&expected));
            assert!(lost < 1e-4, "{kind} on {workers}: vectors are off by {lost}");
        }
    }
}

#[test]
fn everything_sent_is_the_plain_mean() {
    let units = units();
    let whole = [CompressKind::Topk, CompressKind::Randomk, CompressKind::Dgc];
    for kind in whole {
        let compress = Compress { millionths: 1_000_000, ..compress(kind) };
        let means = on_all(3, |group| {
            let rank = group.rank();
            let mut exchange = CompressedExchange::new(group, &units, compress).unwrap();
            exchange_one(&mut exchange, 0, &gradient(&units, rank, 0))
        });
        let mut plain = vec![0.0; units.units[0].len];
        for worker in 0..3 {
            plain.iter_mut().zip(gradient(&units, worker, 0)).for_each(|(sum, x)| *sum += x / 3.0);
        }
        assert!(distance(&means[0], &plain) < 1e-4, "{kind}");
    }
}

/// Two steps, then the state into another exchange, which goes on with the same bits.
#[test]
fn what_is_kept_is_all_that_is_needed_to_go_on() {
    let units = units();
    for kind in kinds() {
        let compress = Compress { momentum: 900_000, warm_up: 3, ..compress(kind) };
        on_all(2, |group| {
            let rank = group.rank();
            let mut exchange = CompressedExchange::new(group.clone(), &units, compress).unwrap();
            for step in 0..2 {
                exchange_one(&mut exchange, step, &gradient(&units, rank, step));
            }
            let kept: Vec<Vec<f32>> = exchange.state().iter().map(|state| state.units[0].to_vec()).collect();
            let undisturbed = exchange_one(&mut exchange, 2, &gradient(&units, rank, 2));
            drop(exchange);
            let mut resumed = CompressedExchange::new(group, &units, compress).unwrap();
            for (state, kept) in resumed.state().iter_mut().zip(&kept) {
                state.units[0].copy_from_slice(kept);
            }
            let again = exchange_one(&mut resumed, 2, &gradient(&units, rank, 2));
            assert!(again.iter().zip(&undisturbed).all(|(a, b)| a.to_bits() == b.to_bits()), "{kind}");
        });
    }
}

/// Gradient descent on a mean of quadratics, one a worker, whose minimum none of them has. With error feedback it converges at
/// the rate of the problem to a neighbourhood of the minimum that is proportional to the step (Stich & Karimireddy 2020, "The
/// Error-Feedback Framework"); rounding that keeps no error has one, too.
#[test]
fn descent_comes_as_near_to_the_minimum_as_its_step() {
    let units = units();
    let len = units.units[0].len;
    let (workers, steps) = (3, 1000);
    let minimum = |worker: usize| gradient(&units, worker, 99);
    let mut mean = vec![0.0; len];
    for worker in 0..workers {
        mean.iter_mut().zip(minimum(worker)).for_each(|(sum, x)| *sum += x / workers as f32);
    }
    for kind in kinds() {
        let outcomes = on_all(workers, |group| {
            let own = minimum(group.rank());
            let mut exchange = CompressedExchange::new(group, &units, compress(kind)).unwrap();
            let mut x = vec![0.0f32; len];
            let mut distances = vec![];
            for step in 0..steps {
                let gradient: Vec<f32> = x.iter().zip(&own).map(|(x, own)| x - own).collect();
                let direction = exchange_one(&mut exchange, step, &gradient);
                let rate = if step < steps / 2 { 0.04 } else { 0.008 };
                x.iter_mut().zip(direction).for_each(|(x, g)| *x -= rate * g);
                distances.push(distance(&x, &mean));
            }
            distances
        });
        let begun = distance(&mean, &vec![0.0; len]);
        let [middle, end] =
            [steps as usize / 2 - 1, steps as usize - 1].map(|step| outcomes[0][step] / begun);
        assert!(middle < 0.3, "{kind}: {middle} of the way is left");
        // A fifth of the step; what rounds the mean to 16 bits has a floor of its own.
        let floor = if kind.kept() == 0 { 0.003 } else { 1e-4 };
        assert!(end < 0.5 * middle + floor, "{kind}: {middle} of the way is left, then {end}");
    }
}

#[test]
fn what_is_not_finite_reaches_all_workers() {
    let units = units();
    for kind in kinds() {
        for at in [7, 960 + 3] {
            let means = on_all(2, |group| {
                let mut own = gradient(&units, group.rank(), 0);
                if group.rank() == 1 {
                    own[at] = f32::NAN;
                }
                let mut exchange = CompressedExchange::new(group, &units, compress(kind)).unwrap();
                exchange_one(&mut exchange, 0, &own)
            });
            assert!(means.iter().all(|mean| mean.iter().any(|x| !x.is_finite())), "{kind} at {at}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_shapes_are_exchanged(
        shapes in prop::collection::vec(prop::collection::vec(1usize..9, 1..4), 1..5),
        kind in prop::sample::select(kinds().collect::<Vec<_>>()),
        workers in 2usize..5,
        rank in 1usize..4,
        millionths in 1u32..1_000_000,
    ) {
        let params = shapes.iter().enumerate().map(|(index, shape)| param(&format!("p{index}"), shape)).collect();
        let units = in_one_unit(params);
        let compress = Compress { kind, rank, millionths, ..compress(kind) };
        let means = on_all(workers, |group| {
            let worker = group.rank();
            let mut exchange = CompressedExchange::new(group, &units, compress).unwrap();
            (0..3).map(|step| exchange_one(&mut exchange, step, &gradient(&units, worker, step))).collect::<Vec<_>>()
        });
        prop_assert!(means.iter().all(|mean| *mean == means[0]));
    }
}
