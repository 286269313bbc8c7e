//! A server's loop: it takes what workers push, updates its shard, and sends them the parameters.

use super::clocks::Clocks;
use super::link::ServerEnd;
use super::message::{Commit, Kind};
use super::round::{Round, is_finite};
use super::shard::Shard;
use crate::error::{Error, Result};
use regatta_comm::{Element, Message};
use regatta_plan::SyncMode;
use std::time::Duration;

/// How often a server that hears nothing looks whether the job goes on.
const LOOK: Duration = Duration::from_secs(1);

/// What a server has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Served {
    /// Updates of its shard, from the beginning of the training.
    pub updates: u64,
}

struct Server {
    end: ServerEnd,
    shard: Shard,
    round: Round,
    clocks: Clocks,
    /// Workers that have committed and wait until they may go on.
    held: Vec<usize>,
    /// Pushes of all workers that were applied, where each trains at its own speed.
    applied: u64,
    /// The other workers shall end.
    stopping: bool,
}

/// Keeps `shard` for the workers until all have left.
///
/// # Errors
/// Communication fails, or a worker has another model.
pub(crate) fn serve(end: ServerEnd, shard: Shard) -> Result<Served> {
    let bound = (end.servers.mode == SyncMode::Ssp).then_some(end.servers.staleness);
    let mut server = Server {
        round: Round::new(end.workers, shard.units()),
        clocks: Clocks::new(end.workers, bound),
        held: vec![],
        applied: 0,
        stopping: false,
        shard,
        end,
    };
    while !server.clocks.is_over() {
        if let Err(error) = server.hear() {
            server.go_on_after(error)?;
        }
    }
    Ok(Served { updates: server.shard.updates() })
}

impl Server {
    fn is_free(&self) -> bool {
        self.end.servers.is_free()
    }

    /// Waits for a request for a while, and does what it says.
    fn hear(&mut self) -> Result<()> {
        match self.end.wire.requests().recv_timeout(None, None, LOOK)? {
            Some(message) => self.handle(message),
            None => self.tell_awaited(),
        }
    }

    /// Tells workers that wait which worker it is that they wait for, so that they can name it if it never comes.
    fn tell_awaited(&self) -> Result<()> {
        let awaited = if self.is_free() { self.clocks.slowest() } else { self.round.awaited() };
        let Some(awaited) = awaited else { return Ok(()) };
        let waits = |worker: &usize| *worker != awaited && (!self.is_free() || self.held.contains(worker));
        let tell = |worker| self.answer(worker, &[awaited as f64], Kind::Waits.tag(0));
        self.clocks.present().filter(waits).try_for_each(tell)
    }

    /// Goes on without a worker that has died. The others begin a step anew, with the parameters as they are now.
    fn go_on_after(&mut self, error: Error) -> Result<()> {
        for worker in self.end.go_on_after(error)? {
            self.clocks.leave(worker);
        }
        (0..self.end.workers).for_each(|worker| self.round.discard(worker));
        self.held.clear();
        Ok(())
    }

    /// Sends numbers to a worker.
    fn answer<T: Element>(&self, worker: usize, numbers: &[T], tag: u32) -> Result<()> {
        let wire = &self.end.wire;
        Ok(wire.answers().send(numbers, wire.place(worker)?, tag)?)
    }

    fn handle(&mut self, message: Message) -> Result<()> {
        let worker = self.end.wire.sender(&message);
        let Some((kind, unit)) = Kind::of(message.tag()) else {
            let tag = message.tag();
            return Err(Error::Usage(format!(
                "rank {worker} sent a message with the tag {tag}, which means nothing"
            )));
        };
        match kind {
            Kind::Push => {
                self.round.keep(&self.shard, worker, unit, message)?;
                if !self.is_free()
                    && let Some((squares, not_finite)) = self.round.combine(&self.shard, unit)?
                {
                    let not_finite = not_finite.map_or(-1.0, |worker| worker as f64);
                    self.tell_all(Kind::Squares, &[squares, not_finite])?;
                }
            }
            Kind::Commit => {
                let numbers = message.numbers::<f64>()?;
                let commit = Commit::of(numbers)
                    .ok_or_else(|| Error::Usage(format!("rank {worker} committed {numbers:?}")))?;
                self.commit(worker, commit)?;
            }
            Kind::Discard => self.round.discard(worker),
            Kind::Parameters => copy(self.shard.parameters_mut(unit), &message)?,
            Kind::First | Kind::Second => {
                if let Some(moments) = self.shard.moments_mut(moments(kind), unit) {
                    copy(moments, &message)?;
                }
            }
            Kind::Begin => {
                let &[updates] = message.numbers::<f64>()? else {
                    return Err(Error::Usage("the first worker begins without a number of updates".into()));
                };
                self.shard.set_updates(updates as u64);
                // The first worker has sent them.
                for other in 1..self.end.workers {
                    self.send_parameters(other)?;
                }
            }
            Kind::Save => self.save(worker)?,
            Kind::Pull => {
                self.round.discard(worker);
                self.held.push(worker);
                self.release()?;
            }
            Kind::Leave => {
                self.stopping |= message.numbers::<f64>()?.first() == Some(&1.0);
                self.clocks.leave(worker);
                self.release()?;
            }
            Kind::Squares | Kind::Progress | Kind::Refused | Kind::Waits => {
                return Err(Error::Usage(format!("worker {worker} sent {kind:?}, which only servers send")));
            }
        }
        Ok(())
    }

