//! Prepares batches in a thread while the step before is computed.

use crate::error::{Error, Result};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Items of a producer that runs ahead in a separate thread. Items that were prepared but not taken are dropped, so a
/// checkpoint must store the position of the last item that was taken. Dropping this waits only for the item that is
/// being prepared.
pub struct Prefetch<T> {
    items: Option<Receiver<Result<T>>>,
    thread: Option<JoinHandle<()>>,
    /// Why there is no thread, until the error was returned.
    failed: Option<Error>,
}

impl<T: Send + 'static> Prefetch<T> {
    /// Runs `produce` until it returns none or an error. At most `depth` items are in the queue, and one more waits
    /// for room. If the thread cannot be started, the first [`next`](Self::next) returns the error.
    pub fn new(depth: usize, produce: impl FnMut() -> Result<Option<T>> + Send + 'static) -> Self {
        let (sender, items) = sync_channel(depth);
        let thread = std::thread::Builder::new().name("regatta-batches".into());
        match thread.spawn(move || run(produce, &sender)) {
            Ok(thread) => Self { items: Some(items), thread: Some(thread), failed: None },
            Err(error) => {
                let failed = Error::Usage(format!("cannot start the thread that prepares batches: {error}"));
                Self { items: None, thread: None, failed: Some(failed) }
            }
        }
    }

    /// The next item.
    ///
    /// # Errors
    /// The producer returned an error, panicked (the error has its message), or has no more items.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<T> {
        let ended = || Error::Usage("the preparation of batches has ended: there are no more batches".into());
        match (&self.items, self.failed.take()) {
            (_, Some(failed)) => Err(failed),
            (Some(items), None) => items.recv().unwrap_or_else(|_| Err(ended())),
            (None, None) => Err(ended()),
        }
    }
}

fn run<T>(mut produce: impl FnMut() -> Result<Option<T>>, sender: &SyncSender<Result<T>>) {
    loop {
        // The producer is not called again after a panic, so its state cannot be seen.
        let item = catch_unwind(AssertUnwindSafe(&mut produce)).unwrap_or_else(|panic| {
            Err(Error::Usage(format!("the preparation of batches panicked: {}", message(&*panic))))
        });
        let Some(item) = item.transpose() else { return };
        let last = item.is_err();
        if sender.send(item).is_err() || last {
            return;
        }
    }
}

/// The message of a panic.
fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message")
}

impl<T> Drop for Prefetch<T> {
    fn drop(&mut self) {
        // Without a receiver the producer's next send fails, and it ends.
        drop(self.items.take());
        if let Some(thread) = self.thread.take() {
            // Its panics were caught and returned by `next`.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_in_order_then_the_error() {
        let mut n = 0;
        let mut items = Prefetch::new(2, move || {
            n += 1;
            if n < 5 { Ok(Some(n)) } else { Err(Error::Usage("broken".into())) }
        });
        for expected in 1..5 {
            assert_eq!(items.next().unwrap(), expected);
        }
        assert!(items.next().unwrap_err().to_string().contains("broken"));
        assert!(items.next().is_err());
    }

    #[test]
    fn dropping_early_ends_an_endless_producer_and_a_panic_is_an_error() {
        let mut endless = Prefetch::new(1, || Ok(Some(1)));
        assert_eq!(endless.next().unwrap(), 1);
        drop(endless);
        let mut panics = Prefetch::<u8>::new(1, || panic!("on purpose"));
        assert!(panics.next().unwrap_err().to_string().contains("on purpose"));
        let mut panics = Prefetch::<u8>::new(1, || panic!("index {} of 5", 7));
        assert!(panics.next().unwrap_err().to_string().contains("index 7 of 5"));
        assert!(panics.next().unwrap_err().to_string().contains("no more"));
    }

    #[test]
    fn at_most_depth_items_are_queued() {
        let (called, calls) = std::sync::mpsc::channel();
        let mut n = 0;
        let mut items = Prefetch::new(2, move || {
            n += 1;
            called.send(n).unwrap();
            Ok(Some(n))
        });
        // Two in the queue and one waiting for room; the first item makes room for one more.
        let deadline = std::time::Duration::from_secs(20);
        assert_eq!([1, 2, 3].map(|_| calls.recv_timeout(deadline).unwrap()), [1, 2, 3]);
        assert!(calls.try_recv().is_err());
        assert_eq!(items.next().unwrap(), 1);
        assert_eq!(calls.recv_timeout(deadline).unwrap(), 4);
        drop(items);
        // The thread has ended, because it has dropped its end of the channel.
        assert_eq!(calls.iter().count(), 0);
    }

    #[test]
    fn a_finished_producer_has_no_more() {
        let mut left = vec![3, 2, 1];
        let mut items = Prefetch::new(0, move || Ok(left.pop()));
        assert_eq!([1, 2, 3].map(|_| items.next().unwrap()), [1, 2, 3]);
        assert!(items.next().unwrap_err().to_string().contains("no more"));
    }
}
