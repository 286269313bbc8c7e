//! A group's part of the connections to its peers.

use super::connection::{Blocked, Connection};
use super::receiving::Channel;
use std::sync::Arc;

/// Bytes that go over one connection before the next one's turn comes, where a pair has several.
const STRIPE: u64 = 256 << 10;

/// A group's part of the connections to one peer, which take turns.
#[derive(Default)]
pub(super) struct Link {
    /// None before the pair is connected.
    pub lines: Vec<Line>,
    /// Bytes ever sent.
    pub sent: u64,
    /// Bytes ever received.
    pub received: u64,
    /// Why the last send did not go on.
    pub blocked: Option<Blocked>,
}

/// A group's part of one connection.
pub(super) struct Line {
    pub connection: Arc<Connection>,
    pub channel: Arc<Channel>,
    pub inbox: usize,
    /// The last send that lent memory.
    pub lent: Option<u32>,
}

impl Link {
    /// The connection whose turn it is after `bytes`, and how many bytes it has left.
    pub(super) fn turn(&self, bytes: u64) -> (usize, usize) {
        match self.lines.len() {
            1 => (0, usize::MAX),
            count => ((bytes / STRIPE) as usize % count, (STRIPE - bytes % STRIPE) as usize),
        }
    }

    /// The line to send on, and the one to receive from.
    pub(super) fn sending(&self) -> Option<&Line> {
        (!self.lines.is_empty()).then(|| &self.lines[self.turn(self.sent).0])
    }

    pub(super) fn receiving(&self) -> Option<&Line> {
        (!self.lines.is_empty()).then(|| &self.lines[self.turn(self.received).0])
    }
}

impl Line {
    /// Whether something has yet to leave, or memory is lent; gets on with both.
    pub(super) fn unsent(&mut self) -> std::io::Result<bool> {
        #[cfg_attr(not(target_os = "linux"), expect(unused_mut, reason = "nothing is lent there"))]
        let mut unsent = !self.connection.flush()?;
        #[cfg(target_os = "linux")]
        if let Some(mark) = self.lent {
            match self.connection.is_back(mark)? {
                true => self.lent = None,
                false => unsent = true,
            }
        }
        Ok(unsent)
    }
}
