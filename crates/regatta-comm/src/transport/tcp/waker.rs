//! How a thread that waits in one group learns that another thread of this rank has done something for it.
//!
//! A waker has three states. A thread goes to sleep only from `AWAKE`; whoever has changed something sets `NOTIFIED`
//! after the change, and signals the descriptor where the thread was asleep. So a change that comes after the thread
//! has looked, and before it sleeps, ends the sleep at once.

use std::sync::atomic::{AtomicU8, Ordering};

const AWAKE: u8 = 0;
const ASLEEP: u8 = 1;
const NOTIFIED: u8 = 2;

/// Of the one thread that works in a group at a time.
#[derive(Debug)]
pub(super) struct Waker {
    state: AtomicU8,
    /// What the thread polls beside its connections, and what others write to; one descriptor for both on Linux.
    #[cfg(unix)]
    signal: Signal,
}

impl Waker {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            state: AtomicU8::new(AWAKE),
            #[cfg(unix)]
            signal: Signal::new()?,
        })
    }

    /// Something has changed for the thread.
    pub(super) fn wake(&self) {
        if self.state.swap(NOTIFIED, Ordering::AcqRel) == ASLEEP {
            #[cfg(unix)]
            self.signal.set();
        }
    }

    /// Whether somebody has woken the thread, which does not sleep, since it last slept or asked.
    pub(super) fn is_notified(&self) -> bool {
        self.state.load(Ordering::Acquire) == NOTIFIED && self.state.swap(AWAKE, Ordering::AcqRel) == NOTIFIED
    }

    /// The thread is about to sleep; false where it must not, as something has changed.
    pub(super) fn doze(&self) -> bool {
        let asleep = self.state.compare_exchange(AWAKE, ASLEEP, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if !asleep {
            self.state.store(AWAKE, Ordering::Release);
        }
        asleep
    }

    /// The thread is awake again; whether somebody has woken it.
    pub(super) fn rise(&self) -> bool {
        let woken = self.state.swap(AWAKE, Ordering::AcqRel) == NOTIFIED;
        #[cfg(unix)]
        if woken {
            self.signal.clear();
        }
        woken
    }

    /// What becomes readable when somebody wakes the sleeping thread.
    #[cfg(unix)]
    pub(super) fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.signal.fd()
    }
}

#[cfg(target_os = "linux")]
#[derive(Debug)]
struct Signal(std::os::fd::OwnedFd);

#[cfg(target_os = "linux")]
impl Signal {
    fn new() -> std::io::Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    fn set(&self) {
        // It fails only where the counter is full, and then the descriptor is readable, too.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    fn clear(&self) {
        let mut count = [0; 8];
        // Whoever has set the state may not have written yet; then the next sleep is short.
        let _ = rustix::io::read(&self.0, &mut count);
    }

    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.0)
    }
}

#[cfg(all(unix, not(target_os = "linux")))]
#[derive(Debug)]
struct Signal(std::os::unix::net::UnixStream, std::os::unix::net::UnixStream);

#[cfg(all(unix, not(target_os = "linux")))]
impl Signal {
    fn new() -> std::io::Result<Self> {
        let (read, write) = std::os::unix::net::UnixStream::pair()?;
        read.set_nonblocking(true)?;
        write.set_nonblocking(true)?;
        Ok(Self(read, write))
    }

    fn set(&self) {
        // It fails only where the buffer is full, and then the other end is readable, too.
        let _ = rustix::io::write(&self.1, &[1]);
    }

    fn clear(&self) {
        let mut bytes = [0; 64];
        while matches!(rustix::io::read(&self.0, &mut bytes), Ok(64)) {}
    }

    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_before_the_sleep_ends_it() {
        let waker = Waker::new().unwrap();
        assert!(waker.doze());
        waker.rise();
        waker.wake();
        assert!(!waker.doze() && waker.doze());
        waker.wake();
        waker.rise();
        assert!(waker.doze());
        waker.rise();
        assert!(!waker.is_notified());
        waker.wake();
        assert!(waker.is_notified() && !waker.is_notified() && waker.doze());
    }
}
