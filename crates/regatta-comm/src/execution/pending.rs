//! The caller's side of an operation with a handle.

use crate::error::{Error, Result};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

/// When an operation was submitted, began and ended.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Submitted.
    pub queued: Instant,
    /// Its turn came.
    pub started: Instant,
    /// Done.
    pub finished: Instant,
}

/// An operation that has been submitted. Dropping it does not cancel the operation.
///
/// It is a [`Future`], too: under any executor `group.all_reduce_async(data, op).await` is what [`wait`](Self::wait) is
/// without one.
#[must_use = "wait for the operation: its buffer comes back from there"]
pub struct Pending<B> {
    place: Arc<Place<B>>,
}

/// Where the outcome goes from the communication thread to the caller.
struct Place<B> {
    state: Mutex<State<B>>,
    done: Condvar,
}

enum State<B> {
    /// The task to wake when it is done.
    Open(Option<Waker>),
    Done(Result<B>, Timing),
    /// The thread has ended without it.
    Lost,
    /// The caller has the outcome already.
    Taken,
}

impl<B> Place<B> {
    fn lock(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B> State<B> {
    fn is_open(&self) -> bool {
        matches!(self, Self::Open(_))
    }

    fn take(&mut self) -> Result<(B, Timing)> {
        match std::mem::replace(self, Self::Taken) {
            Self::Done(result, timing) => Ok((result?, timing)),
            Self::Taken => Err(Error::Usage("the outcome of an operation was taken twice".into())),
            Self::Open(_) | Self::Lost => {
                Err(Error::Internal("the communication thread ended before an operation".into()))
            }
        }
    }
}

impl<B> Pending<B> {
    /// The side of the caller, and that of the communication thread.
    pub(super) fn new() -> (Self, Completion<B>) {
        let place = Arc::new(Place { state: Mutex::new(State::Open(None)), done: Condvar::new() });
        (Self { place: place.clone() }, Completion { place })
    }

    /// Waits until the operation is done and returns its buffer.
    ///
    /// # Errors
    /// What the operation met; the buffer is then lost.
    pub fn wait(self) -> Result<B> {
        self.wait_timed().map(|(buffer, _)| buffer)
    }

    /// As [`wait`](Self::wait), with the times.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn wait_timed(self) -> Result<(B, Timing)> {
        let state = self.place.done.wait_while(self.place.lock(), |state| state.is_open());
        state.unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether [`wait`](Self::wait) would return at once.
    pub fn is_done(&self) -> bool {
        !self.place.lock().is_open()
    }
}

impl<B> Future for Pending<B> {
    type Output = Result<B>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.place.lock();
        match &mut *state {
            State::Open(waker) => {
                match waker {
                    // Most tasks are polled with one waker all the time.
                    Some(waker) => waker.clone_from(context.waker()),
                    None => *waker = Some(context.waker().clone()),
                }
                Poll::Pending
            }
            done => Poll::Ready(done.take().map(|(buffer, _)| buffer)),
        }
    }
}

impl<B> fmt::Debug for Pending<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_done() { "Pending(done)" } else { "Pending" })
    }
}

/// The communication thread's side.
pub(super) struct Completion<B> {
    place: Arc<Place<B>>,
}

impl<B> Completion<B> {
    pub(super) fn complete(self, result: Result<B>, timing: Timing) {
        self.end(State::Done(result, timing));
    }

    fn end(&self, outcome: State<B>) {
        let mut state = self.place.lock();
        if !state.is_open() {
            return;
        }
        let before = std::mem::replace(&mut *state, outcome);
        drop(state);
        self.place.done.notify_all();
        if let State::Open(Some(waker)) = before {
            waker.wake();
        }
    }
}

impl<B> Drop for Completion<B> {
    fn drop(&mut self) {
        // Where it was not completed nobody ever will.
        self.end(State::Lost);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Buffer, Group, ReduceOp};
    use std::task::Wake;
    use std::thread::Thread;

    struct Unpark(Thread);

    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    /// The smallest executor.
    fn block_on<F: Future + Unpin>(mut future: F) -> F::Output {
        let waker = Arc::new(Unpark(std::thread::current())).into();
        loop {
            match Pin::new(&mut future).poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(outcome) => return outcome,
                Poll::Pending => std::thread::park(),
            }
        }
    }

    #[test]
    fn operations_are_awaited() {
        let rank = |group: Group| {
            let both = async {
                let first = group.all_reduce_async(Buffer::from(vec![1.0f32; 100_000]), ReduceOp::Sum);
                let second = group.all_reduce_async(first.await?, ReduceOp::Sum);
                second.await
            };
            let sums = block_on(Box::pin(both)).unwrap();
            assert!(sums.iter().all(|&sum| sum == 9.0));
            let mut barrier = group.barrier_async();
            block_on(&mut barrier).unwrap();
            let error = block_on(barrier).unwrap_err();
            assert!(error.to_string().contains("twice"), "{error}");
        };
        std::thread::scope(|scope| {
            for group in Group::threads(3) {
                scope.spawn(move || rank(group));
            }
        });
    }

    #[test]
    fn what_nobody_completes_is_an_error() {
        let (pending, completion) = Pending::<()>::new();
        assert!(!pending.is_done());
        drop(completion);
        assert!(pending.is_done() && matches!(pending.wait(), Err(Error::Internal(_))));
    }
}
