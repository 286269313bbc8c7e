//! A rank on its way into its job.

use crate::api::group::Group;
use crate::error::{Error, Result};
use crate::job::Reached;
use crate::job::options::Options;
use crate::rendezvous::World;
use std::fmt::Display;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// How long to look for a failure that comes at once, before a rank prepares in vain.
const AT_ONCE: Duration = Duration::from_millis(500);
/// How long a rank that fails tries to tell the others: they may just be being started.
const TELLING: Duration = Duration::from_secs(5);

/// A rank that has made itself known to its job, and prepares what it needs before it joins: opens its data, say.
///
/// The others wait for it as long as it lives, however long it takes, and hear at once when it fails. Dropped without
/// [`join`](Self::join), it leaves the job.
pub struct Arrival {
    world: World,
    /// Comes when the job's store has been reached.
    reached: Receiver<Result<Reached>>,
    early: Option<Reached>,
}

impl Arrival {
    /// Makes this process known as a rank of `world`. This goes on in the background where rank 0 is not there yet.
    ///
    /// # Errors
    /// What shows at once: a port that is taken, a secret that is missing.
    pub fn announce(world: &World, options: &Options) -> Result<Self> {
        let (sender, reached) = channel();
        let (of, options) = (world.clone(), options.clone());
        std::thread::Builder::new()
            .name("regatta-arrival".into())
            .spawn(move || {
                // Nobody may wait for it any longer.
                let _ = sender.send(Reached::new(&of, &options));
            })
            .map_err(Error::system("start a thread"))?;
        let early = match reached.recv_timeout(AT_ONCE) {
            Ok(outcome) => Some(outcome?),
            Err(_) => None,
        };
        Ok(Self { world: world.clone(), reached, early })
    }

    /// Does `work` that the others need not wait for with a deadline. When it fails, all ranks of the job are told why
    /// and end.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn prepare<T, E: Display>(&mut self, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        work().inspect_err(|error| self.give_up(&error.to_string()))
    }

    /// Ends the job before this rank has joined it: all ranks return an error with `reason`. Returns when they have been
    /// told, or cannot be told within some seconds.
    pub fn give_up(&mut self, reason: &str) {
        let reached = self.early.take().or_else(|| self.reached.recv_timeout(TELLING).ok()?.ok());
        // Without a store there is nobody to tell.
        if let Some(reached) = reached {
            reached.give_up(&self.world, reason, TELLING);
        }
    }

    /// Joins the job, with `options`, and waits for all other ranks.
    ///
    /// # Errors
    /// As [`Group::connect`].
    pub fn join(mut self, options: &Options) -> Result<Group> {
        let reached = match self.early.take() {
            Some(reached) => reached,
            None => self.wait()?,
        };
        Group::assemble(&self.world, options, reached)
    }

    fn wait(&self) -> Result<Reached> {
        loop {
            // The other side has a time limit of its own.
            match self.reached.recv_timeout(Duration::from_secs(60)) {
                Ok(outcome) => return outcome,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::Rendezvous("this rank has given up already".into()));
                }
            }
        }
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.give_up("it panicked");
        }
    }
}

impl std::fmt::Debug for Arrival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Arrival(rank {} of {})", self.world.rank, self.world.size)
    }
}
