//! The end of connections. A socket that is closed with unread bytes resets its connection, and what it has yet to send
//! is lost; credit that the peer returns may come at any time. So this side says that it sends no more, reads on, and
//! closes when the peer's system has everything.

use super::connection::Connection;
use crate::member::health::Health;
use crate::member::timer::Timer;
use std::sync::Arc;
use std::time::Duration;

/// How often it is looked whether the peer's system has everything: there is no event to wait for.
const LOOK: Duration = Duration::from_millis(1);

/// Ends connections, each with a rank of the world.
pub(super) fn linger(mut ending: Vec<(usize, Arc<Connection>)>, patience: Duration, health: &Health) {
    for (_, connection) in &ending {
        // A peer that takes nothing more has ended as well.
        let _ = connection.flush();
        connection.stream.end_sending();
    }
    let timer = Timer::new(patience);
    loop {
        ending.retain(|(peer, connection)| !has_everything(connection) && !health.has_left(*peer));
        if ending.is_empty() || timer.is_over() || health.check().is_err() {
            return;
        }
        std::thread::sleep(LOOK);
    }
}

/// Whether the peer's system has all that was sent, or nobody wants it; discards what has come.
fn has_everything(connection: &Connection) -> bool {
    connection.stream.discard() || is_sent(connection)
}

/// Whether nothing is left in the socket that the peer's system has not confirmed.
#[cfg(target_os = "linux")]
fn is_sent(connection: &Connection) -> bool {
    use std::os::fd::{AsFd, AsRawFd};
    let mut left: libc::c_int = 0;
    let socket = connection.stream.as_fd().as_raw_fd();
    // SAFETY: this request writes an int, which lives through the call.
    let outcome = unsafe { libc::ioctl(socket, libc::TIOCOUTQ, &raw mut left) };
    outcome != 0 || left <= 1
}

#[cfg(not(target_os = "linux"))]
fn is_sent(_: &Connection) -> bool {
    false
}
