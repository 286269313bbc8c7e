//! Executes a schedule over any transport: all peers at once, each in its order, without ever blocking on one.
//!
//! The first message from rank to rank in an operation begins with the call it belongs to, so that a rank that is
//! in another operation is noticed. Numbers to be reduced are received beside the target, and combined in the order
//! that the schedule says, so results are the same bits in every run.

use super::schedule::{Schedule, Step, What};
use super::session::{Session, words};
use crate::error::Result;
use crate::member::call::{Call, ENCODED};
use crate::member::context::Context;
use crate::member::health::SLICE;
use crate::member::wait::Wait;
use crate::numbers::element::{Element, ReduceOp};
use crate::numbers::kernel;
use crate::transport::Transport;
use std::time::Instant;

/// The numbers of an operation.
pub(crate) struct Numbers<'a, T> {
    /// Read by [`What::SendInput`].
    pub input: &'a [T],
    /// Read and written by all other steps.
    pub working: &'a mut [T],
}

/// Both directions between this rank and a peer.
struct Lane {
    peer: usize,
    header: [u8; ENCODED],
    sends: Vec<u32>,
    /// Sends that are through, header bytes and bytes of the next one.
    sent: usize,
    header_out: usize,
    out: usize,
    receives: Vec<u32>,
    received: usize,
    header_in: usize,
    theirs: [u8; ENCODED],
    /// Bytes of the next receive.
    got: usize,
    /// The next receive waits for an earlier step and not for the peer.
    held: bool,
    /// The last attempt found less than it asked for. The next one is left out: a peer needs longer than that, and over
    /// sockets an attempt in vain is a call of the system.
    dry: bool,
    /// What was received to be reduced.
    beside: Vec<u64>,
}

impl Lane {
    fn sending(&self) -> bool {
        self.sent < self.sends.len()
    }

    fn receiving(&self) -> bool {
        self.received < self.receives.len()
    }
}

/// Combines a range of this rank's numbers with what other ranks have sent, by rank.
type Combine<'a, T> = &'a dyn Fn(&mut [T], &[&[T]]);

struct Runner<'a, T> {
    transport: &'a mut dyn Transport,
    context: &'a Context,
    call: Call,
    schedule: &'a Schedule,
    numbers: Numbers<'a, T>,
    done: Vec<bool>,
    combine: Combine<'a, T>,
    /// Bytes of numbers that the transport has taken.
    sent: u64,
}

impl Session<'_> {
    /// Executes a schedule.
    pub(crate) fn run<T: Element>(&mut self, schedule: &Schedule, numbers: Numbers<'_, T>) -> Result<()> {
        run(self, schedule, numbers)
    }

    /// Sends to `peer` and receives from it, at the same time.
    pub(crate) fn exchange<T: Element>(
        &mut self,
        peer: usize,
        send: Option<&[T]>,
        receive: Option<&mut [T]>,
    ) -> Result<()> {
        let mut schedule = self.place::<T>().schedule();
        if let Some(send) = send {
            schedule.add(peer, What::SendInput, 0..send.len(), None);
        }
        if let Some(receive) = &receive {
            schedule.add(peer, What::Copy, 0..receive.len(), None);
        }
        let numbers = Numbers { input: send.unwrap_or_default(), working: receive.unwrap_or_default() };
        self.run(&schedule, numbers)
    }
}

/// Executes `schedule`. The call that goes with each peer is the session's.
pub(crate) fn run<T: Element>(
    session: &mut Session<'_>,
    schedule: &Schedule,
    numbers: Numbers<'_, T>,
) -> Result<()> {
    let call = session.call;
    run_with(session, schedule, numbers, &|_| (call, call))
}

/// As [`run`], where `combine` makes one of the parts that all peers have sent: [`What::Part`].
pub(crate) fn run_combining<T: Element>(
    session: &mut Session<'_>,
    schedule: &Schedule,
    numbers: Numbers<'_, T>,
    combine: Combine<'_, T>,
) -> Result<()> {
    let call = session.call;
    execute(session, schedule, numbers, &|_| (call, call), combine)
}

/// As [`run`], with `calls(peer)` as the calls that go to and that are expected from each peer: for pairs of ranks that
/// exchange different lengths.
pub(crate) fn run_with<T: Element>(
    session: &mut Session<'_>,
    schedule: &Schedule,
    numbers: Numbers<'_, T>,
    calls: &dyn Fn(usize) -> (Call, Call),
) -> Result<()> {
    execute(session, schedule, numbers, calls, &|_, _| ())
}

