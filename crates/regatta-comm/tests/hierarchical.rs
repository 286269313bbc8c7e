//! Operations on several hosts of any numbers of ranks, in any order, against a plain reference.

mod common;

use common::run_on;
use proptest::prelude::*;
use regatta_comm::{Algorithm, DType, Element, Group, Options, ReduceOp, TransportKind, Typed};
use std::time::Duration;

/// What all ranks do.
#[derive(Debug, Clone)]
struct Job {
    /// Of each rank.
    hosts: Vec<usize>,
    dtype: DType,
    op: ReduceOp,
    len: usize,
    /// Numbers that no sum holds exactly.
    rough: bool,
}

impl Job {
    /// The bits of what each rank has in the end.
    fn run(&self) -> Vec<Vec<u64>> {
        let options = Options::default()
            .algorithm(Algorithm::Hierarchical)
            .deadline(Duration::from_secs(30))
            .join(Duration::from_secs(30));
        let hosts: Vec<_> = self.hosts.iter().map(|&host| Some(host)).collect();
        run_on(options, TransportKind::Mixed, &hosts, |group| {
            assert_eq!(group.transport(), TransportKind::Mixed);
            self.dtype.with(Rank { job: self, group: &group })
        })
    }

    fn number(&self, rank: usize, index: usize) -> f64 {
        match self.op {
            ReduceOp::Product => [1.0, 2.0, 1.0, 1.0][(rank + 3 * index) % 4],
            _ if self.rough => ((index * 7919 + rank * 104_729) % 1000) as f64 * 1.1e-2 + rank as f64,
            _ => ((rank * 5 + index * 3) % 7) as f64,
        }
    }

    fn numbers<T: Element>(&self, rank: usize, len: usize) -> Vec<T> {
        (0..len).map(|index| T::from_f64(self.number(rank, index))).collect()
    }

    fn reduced<T: Element>(&self, index: usize) -> f64 {
        let size = self.hosts.len();
        let values = (0..size).map(|rank| T::from_f64(self.number(rank, index)).to_f64());
        match self.op {
            ReduceOp::Sum => values.sum(),
            ReduceOp::Mean if T::DTYPE.is_integer() => (values.sum::<f64>() / size as f64).trunc(),
            ReduceOp::Mean => values.sum::<f64>() / size as f64,
            ReduceOp::Min => values.fold(f64::INFINITY, f64::min),
            ReduceOp::Max => values.fold(f64::NEG_INFINITY, f64::max),
            ReduceOp::Product => values.product(),
            ReduceOp::And => values.fold(-1i64, |all, value| all & value as i64) as f64,
            ReduceOp::Or => values.fold(0i64, |all, value| all | value as i64) as f64,
            ReduceOp::Adasum => unreachable!("the hierarchical algorithm does not offer it"),
            _ => unreachable!("unknown"),
        }
    }
}

struct Rank<'a> {
    job: &'a Job,
    group: &'a Group,
}

