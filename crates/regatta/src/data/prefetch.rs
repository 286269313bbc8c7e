//! Preparing batches in a thread while the step before computes.

use crate::error::{Error, Result};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Items of a producer that runs ahead in a thread of its own. What was prepared but not taken is forgotten, so
/// an item that carries its position makes a checkpoint exact.
pub struct Prefetch<T> {
    items: Option<Receiver<Result<T>>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Prefetch<T> {
    /// Runs `produce` at most `depth` items ahead, until it returns nothing or an error.
    pub fn new(depth: usize, produce: impl FnMut() -> Result<Option<T>> + Send + 'static) -> Self {
        let (sender, items) = sync_channel(depth);
        let thread = std::thread::spawn(move || run(produce, &sender));
        Self { items: Some(items), thread: Some(thread) }
    }

    /// The next item.
    ///
    /// # Errors
    /// The producer's error, or that it has no more (or panicked).
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<T> {
        let ended =
            || Error::Usage("the preparation of batches has ended: it ran out of data or panicked".into());
        self.items.as_ref().ok_or_else(ended)?.recv().unwrap_or_else(|_| Err(ended()))
    }
}

fn run<T>(mut produce: impl FnMut() -> Result<Option<T>>, sender: &SyncSender<Result<T>>) {
    loop {
        let (item, last) = match produce() {
            Ok(Some(item)) => (Ok(item), false),
            Ok(None) => return,
            Err(error) => (Err(error), true),
        };
        if sender.send(item).is_err() || last {
            return;
        }
    }
}

impl<T> Drop for Prefetch<T> {
    fn drop(&mut self) {
        // Without a receiver the producer's next send fails, and it ends.
        drop(self.items.take());
        if let Some(thread) = self.thread.take() {
            // Its panic was reported to whoever asked for the next item.
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
        assert!(panics.next().is_err());
    }
}
