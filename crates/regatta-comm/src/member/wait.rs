//! One wait in an operation: its deadline, and what is looked for while it lasts.

use super::call::Call;
use super::context::Context;
use super::health::GRACE;
use super::late::Late;
use super::timer::Timer;
use crate::error::{Error, Result};
use std::time::{Duration, SystemTime};

/// After so long without progress, and again after each so long, ranks compare notes: those that are in different
/// calls find out.
const NOTE: Duration = Duration::from_millis(500);

/// One wait in an operation: ends with progress, with the job, or with the deadline.
pub(crate) struct Wait<'a> {
    context: &'a Context,
    timer: Option<Timer>,
    /// How long the wait had lasted at the last look.
    before: Duration,
    /// When to compare notes next.
    note: Duration,
    warned: bool,
}

impl<'a> Wait<'a> {
    pub(crate) fn new(context: &'a Context) -> Self {
        let (timer, before, note, warned) = (None, Duration::ZERO, first_note(context), false);
        Self { context, timer, before, note, warned }
    }

    /// Called between sleeps while `peer` (of the group) is waited for in `call`.
    pub(crate) fn check(&mut self, peer: usize, call: Call) -> Result<()> {
        let context = self.context;
        let (health, notes) = (&context.health, &context.notes);
        health.check()?;
        context.invite(call)?;
        let deadline = context.deadline;
        let waited = self.look(Duration::ZERO);
        // Parts of an operation have calls of their own; ranks compare the whole.
        let call = context.current().unwrap_or(call);
        let name = context.names[peer];
        if waited >= GRACE.min(deadline) && health.has_left(name) {
            return Err(Error::Left { rank: name, call: call.to_string() });
        }
        if waited >= self.note {
            self.note = waited + first_note(context);
            let earlier = |sequence| context.earlier(sequence);
            if let Some((own, other)) = notes.say(call, name).conflict(call, &earlier) {
                return Err(context.disagree(own, other.rank, Some(other.call)));
            }
            // A store that is cut off takes its time to be given up, in which nobody has stopped this process.
            self.look(deadline / 2);
        }
        if waited >= deadline {
            return Err(Error::Deadline { rank: notes.chain_end(name), call: call.to_string(), waited });
        }
        if waited >= context.warn && !self.warned {
            self.warned = true;
            let since = SystemTime::now() - waited;
            let waits_for = notes.chain_end(name);
            let rank = context.names[context.rank];
            context.on_late.report(&Late {
                rank,
                waits_for,
                call: call.to_string(),
                since,
                waited,
                deadline,
            });
            self.look(deadline / 2);
        }
        Ok(())
    }

    /// How long the wait has lasted, after something that may have taken as long as `pause`.
    fn look(&mut self, pause: Duration) -> Duration {
        let deadline = self.context.deadline;
        let waited = self.timer.get_or_insert_with(|| Timer::new(deadline)).used_after(pause);
        if waited < self.before {
            // This process was stopped: everything begins anew.
            self.note = first_note(self.context);
            self.warned = false;
        }
        self.before = waited;
        waited
    }

    /// Begins the deadline anew.
    pub(crate) fn progress(&mut self) {
        if self.timer.take().is_some() {
            self.before = Duration::ZERO;
            self.note = first_note(self.context);
        }
    }
}

/// When notes are compared for the first time: half-way at the latest, so that a short deadline has its notes, too.
fn first_note(context: &Context) -> Duration {
    NOTE.min(context.deadline / 2)
}
