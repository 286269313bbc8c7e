//! Which rank is a server, and how workers and servers reach each other, also after a worker has died.

use crate::error::{Error, Result};
use regatta_comm::{Group, Mailbox, Message};
use regatta_plan::{Plan, Servers};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What a rank of a job with parameter servers does.
pub enum Role {
    /// It trains, in the group of the workers that it waits for in every step.
    Worker(Group, ServerLink),
    /// It keeps parameters.
    Server(ServerEnd),
}

/// The ranks of a job that live, and what goes between them: requests of workers, and answers of servers.
#[derive(Clone)]
pub(crate) struct Wire {
    world: Group,
    requests: Arc<Mailbox>,
    answers: Arc<Mailbox>,
}

/// A worker's way to the servers. Clones share it.
#[derive(Clone)]
pub struct ServerLink {
    wire: Arc<Mutex<Wire>>,
    worker: usize,
    /// Workers that the job began with: its first ranks.
    pub(crate) workers: usize,
    /// The parameter servers.
    pub(crate) servers: Servers,
}

/// A server's way to the workers.
pub struct ServerEnd {
    pub(crate) wire: Wire,
    rank: usize,
    /// Workers that the job began with: its first ranks.
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
        let (workers, servers, rank) = (plan.world(), plan.servers, world.rank());
        if world.size() != plan.ranks() {
            return Err(Error::Usage(format!(
                "the plan is for {workers} workers and {}, and the job has {} ranks",
                servers,
                world.size()
            )));
        }
        let wire = Wire::over(world.clone())?;
        if rank >= workers {
            return Ok(Self::Server(ServerEnd { wire, rank, workers, servers }));
        }
        let group = match servers.is_free() {
            true => Group::solo(),
            false => world.subgroup(&(0..workers).collect::<Vec<_>>())?,
        };
        let wire = Arc::new(Mutex::new(wire));
        Ok(Self::Worker(group, ServerLink { wire, worker: rank, workers, servers }))
    }
}

impl Wire {
    fn over(world: Group) -> Result<Self> {
        let (requests, answers) = (world.mailbox()?, world.mailbox()?);
        Ok(Self { world, requests: Arc::new(requests), answers: Arc::new(answers) })
    }

    /// After how long a wait is an error.
    pub(crate) fn deadline(&self) -> Duration {
        self.world.deadline()
    }

    /// Messages of workers to servers.
    pub(crate) fn requests(&self) -> &Mailbox {
        &self.requests
    }

    /// Messages of servers to workers.
    pub(crate) fn answers(&self) -> &Mailbox {
        &self.answers
    }

    /// Where rank `rank` of the job is in the mailboxes.
    ///
    /// # Errors
    /// It has died.
    pub(crate) fn place(&self, rank: usize) -> Result<usize> {
        let place = self.world.members().iter().position(|&member| member == rank);
        place.ok_or_else(|| Error::Usage(format!("rank {rank} is no longer in the job")))
    }

    /// The rank of the job that has sent `message`.
    pub(crate) fn sender(&self, message: &Message) -> usize {
        self.world.members()[message.from()]
    }

    /// The way between those that live after `error`, and who has died; the error if it names none of `spared`.
    fn without(&self, mut error: Error, spared: &Range<usize>) -> Result<(Self, Vec<usize>)> {
        let mut living = self.world.members().to_vec();
        let (mut generation, mut dead) = (self.world.generation(), vec![]);
        loop {
            // All ranks hear of the same first failure of a generation.
            let Some(died) = died(&error).filter(|died| spared.contains(died) && living.contains(died))
            else {
                return Err(error);
            };
            living.retain(|&rank| rank != died);
            dead.push(died);
            generation += 1;
            let begun = self.world.regroup(generation, &living).map_err(Error::from).and_then(Self::over);
            match begun {
                Ok(wire) => return Ok((wire, dead)),
                Err(next) => error = next,
            }
        }
    }
}

/// The rank whose end `error` tells of.
fn died(error: &Error) -> Option<usize> {
    match error {
        Error::Comm(regatta_comm::Error::Aborted { rank, .. }) => *rank,
        Error::Comm(regatta_comm::Error::PeerDied { rank, .. }) => Some(*rank),
        _ => None,
    }
}

impl ServerLink {
    /// This worker's index.
    pub fn worker(&self) -> usize {
        self.worker
    }

    /// The rank of the `server`-th server.
    pub(crate) fn rank_of(&self, server: usize) -> usize {
        self.workers + server
    }

    /// The present way.
    pub(crate) fn wire(&self) -> Wire {
        self.wire.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The group of all ranks that live.
    pub fn world(&self) -> Group {
        self.wire().world
    }

    /// Goes on after `error`, if it tells of the death of a worker that the others can do without.
    ///
    /// # Errors
    /// `error`, where it does not; a failure meanwhile.
    pub(crate) fn go_on_after(&self, error: Error) -> Result<()> {
        let wire = self.wire();
        let (next, _) = wire.without(error, &self.servers.spared(self.workers))?;
        *self.wire.lock().unwrap_or_else(PoisonError::into_inner) = next;
        Ok(())
    }
}

impl ServerEnd {
    /// This server's index among the servers, which is the shard that it keeps of every unit.
    pub fn index(&self) -> usize {
        self.rank - self.workers
    }

    /// Goes on after `error`, if it tells of the death of a worker that the others can do without. Returns who has died.
    ///
    /// # Errors
    /// `error`, where it does not; a failure meanwhile.
    pub(crate) fn go_on_after(&mut self, error: Error) -> Result<Vec<usize>> {
        let (next, dead) = self.wire.without(error, &self.servers.spared(self.workers))?;
        self.wire = next;
        Ok(dead)
    }
}