fn execute<T: Element>(
    session: &mut Session<'_>,
    schedule: &Schedule,
    numbers: Numbers<'_, T>,
    calls: &dyn Fn(usize) -> (Call, Call),
    combine: Combine<'_, T>,
) -> Result<()> {
    let mut lanes: Vec<Lane> = vec![];
    for (index, step) in schedule.steps.iter().enumerate() {
        let lane = match lanes.iter().position(|lane| lane.peer == step.peer) {
            Some(lane) => &mut lanes[lane],
            None => {
                lanes.push(Lane {
                    peer: step.peer,
                    header: calls(step.peer).0.to_bytes(),
                    sends: vec![],
                    sent: 0,
                    header_out: 0,
                    out: 0,
                    receives: vec![],
                    received: 0,
                    header_in: 0,
                    theirs: [0; ENCODED],
                    got: 0,
                    held: false,
                    dry: false,
                    beside: session.pool.pop().unwrap_or_default(),
                });
                let last = lanes.len() - 1;
                &mut lanes[last]
            }
        };
        match step.what.sends() {
            true => lane.sends.push(index as u32),
            false => {
                if step.what != What::Copy {
                    let words = words::<T>(step.range.len());
                    if lane.beside.len() < words {
                        lane.beside.resize(words, 0);
                    }
                }
                lane.receives.push(index as u32);
            }
        }
    }
    let sends = |step: &Step| schedule.steps[step.after.unwrap_or_default() as usize].what.sends();
    let overwrites = |step: &Step| !step.what.sends() && step.after.is_some() && sends(step);
    let elements: usize = schedule.steps.iter().map(|step| step.range.len()).sum();
    session.transport.enter(elements * size_of::<T>());
    session.transport.lend(!schedule.steps.iter().any(overwrites));
    let done = vec![false; schedule.steps.len()];
    let (transport, context, call) = (&mut *session.transport, session.context, session.call);
    let mut runner = Runner { transport, context, call, schedule, numbers, done, combine, sent: 0 };
    let outcome = runner.all(&mut lanes, calls);
    *session.sent += runner.sent;
    session.pool.extend(lanes.into_iter().map(|lane| lane.beside));
    outcome
}