impl Typed for Rank<'_> {
    type Output = Vec<u64>;

    fn call<T: Element>(self) -> Vec<u64> {
        let Self { job, group } = self;
        let (rank, size, len) = (group.rank(), group.size(), job.len);
        let zeros = |len: usize| vec![T::zeroed(); len];
        let check = |data: &[T], from: usize, what: &str| {
            for (index, value) in data.iter().enumerate() {
                let (value, right) = (value.to_f64(), job.reduced::<T>(from + index));
                let near = (value - right).abs() <= 0.02 * right.abs().max(1.0);
                assert!(near, "{what}: {value} is not {right}: {job:?}");
            }
        };
        let counts: Vec<usize> =
            (0..size).map(|rank| (len * 7 + 13 * rank) % (len + 1) / (rank % 3 + 1)).collect();
        let (before, total) = (counts[..rank].iter().sum::<usize>(), counts.iter().sum());

        let mut all = job.numbers::<T>(rank, len * size);
        group.all_reduce(&mut all, job.op).unwrap();
        check(&all, 0, "all_reduce");
        let mut even = zeros(len);
        group.reduce_scatter(&job.numbers::<T>(rank, len * size), &mut even, job.op).unwrap();
        check(&even, rank * len, "reduce_scatter");
        let mut uneven = zeros(counts[rank]);
        group.reduce_scatter_v(&job.numbers::<T>(rank, total), &mut uneven, &counts, job.op).unwrap();
        check(&uneven, before, "reduce_scatter_v");
        if group.hosts().len() == 2 {
            // Two hosts have one order: that of an all-reduce.
            assert_eq!(even, all[rank * len..][..len], "{job:?}");
        }

        let mut gathered = zeros(len * size);
        group.all_gather(&job.numbers::<T>(rank, len), &mut gathered).unwrap();
        let right: Vec<T> = (0..size).flat_map(|rank| job.numbers::<T>(rank, len)).collect();
        assert_eq!(gathered, right, "all_gather: {job:?}");
        let mut gathered = zeros(total);
        group.all_gather_v(&job.numbers::<T>(rank, counts[rank]), &mut gathered, &counts).unwrap();
        let right: Vec<T> = (0..size).flat_map(|rank| job.numbers::<T>(rank, counts[rank])).collect();
        assert_eq!(gathered, right, "all_gather_v: {job:?}");

        let between = |from: usize, to: usize, len: usize| job.numbers::<T>(from, to + len)[to..].to_vec();
        let mut came = zeros(len * size);
        let sent: Vec<T> = (0..size).flat_map(|to| between(rank, to, len)).collect();
        group.all_to_all(&sent, &mut came).unwrap();
        let right: Vec<T> = (0..size).flat_map(|from| between(from, rank, len)).collect();
        assert_eq!(came, right, "all_to_all: {job:?}");
        let count = |from: usize, to: usize| (len + 5 * from + 3 * to) % (len + 2);
        let sends: Vec<usize> = (0..size).map(|to| count(rank, to)).collect();
        let receives: Vec<usize> = (0..size).map(|from| count(from, rank)).collect();
        let sent: Vec<T> = (0..size).flat_map(|to| between(rank, to, sends[to])).collect();
        let mut came = zeros(receives.iter().sum());
        group.all_to_all_v(&sent, &sends, &mut came, &receives).unwrap();
        let right: Vec<T> = (0..size).flat_map(|from| between(from, rank, receives[from])).collect();
        assert_eq!(came, right, "all_to_all_v: {job:?}");

        let root = len % size;
        let mut data = job.numbers::<T>(rank, len);
        group.broadcast(&mut data, root).unwrap();
        assert_eq!(data, job.numbers::<T>(root, len), "broadcast: {job:?}");
        [all, even, uneven].iter().flatten().map(|x| x.to_f64().to_bits()).collect()
    }
}

/// Two to four hosts of one to four ranks, shuffled, of which one has two at least.
fn hosts() -> impl Strategy<Value = Vec<usize>> {
    let hosts = prop::collection::vec(1usize..=4, 2..=4)
        .prop_filter("shares no memory", |hosts| hosts.iter().any(|&ranks| ranks > 1));
    let list = |hosts: Vec<usize>| -> Vec<usize> {
        hosts.iter().enumerate().flat_map(|(host, &ranks)| vec![host; ranks]).collect()
    };
    hosts.prop_map(list).prop_flat_map(|list| prop_oneof![Just(list.clone()), Just(list).prop_shuffle()])
}

fn any_job() -> impl Strategy<Value = Job> {
    let len = prop_oneof![Just(0usize), 1usize..5, 5usize..3000];
    let types = (0..DType::ALL.len(), 0..ReduceOp::ALL.len());
    (hosts(), types, len, any::<bool>()).prop_map(|(hosts, (dtype, op), len, rough)| {
        let (dtype, op) = (DType::ALL[dtype], ReduceOp::ALL[op]);
        let op = match (op.suits(dtype) && op != ReduceOp::Adasum, dtype) {
            (true, _) => op,
            (false, DType::Bool) => ReduceOp::Or,
            (false, _) => ReduceOp::Sum,
        };
        // Sums of many such numbers are exact in no integer of eight bits.
        let rough = rough && dtype.is_float();
        Job { hosts, dtype, op, len, rough }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn any_operation_on_any_hosts(job in any_job()) {
        let (first, second) = (job.run(), job.run());
        prop_assert_eq!(first, second, "another run");
    }
}

#[test]
fn every_type_among_ranks_that_take_turns() {
    for &dtype in DType::ALL {
        for op in ReduceOp::ALL.iter().copied().filter(|op| op.suits(dtype) && *op != ReduceOp::Adasum) {
            Job { hosts: vec![0, 1, 0, 1], dtype, op, len: 101, rough: false }.run();
        }
    }
}

#[test]
fn long_data_goes_in_pieces() {
    for hosts in [vec![0, 0, 1, 1], vec![0, 1, 1, 0, 2]] {
        for (dtype, op) in
            [(DType::F32, ReduceOp::Sum), (DType::BF16, ReduceOp::Mean), (DType::I32, ReduceOp::Mean)]
        {
            let job = Job { hosts: hosts.clone(), dtype, op, len: 700_001, rough: dtype.is_float() };
            assert_eq!(job.run(), job.run());
        }
    }
}
