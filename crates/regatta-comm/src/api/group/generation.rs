//! Groups of later generations of a job: ranks that have gone, and ranks that come.

use super::Group;
use crate::error::Result;
use crate::job::options::Options;
use crate::job::{Job, Reached};
use crate::member::call::digest;
use crate::rendezvous::World;
use std::sync::Arc;

impl Group {
    /// The generation of the job that the group belongs to: 0 for those that a job begins with.
    pub fn generation(&self) -> u64 {
        self.core().context.generation
    }

    /// Goes on to a later generation of the job, with other members: the group of its world.
    ///
    /// A generation ends when one of its ranks dies or gives up ([`abort`](Self::abort)), and any time its ranks like. The
    /// process, the connections to the living and the memory of buffers stay. All `members` (ranks of the job, in the
    /// order of their ranks in the new group) call this, or [`come`](Self::come) where they are new processes, with the
    /// same number and the same list. The number is larger than any before; who finds out what it and the members are is
    /// up to the caller. Ranks that are no members do nothing, and may be members of a later one. Groups of earlier
    /// generations are over: their calls fail.
    ///
    /// # Errors
    /// [`Usage`](crate::Error::Usage) for a list or a number that cannot be; members that name another list, do not come
    /// within `options.join`, or fail meanwhile: then the generation has ended, and the next one can be tried.
    ///
    /// ```
    /// use regatta_comm::{Group, ReduceOp};
    ///
    /// std::thread::scope(|scope| {
    ///     for group in Group::threads(3) {
    ///         scope.spawn(move || {
    ///             // Rank 1 leaves, and the others go on.
    ///             if group.rank() != 1 {
    ///                 let group = group.regroup(1, &[0, 2]).unwrap();
    ///                 let mut sum = [1.0f32];
    ///                 group.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
    ///                 assert_eq!((sum[0], group.members()), (2.0, [0, 2].as_slice()));
    ///             }
    ///         });
    ///     }
    /// });
    /// ```
    pub fn regroup(&self, generation: u64, members: &[usize]) -> Result<Self> {
        let core = self.core();
        let job = core.job.begin(generation, members, &core.options)?;
        Self::in_generation(job, members, &core.options)
    }

    /// Joins a job that has begun, as rank `world.rank` of it, in a generation that is about to begin: see
    /// [`regroup`](Self::regroup). The rank is a new one, or that of a process which has gone; of `world`, only the rank,
    /// the host and the store count.
    ///
    /// # Errors
    /// As [`regroup`](Self::regroup) and [`connect`](Self::connect).
    pub fn come(world: &World, options: &Options, generation: u64, members: &[usize]) -> Result<Self> {
        let reached = Reached::in_generation(world, options, generation)?;
        let job = Job::come(world, options, generation, members, reached)?;
        Self::in_generation(job, members, options)
    }

    /// The group of all members.
    fn in_generation(job: Job, members: &[usize], options: &Options) -> Result<Self> {
        let position = |among: &[usize]| among.iter().position(|&member| member == job.rank).unwrap_or(0);
        let here: Vec<usize> = {
            let hosts = job.by_host(members);
            let rank = position(members);
            let here = hosts.into_iter().find(|host| host.contains(&rank)).unwrap_or_default();
            here.into_iter().map(|rank| members[rank]).collect()
        };
        let (rank, local) = (position(members), (position(&here), here.len()));
        let id = digest(0, [5, job.generation]);
        Self::enter(Arc::new(job), id, rank, members.into(), local, options)
    }
}
