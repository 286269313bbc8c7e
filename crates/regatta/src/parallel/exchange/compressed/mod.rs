//! Every worker keeps all gradients, and sends them to the others in fewer bytes, while the backward pass continues.
//!
//! A thread encodes each unit as it is pushed, exchanges the codes and decodes their mean. All workers decode the same codes,
//! so they have the same bits. What an encoding loses of a worker's gradients is kept and added to those of the next step
//! (error feedback), and it is part of a checkpoint.

mod coder;
mod codes;
mod low_rank;
mod sparse;

use super::{Combine, CommTime, GradientExchange, NamedState, StateOf};
use crate::autograd::waiting;
use crate::error::{Error, Result};
use crate::params::{UnitShapes, Units};
use coder::Coder;
use regatta_comm::{Buffer, Group};
use regatta_plan::{Compress, CompressKind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

/// See the [module](self).
pub struct CompressedExchange {
    workers: Group,
    compress: Compress,
    lens: Vec<usize>,
    /// By unit: its gradients; none where the producer or the thread has them.
    gradients: Vec<Option<Buffer<f32>>>,
    /// By unit: what is kept from step to step, as [`names`] has it; empty where the thread has it.
    kept: Vec<Vec<Vec<f32>>>,
    step: u64,
    in_flight: usize,
    thread: Option<Thread>,
    shapes: Vec<UnitShapes>,
    time: CommTime,
}

/// The thread that encodes and exchanges.
struct Thread {
    work: Sender<Work>,
    done: Receiver<Done>,
    handle: JoinHandle<()>,
}

/// A unit on its way to the thread and back.
struct Work {
    unit: usize,
    step: u64,
    gradients: Buffer<f32>,
    kept: Vec<Vec<f32>>,
}

struct Done {
    work: Work,
    outcome: Result<()>,
    begun: Instant,
    ended: Instant,
}

/// The names of what is kept, and what it becomes when the number of workers changes.
fn names(kind: CompressKind) -> &'static [(&'static str, Combine)] {
    match kind {
        CompressKind::Topk | CompressKind::Randomk => &[("unsent", Combine::Mean)],
        CompressKind::Onebit => &[("unsent", Combine::Mean), ("unsent-mean", Combine::Sum)],
        CompressKind::Dgc => &[("velocity", Combine::Mean), ("unsent", Combine::Mean)],
        CompressKind::Powersgd => &[("unsent", Combine::Mean), ("factor", Combine::Mean)],
        _ => &[],
    }
}

impl CompressedExchange {
    /// An exchange over `workers` for `units`.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn new(workers: Group, units: &Units, compress: Compress) -> Result<Self> {
        let shapes: Vec<UnitShapes> = (0..units.units.len()).map(|unit| units.shapes(unit)).collect();
        let lens: Vec<usize> = units.units.iter().map(|unit| unit.len).collect();
        let kept = |&len: &usize| names(compress.kind).iter().map(|_| vec![0.0; len]).collect();
        let thread = Thread::start(Coder::new(workers.clone(), shapes.clone(), compress))?;
        Ok(Self {
            gradients: lens.iter().map(|_| None).collect(),
            kept: lens.iter().map(kept).collect(),
            step: 0,
            in_flight: 0,
            thread: Some(thread),
            time: CommTime::default(),
            workers,
            compress,
            lens,
            shapes,
        })
    }
}

impl Thread {
    fn start(mut coder: Coder) -> Result<Self> {
        let (work, inbox) = channel::<Work>();
        let (outbox, done) = channel();
        let run = move || {
            for mut work in inbox {
                let begun = Instant::now();
                let outcome = coder.mean(work.unit, work.step, &mut work.gradients, &mut work.kept);
                let ended = Instant::now();
                // Fails if the exchange was dropped, and then no one needs the outcome.
                let _ = outbox.send(Done { work, outcome, begun, ended });
            }
        };
        let handle = std::thread::Builder::new().name("compress".into()).spawn(run);
        let handle = handle.map_err(|error| {
            Error::Usage(format!(
                "cannot start the thread that encodes gradients: {error} (`ulimit -u` limits it)"
            ))
        })?;
        Ok(Self { work, done, handle })
    }
}

impl Drop for CompressedExchange {
    fn drop(&mut self) {
        if let Some(Thread { work, done, handle }) = self.thread.take() {
            drop((work, done));
            // If the thread panicked, its message was printed then.
            let _ = handle.join();
        }
    }
}

fn ended() -> Error {
    Error::Usage("the thread that encodes gradients ended; see its message above".into())
}

impl GradientExchange for CompressedExchange {
    fn begin(&mut self, step: u64) {
        self.step = step;
    }

    fn buffer(&mut self, unit: usize) -> Result<Buffer<f32>> {
        match self.gradients[unit].take() {
            Some(buffer) => Ok(buffer),
            None => Ok(self.workers.buffer(self.lens[unit])?),
        }
    }

    fn push(&mut self, unit: usize, gradients: Buffer<f32>) -> Result<()> {
        let kept = std::mem::take(&mut self.kept[unit]);
        let work = Work { unit, step: self.step, gradients, kept };
        let thread = self.thread.as_ref().ok_or_else(ended)?;
        thread.work.send(work).map_err(|_| ended())?;
        self.in_flight += 1;
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        while self.in_flight > 0 {
            let waited = Instant::now();
            let done = &self.thread.as_ref().ok_or_else(ended)?.done;
            let done = waiting("wait for gradients", || done.recv()).map_err(|_| ended())?;
            self.in_flight -= 1;
            self.time.exposed += waited.elapsed();
            self.time.busy += done.ended - done.begun;
            let Work { unit, gradients, kept, .. } = done.work;
            self.gradients[unit] = Some(gradients);
            self.kept[unit] = kept;
            done.outcome?;
        }
        Ok(())
    }

    fn combined(&mut self, unit: usize) -> Option<&mut [f32]> {
        self.gradients[unit].as_deref_mut()
    }

    fn state(&mut self) -> NamedState<'_> {
        let mut all: NamedState<'_> =
            names(self.compress.kind).iter().map(|&(name, combine)| StateOf::worker(name, combine)).collect();
        for kept in &mut self.kept {
            for (state, numbers) in all.iter_mut().zip(kept) {
                state.units.push(numbers);
            }
        }
        all
    }

    fn take_time(&mut self) -> CommTime {
        std::mem::take(&mut self.time)
    }

    fn bytes(&self) -> (usize, usize) {
        let gradients: usize = self.gradients.iter().flatten().map(|buffer| size_of_val(&**buffer)).sum();
        let kept: usize = self.kept.iter().flatten().map(|numbers| size_of_val(numbers.as_slice())).sum();
        let most = self.shapes.iter().map(|shapes| shapes.numbers()).max().unwrap_or(0);
        (gradients + kept, 2 * most * size_of::<f32>())
    }
}

#[cfg(test)]
mod tests;
