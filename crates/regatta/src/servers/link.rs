//! Which rank is a server, and how workers and servers reach each other.

use crate::error::{Error, Result};
use regatta_comm::{Group, Mailbox};
use regatta_plan::{Plan, Servers};
use std::sync::Arc;

/// What a rank of a job with parameter servers does.
#[expect(clippy::large_enum_variant, reason = "there is one for each process")]
pub enum Role {
    /// It trains, in the group of the workers that it waits for in every step.
    Worker(Group, ServerLink),
    /// It keeps parameters.
    Server(ServerEnd),
}

/// A worker's way to the servers.
#[derive(Clone)]
pub struct ServerLink {
    pub(crate) requests: Arc<Mailbox>,
    pub(crate) answers: Arc<Mailbox>,
    world: Group,
    /// Workers of the job.
    pub(crate) workers: usize,
    /// The parameter servers.
    pub(crate) servers: Servers,
}

/// A server's way to the workers.
pub struct ServerEnd {
    pub(crate) requests: Mailbox,
    pub(crate) answers: Mailbox,
    world: Group,
    /// Workers of the job: its first ranks.
    pub(crate) workers: usize,
    /// The parameter servers.
    pub(crate) servers: Servers,
}

impl Role {
    /// The role of this rank of `world`, a job for `plan`: the last ranks are its servers. All ranks of `world` call it.
    ///
    /// # Errors
    /// The job has not as many ranks as the plan, or communication fails.
    pub fn take(world: &Group, plan: &Plan) -> Result<Self> {
        let (workers, servers) = (plan.world(), plan.servers);
        if world.size() != plan.ranks() {
            return Err(Error::Usage(format!(
                "the plan is for {workers} workers and {}, and the job has {} ranks",
                servers,
                world.size()
            )));
        }
        let (requests, answers) = (world.mailbox()?, world.mailbox()?);
        if world.rank() >= workers {
            return Ok(Self::Server(ServerEnd { requests, answers, world: world.clone(), workers, servers }));
        }
        let group = match servers.is_free() {
            true => Group::solo(),
            false => world.subgroup(&(0..workers).collect::<Vec<_>>())?,
        };
        let (requests, answers) = (Arc::new(requests), Arc::new(answers));
        let link = ServerLink { requests, answers, world: world.clone(), workers, servers };
        Ok(Self::Worker(group, link))
    }
}

impl ServerLink {
    /// This worker's index.
    pub fn worker(&self) -> usize {
        self.world.rank()
    }

    /// The rank of the `server`-th server.
    pub(crate) fn rank_of(&self, server: usize) -> usize {
        self.workers + server
    }

    /// The group of all ranks.
    pub fn world(&self) -> &Group {
        &self.world
    }
}

impl ServerEnd {
    /// This server's index among the servers, which is the shard that it keeps of every unit.
    pub fn index(&self) -> usize {
        self.world.rank() - self.workers
    }

    /// The group of all ranks.
    pub fn world(&self) -> &Group {
        &self.world
    }
}
