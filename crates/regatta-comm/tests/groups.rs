//! Groups within groups, grids with named axes, and ranks that run out of data.

mod common;

use common::{WAYS, run};
use regatta_comm::{Buffer, Error, Group, Mesh, ReduceOp, Result, TransportKind};
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(30);

#[test]
fn subgroups_are_made_by_their_members_alone() {
    for way in WAYS {
        run(way, 5, DEADLINE, |group| {
            let rank = group.rank();
            // In an order of their own, twice, and without the others.
            for _ in 0..2 {
                if [1, 3, 4].contains(&rank) {
                    let part = group.subgroup(&[4, 1, 3]).unwrap();
                    assert_eq!((part.members(), part.size()), ([4, 1, 3].as_slice(), 3));
                    let mut order = [0i32; 3];
                    part.all_gather(&[rank as i32], &mut order).unwrap();
                    assert_eq!(order, [4, 1, 3]);
                    // A group of a group.
                    if part.rank() < 2 {
                        let pair = part.subgroup(&[0, 1]).unwrap();
                        assert_eq!(pair.members(), [4, 1]);
                        pair.barrier().unwrap();
                    }
                }
            }
            for bad in [[0, 0].as_slice(), &[7], &[(rank + 1) % 5]] {
                assert!(matches!(group.subgroup(bad), Err(Error::Usage(_))), "{bad:?}");
            }
            group.barrier().unwrap();
        });
    }
}

#[test]
fn overlapping_groups_work_at_the_same_time() {
    for way in WAYS {
        run(way, 3, DEADLINE, |group| {
            // Pairs (0,1), (1,2), (2,0): every rank is in two, with handles open in both and in the whole.
            let rank = group.rank();
            let mut pairs = vec![];
            for pair in [[0, 1], [1, 2], [2, 0]] {
                if pair.contains(&rank) {
                    pairs.push((pair, group.subgroup(&pair).unwrap()));
                }
            }
            let number = |rank: usize| rank as f32 + 1.0;
            for round in 0..20 {
                let len = 1 + round * 5000;
                let all = group.all_reduce_async(Buffer::from(vec![number(rank); len]), ReduceOp::Sum);
                let sums: Vec<_> = pairs
                    .iter()
                    .map(|(_, pair)| {
                        pair.all_reduce_async(Buffer::from(vec![number(rank); len]), ReduceOp::Sum)
                    })
                    .collect();
                for (sum, (pair, _)) in sums.into_iter().zip(&pairs) {
                    let expected = number(pair[0]) + number(pair[1]);
                    assert!(sum.wait().unwrap().iter().all(|&x| x == expected));
                }
                assert!(all.wait().unwrap().iter().all(|&x| x == 6.0));
            }
        });
    }
}

#[test]
fn a_mesh_gives_a_group_for_each_axis() {
    for way in WAYS {
        run(way, 8, DEADLINE, |group| {
            let mesh = Mesh::new(&group, &[("data", 2), ("pipe", 2), ("tensor", 2)]).unwrap();
            let rank = group.rank();
            let place = [rank / 4, rank / 2 % 2, rank % 2];
            for (axis, at) in ["data", "pipe", "tensor"].iter().zip(place) {
                assert_eq!(mesh.coordinate(axis).unwrap(), at);
                assert_eq!(mesh.axis(axis).unwrap().rank(), at);
            }
            assert_eq!(mesh.axis("data").unwrap().members(), [rank % 4, rank % 4 + 4]);
            let plane = mesh.over(&["data", "tensor"]).unwrap();
            assert_eq!(plane.size(), 4);
            let mut sum = [rank as i64];
            plane.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
            assert_eq!(sum[0] as usize, 2 * (place[1] * 2) + 2 * (place[1] * 2 + 4) + 2);
            assert!(mesh.axis("expert").unwrap_err().to_string().contains("it has data, pipe, tensor"));
            let error = Mesh::new(&group, &[("data", 3), ("tensor", 2)]).unwrap_err().to_string();
            assert!(error.contains("data=3,tensor=2") && error.contains("8 ranks"), "{error}");
            assert!(Mesh::new(&group, &[("a", 2), ("a", 4)]).is_err());
        });
    }
}

/// Sums over `mine` batches, then joins.
fn uneven(group: &Group, mine: usize) -> Result<(Vec<f32>, usize)> {
    let mut sums = vec![];
    for batch in 0..mine {
        let mut sum = vec![1.0f32; 1 + batch * 30_000];
        group.all_reduce(&mut sum, ReduceOp::Sum)?;
        assert!(sum.iter().all(|&x| x == sum[0]));
        let mut least = [batch as i32];
        group.all_reduce(&mut least, ReduceOp::Min)?;
        assert_eq!(least, [batch as i32]);
        let mut weight = [2.0f64];
        group.all_reduce(&mut weight, ReduceOp::Product.scaled_after(1.0))?;
        let mut part = [0.0f32];
        group.reduce_scatter(&vec![1.0; group.size()], &mut part, ReduceOp::Sum)?;
        assert_eq!(part[0], sum[0]);
        group.barrier()?;
        sums.push(sum[0]);
    }
    Ok((sums, group.join()?))
}

#[test]
fn ranks_that_run_out_of_data_join() {
    for way in WAYS {
        let results = run(way, 4, DEADLINE, |group| {
            let first = uneven(&group, [3, 1, 5, 3][group.rank()]).unwrap();
            // Afterwards all goes on as before, and a second time.
            let second = uneven(&group, [0, 2, 1, 0][group.rank()]).unwrap();
            let mut sum = [1.0f32];
            group.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
            assert_eq!(sum, [4.0]);
            (first, second)
        });
        for (rank, ((first, last), (second, second_last))) in results.into_iter().enumerate() {
            assert_eq!(first, [4.0, 3.0, 3.0, 1.0, 1.0][..[3, 1, 5, 3][rank]], "{way:?}");
            assert_eq!(last, 2, "{way:?}");
            assert_eq!((second.as_slice(), second_last), (&[2.0, 1.0][..[0, 2, 1, 0][rank]], 1), "{way:?}");
        }
    }
}

#[test]
fn a_broadcast_from_a_joined_rank_is_an_error_for_all() {
    for way in WAYS {
        let errors = run(way, 3, Duration::from_secs(10), |group| match group.rank() {
            0 => group.join().unwrap_err().to_string(),
            // Its root sends nothing: over streams the others wait for it.
            _ => group.broadcast(&mut [1.0f32; 10], 0).unwrap_err().to_string(),
        });
        assert!(
            errors
                .iter()
                .all(|error| error.contains("rank 0 has joined") && error.contains("broadcast #2 f32[10]")),
            "{way:?}: {errors:?}"
        );
    }
}

#[test]
fn a_solo_group_needs_nobody() {
    let group = Group::solo();
    assert_eq!((group.join().unwrap(), group.transport()), (0, TransportKind::Thread));
    let mesh = Mesh::new(&group, &[("data", 1)]).unwrap();
    let mut out = [0u8; 3];
    mesh.axis("data").unwrap().all_to_all(&[1, 2, 3], &mut out).unwrap();
    assert_eq!(out, [1, 2, 3]);
    group.scatter(&[7u8, 8, 9], &mut out, 0).unwrap();
    assert_eq!(out, [7, 8, 9]);
    let mut mean = [3.0f32];
    group.all_reduce(&mut mean, ReduceOp::Mean.scaled_before(2.0)).unwrap();
    assert_eq!(mean, [6.0]);
}
