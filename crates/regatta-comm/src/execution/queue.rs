//! Asynchronous operations: a thread per group that executes them in the order of submission.
//!
#![doc = include_str!("queue.md")]

use crate::error::{Error, Result};
use crate::execution::pending::{Pending, Timing};
use crate::execution::promptness::be_prompt;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

type Work = Box<dyn FnOnce() + Send>;

/// The thread and what it has yet to do.
#[derive(Default)]
pub(crate) struct Queue {
    worker: Mutex<Option<(Sender<Work>, JoinHandle<()>)>>,
    open: Arc<Open>,
    /// Something has been submitted.
    used: AtomicBool,
}

#[derive(Default)]
struct Open {
    count: Mutex<usize>,
    none: Condvar,
}

/// An operation that has been submitted and is not over.
struct Opened(Arc<Open>);

impl Opened {
    fn new(open: Arc<Open>) -> Self {
        *open.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Self(open)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let mut count = self.0.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count -= 1;
        if *count == 0 {
            self.0.none.notify_all();
        }
    }
}

/// Starts the thread.
fn start() -> std::io::Result<(Sender<Work>, JoinHandle<()>)> {
    let (queue, works) = channel::<Work>();
    let thread = std::thread::Builder::new().name("regatta-comm".into()).spawn(move || {
        be_prompt();
        works.into_iter().for_each(|work| work());
    })?;
    Ok((queue, thread))
}

/// What a panic said.
pub(crate) fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

impl Queue {
    /// Runs `operation` on the thread, after everything submitted before. Where it panics, or there is no thread to run
    /// it, its outcome is what `failed` makes of the reason.
    pub(crate) fn submit<B: Send + 'static>(
        &self,
        operation: impl FnOnce() -> Result<B> + Send + 'static,
        failed: impl Fn(&str) -> Error + Send + 'static,
    ) -> Pending<B> {
        self.used.store(true, Ordering::Release);
        let (pending, completion) = Pending::new();
        let queued = Instant::now();
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        if worker.is_none() {
            match start() {
                Ok(started) => *worker = Some(started),
                Err(error) => {
                    let reason = format!(
                        "cannot start the communication thread: {error} (`ulimit -u` and the control group's pids.max limit \
                         the number of threads)"
                    );
                    let now = Instant::now();
                    let timing = Timing { queued, started: now, finished: now };
                    completion.complete(Err(failed(&reason)), timing);
                    return pending;
                }
            }
        }
        let open = Opened::new(self.open.clone());
        let work: Work = Box::new(move || {
            // However it ends, it is over.
            let _open = open;
            let started = Instant::now();
            // After a panic nothing of the operation is used any more but the reason.
            let result = catch_unwind(AssertUnwindSafe(operation)).unwrap_or_else(|panic| {
                Err(failed(&format!("the communication thread panicked: {}", message(&*panic))))
            });
            let timing = Timing { queued, started, finished: Instant::now() };
            completion.complete(result, timing);
        });
        if let Some((queue, _)) = &*worker {
            // The thread ends only with the queue.
            let _ = queue.send(work);
        }
        pending
    }

    /// Waits until everything submitted is done.
    pub(crate) fn drain(&self) {
        if !self.used.load(Ordering::Acquire) {
            return;
        }
        let count = self.open.count.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.open.none.wait_while(count, |count| *count > 0));
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if let Some((queue, thread)) = self.worker.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            drop(queue);
            // Every operation ends: at the latest by its deadline.
            let _ = thread.join();
        }
    }
}