    /// Applies what `worker` has pushed; in `sync` mode the mean of all.
    fn commit(&mut self, worker: usize, commit: Commit) -> Result<()> {
        if self.is_free() {
            return self.commit_alone(worker, commit);
        }
        // The first worker speaks for all: they have the same numbers.
        if worker > 0 {
            return Ok(());
        }
        if let Some(culprit) = self.round.refused() {
            return self.refuse(culprit);
        }
        self.shard.begin();
        for unit in 0..self.shard.units() {
            self.shard.update(unit, self.round.mean(unit), commit);
            for worker in 0..self.end.workers {
                self.send_unit(worker, unit)?;
            }
        }
        self.round.clear();
        Ok(())
    }

    fn commit_alone(&mut self, worker: usize, commit: Commit) -> Result<()> {
        let taken = (0..self.shard.units()).map(|unit| self.round.take(worker, unit));
        let Some(pushed) = taken.collect::<Option<Vec<Message>>>() else {
            return Err(Error::Usage(format!("worker {worker} commits what it has not pushed")));
        };
        for message in &pushed {
            if !is_finite(message.numbers()?) {
                return self.refuse(worker);
            }
        }
        self.applied += 1;
        if self.end.index() == 0 {
            // Before the update, which takes longer.
            let progress = [self.applied as f64, f64::from(u8::from(self.stopping))];
            self.answer(worker, &progress, Kind::Progress.tag(0))?;
        }
        self.shard.begin();
        for (unit, message) in pushed.iter().enumerate() {
            self.shard.update(unit, message.numbers()?, commit);
        }
        self.clocks.tick(worker);
        self.held.push(worker);
        self.release()
    }

    /// Sends the parameters to the workers that have waited long enough.
    fn release(&mut self) -> Result<()> {
        let (free, held) =
            std::mem::take(&mut self.held).into_iter().partition(|&w| self.clocks.may_go_on(w));
        self.held = held;
        let free: Vec<usize> = free;
        free.into_iter().try_for_each(|worker| self.send_parameters(worker))
    }

    /// Tells all workers that what `worker` has pushed is not applied.
    fn refuse(&self, worker: usize) -> Result<()> {
        let reason = format!(
            "rank {worker} pushed gradients that are not finite; the servers keep the parameters as they were: lower \
             optimizer.lr or set optimizer.clip"
        );
        self.clocks.present().try_for_each(|to| self.answer(to, reason.as_bytes(), Kind::Refused.tag(0)))
    }

    fn tell_all(&self, kind: Kind, numbers: &[f64]) -> Result<()> {
        self.clocks.present().try_for_each(|to| self.answer(to, numbers, kind.tag(0)))
    }

    fn send_unit(&self, worker: usize, unit: usize) -> Result<()> {
        self.answer(worker, self.shard.parameters(unit), Kind::Parameters.tag(unit))
    }

    /// Sends all parameters, in the order in which a forward pass uses them.
    fn send_parameters(&self, worker: usize) -> Result<()> {
        (0..self.shard.units()).try_for_each(|unit| self.send_unit(worker, unit))
    }

    /// Sends all numbers as they are at one moment.
    fn save(&self, worker: usize) -> Result<()> {
        self.send_parameters(worker)?;
        for kind in [Kind::First, Kind::Second] {
            for unit in 0..self.shard.units() {
                if let Some(numbers) = self.shard.moments(moments(kind), unit) {
                    self.answer(worker, numbers, kind.tag(unit))?;
                }
            }
        }
        self.answer(worker, &[self.shard.updates() as f64], Kind::Save.tag(0))
    }
}

/// The name of moments in checkpoints.
fn moments(kind: Kind) -> &'static str {
    if kind == Kind::First { "first" } else { "second" }
}

fn copy(into: &mut [f32], message: &Message) -> Result<()> {
    let numbers = message.numbers::<f32>()?;
    if numbers.len() != into.len() {
        let (theirs, own) = (numbers.len(), into.len());
        return Err(Error::Usage(format!(
            "the first worker sent {theirs} numbers of a unit that has {own} here"
        )));
    }
    into.copy_from_slice(numbers);
    Ok(())
}
