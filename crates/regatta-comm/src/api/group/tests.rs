//! Registered memory belongs to the job: a buffer is in place for every group of the host's ranks.

use super::*;
use crate::numbers::element::ReduceOp;
use crate::rendezvous::{Security, StoreServer};
use crate::transport::registered::Registered;

const LEN: usize = 100_003;

/// Adds the buffers of the group's ranks; each begins with `number` at its rank of the job.
fn sums_in_place(group: &Group, buffer: &mut Buffer<f32>, number: impl Fn(usize) -> f32) {
    let memory = group.core().memory.as_ref().unwrap();
    assert!(memory.place(bytemuck::cast_slice(buffer)).is_some(), "{group:?}");
    buffer.fill(number(group.members()[group.rank()]));
    group.all_reduce(buffer, ReduceOp::Sum).unwrap();
    let sum: f32 = group.members().iter().map(|&rank| number(rank)).sum();
    assert!(buffer.iter().all(|&x| x == sum), "{group:?}");
}

#[test]
fn a_buffer_is_in_place_for_all_groups_of_the_job() {
    let server = StoreServer::start("127.0.0.1:0", 4, &Security::default()).unwrap();
    let address = server.addr().to_string();
    std::thread::scope(|scope| {
        for rank in 0..4 {
            let world = World::local(rank, 4, &address);
            scope.spawn(move || {
                let options = Options::default().transport(TransportKind::Shm);
                let group = Group::connect(&world, &options).unwrap();
                let number = |rank: usize| (1 << rank) as f32;
                let mut early = group.buffer(LEN).unwrap();
                sums_in_place(&group, &mut early, number);
                // In an order of its own, and without rank 0.
                if rank > 0 {
                    let part = group.subgroup(&[3, 1, 2]).unwrap();
                    sums_in_place(&part, &mut early, number);
                    let mut theirs = part.buffer(LEN).unwrap();
                    sums_in_place(&part, &mut theirs, number);
                    // What peers see of it does not end with the group that gave it.
                    drop(part);
                    sums_in_place(&group.subgroup(&[2, 3, 1]).unwrap(), &mut theirs, number);
                }
                let later = group.split(Some(0), -(rank as i64)).unwrap().unwrap();
                drop(group);
                sums_in_place(&later, &mut early, number);
                let memory = later.core().memory.clone().unwrap();
                assert!(memory.place(bytemuck::cast_slice(&[0f32; 4])).is_none());
                assert!(memory.at(4, 0, 1).is_none() && memory.at(0, u64::MAX, 1).is_none());
                // It stays when the job goes on with other members, where none of them is a new process.
                if rank > 0 {
                    let next = later.regroup(1, &[2, 3, 1]).unwrap();
                    sums_in_place(&next, &mut early, number);
                    early.fill(15.0);
                }
                drop(later);
                // It outlives all groups.
                assert!(early.iter().all(|&x| x == 15.0));
            });
        }
    });
}