impl<T: Element> Runner<'_, T> {
    fn all(&mut self, lanes: &mut [Lane], calls: &dyn Fn(usize) -> (Call, Call)) -> Result<()> {
        let mut wait = Wait::new(self.context);
        let (mut to, mut from) = (vec![], vec![]);
        loop {
            let mut moved = false;
            let mut open = false;
            to.clear();
            from.clear();
            for lane in lanes.iter_mut() {
                // What a peer sends is seldom there before this rank has sent its own.
                let (pushed, mut blocked) = self.push(lane)?;
                let pulled = self.pull(lane, calls)?;
                if pulled && !blocked {
                    blocked = self.push(lane)?.1;
                }
                moved |= pushed || pulled;
                if lane.receiving() && !lane.held {
                    from.push(lane.peer);
                }
                if blocked {
                    to.push(lane.peer);
                }
                open |= lane.sending() || lane.receiving();
            }
            moved |= self.join_parts(lanes);
            if !open {
                return self.flush(&mut wait);
            }
            if moved {
                wait.progress();
                continue;
            }
            if let Some(&peer) = from.first().or(to.first()) {
                wait.check(peer, self.call)?;
            }
            // Who has begun to send is in the operation.
            let together = lanes.iter().all(|lane| lane.header_in == ENCODED);
            let begun = together.then(Instant::now);
            self.transport.wait(&to, &from, SLICE)?;
            if let Some(begun) = begun {
                self.transport.has_waited(begun.elapsed());
            }
            lanes.iter_mut().for_each(|lane| lane.dry = false);
        }
    }

    /// What the transport has taken must have left before the caller may do without it.
    fn flush(&mut self, wait: &mut Wait<'_>) -> Result<()> {
        while let Some(peer) = self.transport.unsent()? {
            wait.check(peer, self.call)?;
            self.transport.wait(&[peer], &[], SLICE)?;
        }
        Ok(())
    }

    fn ready(&self, step: u32) -> bool {
        self.schedule.steps[step as usize].after.is_none_or(|after| self.done[after as usize])
    }

    /// Sends what is ready; whether anything moved, and whether the transport had no room.
    fn push(&mut self, lane: &mut Lane) -> Result<(bool, bool)> {
        let mut moved = false;
        while let Some(&index) = lane.sends.get(lane.sent) {
            if !self.ready(index) {
                return Ok((moved, false));
            }
            let step = &self.schedule.steps[index as usize];
            let numbers = match step.what {
                What::SendInput => self.numbers.input,
                _ => &*self.numbers.working,
            };
            let bytes: &[u8] = bytemuck::cast_slice(&numbers[step.range.clone()]);
            let parts = [&lane.header[lane.header_out..], &bytes[lane.out..]];
            let wanted = parts[0].len() + parts[1].len();
            let mut taken = 0;
            if wanted > 0 {
                taken = self.transport.try_send(lane.peer, parts)?;
                moved |= taken > 0;
                let header = taken.min(parts[0].len());
                lane.header_out += header;
                lane.out += taken - header;
                self.sent += (taken - header) as u64;
            }
            if taken < wanted {
                return Ok((moved, true));
            }
            self.done[index as usize] = true;
            moved = true;
            lane.sent += 1;
            lane.out = 0;
        }
        Ok((moved, false))
    }

    /// Receives what is there; whether anything moved.
    fn pull(&mut self, lane: &mut Lane, calls: &dyn Fn(usize) -> (Call, Call)) -> Result<bool> {
        let mut moved = false;
        if std::mem::take(&mut lane.dry) {
            return Ok(false);
        }
        while let Some(&index) = lane.receives.get(lane.received) {
            let step = &self.schedule.steps[index as usize];
            let (range, what, ready) = (step.range.clone(), step.what, self.ready(index));
            let width = range.len() * size_of::<T>();
            if lane.header_in < ENCODED || lane.got < width {
                let header = &mut lane.theirs[lane.header_in..];
                let missing = header.len();
                let target: &mut [u8] = match what {
                    // Nothing may be overwritten that an earlier step has yet to send.
                    What::Copy if !ready => &mut [],
                    What::Copy => bytemuck::cast_slice_mut(&mut self.numbers.working[range.clone()]),
                    _ => &mut bytemuck::cast_slice_mut::<u64, u8>(&mut lane.beside)[..width],
                };
                let target = target.get_mut(lane.got..).unwrap_or_default();
                let wanted = missing + target.len();
                let count = match wanted {
                    0 => 0,
                    _ => self.transport.try_recv(lane.peer, [header, target])?,
                };
                moved |= count > 0;
                lane.dry = count < wanted;
                let headed = count.min(missing);
                lane.header_in += headed;
                lane.got += count - headed;
                if headed > 0 && lane.header_in == ENCODED {
                    self.check(lane.peer, &lane.theirs, calls(lane.peer))?;
                }
            }
            let (headed, full) = (lane.header_in == ENCODED, lane.got == width);
            lane.held = headed && (what == What::Part && full || !ready && (full || what == What::Copy));
            if !headed || !full || !ready || what == What::Part {
                return Ok(moved);
            }
            if what != What::Copy && width > 0 {
                let beside = &lane.beside[..words::<T>(range.len())];
                let theirs: &[T] = &bytemuck::cast_slice::<u64, T>(beside)[..range.len()];
                let target = &mut self.numbers.working[range];
                kernel::combine(target, theirs, self.call.op, lane.peer < self.context.rank);
                if what == What::Finish && self.call.op == ReduceOp::Mean {
                    kernel::divide(target, self.context.size);
                }
            }
            self.done[index as usize] = true;
            moved = true;
            lane.received += 1;
            lane.got = 0;
        }
        Ok(moved)
    }

    /// Combines the next parts of all peers with this rank's numbers, once all have come; whether they have.
    fn join_parts(&mut self, lanes: &mut [Lane]) -> bool {
        let next = |lane: &Lane| {
            let index = *lane.receives.get(lane.received)?;
            let step = &self.schedule.steps[index as usize];
            (step.what == What::Part).then_some((index, step))
        };
        if !lanes.iter().any(|lane| next(lane).is_some()) {
            return false;
        }
        let mut range = None;
        let mut theirs: Vec<&[T]> = vec![&[]; self.context.size];
        for lane in lanes.iter() {
            let Some((index, step)) = next(lane) else { continue };
            if !lane.held || !self.ready(index) {
                return false;
            }
            let beside = &lane.beside[..words::<T>(step.range.len())];
            theirs[lane.peer] = &bytemuck::cast_slice::<u64, T>(beside)[..step.range.len()];
            range = Some(step.range.clone());
        }
        let Some(range) = range else { return false };
        (self.combine)(&mut self.numbers.working[range], &theirs);
        for lane in lanes {
            if let Some((index, _)) = next(lane) {
                self.done[index as usize] = true;
                lane.received += 1;
                lane.got = 0;
                lane.held = false;
            }
        }
        true
    }

    /// Checks the call that `peer` has sent.
    fn check(&self, peer: usize, theirs: &[u8; ENCODED], (sent, expected): (Call, Call)) -> Result<()> {
        let theirs = Call::from_bytes(theirs);
        if theirs == Some(expected) {
            return Ok(());
        }
        let own = if sent == expected { self.call } else { sent };
        Err(self.context.mismatch(own, peer, theirs))
    }
}
