//! The memory that threads share, for ThreadSanitizer (`benches/tsan.sh`): nothing but groups of threads, so that most
//! of what it sees is ours. Without it, this is one more check of sums.

use regatta_comm::{Algorithm, Group, Options, ReduceOp};

/// Elements: none, one, odd, more than what is reduced in one wait, more than a slot stages.
const LENGTHS: [usize; 6] = [0, 1, 37, 4099, 70_001, 140_001];

fn each(size: usize, algorithm: Algorithm, lanes: usize, rank: impl Fn(&Group) + Sync) {
    let options = Options::default().algorithm(algorithm).lanes(lanes);
    std::thread::scope(|scope| {
        for group in Group::threads_with(size, &options).unwrap() {
            scope.spawn(|| rank(&{ group }));
        }
    });
}

fn number(rank: usize, index: usize) -> f32 {
    ((rank * 5 + index * 7) % 11) as f32
}

fn numbers(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|index| number(rank, index)).collect()
}

/// Every operation once.
fn operations(group: &Group, len: usize) {
    let (rank, size) = (group.rank(), group.size());
    let root = len % size;
    let sums = |from: usize, len: usize| -> Vec<f32> {
        (from..from + len).map(|index| (0..size).map(|rank| number(rank, index)).sum()).collect()
    };
    let all = |len: usize| -> Vec<f32> { (0..size).flat_map(|rank| numbers(rank, len)).collect() };

    let mut data = numbers(rank, len);
    group.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    assert_eq!(data, sums(0, len));
    let mut data = numbers(rank, len);
    group.reduce(&mut data, ReduceOp::Sum, root).unwrap();
    assert_eq!(data, if rank == root { sums(0, len) } else { numbers(rank, len) });
    let mut part = vec![0.0; len];
    group.reduce_scatter(&numbers(rank, len * size), &mut part, ReduceOp::Sum).unwrap();
    assert_eq!(part, sums(rank * len, len));
    let mut gathered = vec![0.0; len * size];
    group.all_gather(&numbers(rank, len), &mut gathered).unwrap();
    assert_eq!(gathered, all(len));
    let mut data = numbers(rank, len);
    group.broadcast(&mut data, root).unwrap();
    assert_eq!(data, numbers(root, len));
    let mut gathered = vec![0.0; if rank == root { len * size } else { 0 }];
    group.gather(&numbers(rank, len), &mut gathered, root).unwrap();
    assert!(rank != root || gathered == all(len));
    let mut part = vec![0.0; len];
    let whole = if rank == root { all(len) } else { vec![] };
    group.scatter(&whole, &mut part, root).unwrap();
    assert_eq!(part, numbers(rank, len));
    let mut came = vec![0.0; len * size];
    group.all_to_all(&numbers(rank, len * size), &mut came).unwrap();
    for (from, block) in (0..size).filter(|_| len > 0).zip(came.chunks(len.max(1))) {
        assert_eq!(block, &numbers(from, len * size)[rank * len..][..len]);
    }
    let counts: Vec<usize> = (0..size).map(|rank| len / (rank + 1)).collect();
    let mut gathered = vec![0.0; counts.iter().sum()];
    group.all_gather_v(&numbers(rank, counts[rank]), &mut gathered, &counts).unwrap();
    let expected: Vec<f32> = (0..size).flat_map(|rank| numbers(rank, counts[rank])).collect();
    assert_eq!(gathered, expected);
    group.barrier().unwrap();
}

#[test]
fn shared_memory() {
    for size in 2..=4 {
        each(size, Algorithm::Direct, 1, |group| {
            for len in LENGTHS {
                operations(group, len);
            }
            for round in 0..200 {
                operations(group, round % 5);
            }
        });
    }
}

#[test]
fn lanes() {
    for size in 2..=3 {
        each(size, Algorithm::Direct, 3, |group| {
            // A little over 2 MiB, from where on lanes share the work.
            let len = (2 << 18) + 7;
            for _ in 0..3 {
                let mut data = numbers(group.rank(), len);
                group.all_reduce(&mut data, ReduceOp::Sum).unwrap();
                let sum = |index| (0..size).map(|rank| number(rank, index)).sum::<f32>();
                assert!(data.iter().enumerate().all(|(index, &x)| x == sum(index)));
            }
        });
    }
}

#[test]
fn channels() {
    for algorithm in [Algorithm::Ring, Algorithm::HalvingDoubling, Algorithm::Tree, Algorithm::Bruck] {
        for size in 2..=4 {
            each(size, algorithm, 1, |group| {
                for len in LENGTHS {
                    operations(group, len);
                }
                let (next, previous) = ((group.rank() + 1) % size, (group.rank() + size - 1) % size);
                for round in 0..100 {
                    let mut came = vec![0.0; round * 13];
                    let (own, theirs) = (numbers(group.rank(), round * 13), numbers(previous, round * 13));
                    if group.rank() % 2 == 0 {
                        group.send(&own, next).unwrap();
                        group.recv(&mut came, previous).unwrap();
                    } else {
                        group.recv(&mut came, previous).unwrap();
                        group.send(&own, next).unwrap();
                    }
                    assert_eq!(came, theirs);
                }
            });
        }
    }
}
