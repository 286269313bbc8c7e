//! Connections that have not said yet who they are: a crowd of them must not hold ranks out.

use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, TcpStream};

/// In the order in which they have come.
#[derive(Default)]
pub(super) struct Unidentified {
    next: u64,
    waiting: VecDeque<(u64, TcpStream)>,
}

impl Unidentified {
    /// Takes note of a connection; when there are more than `most`, the oldest is ended.
    pub(super) fn admit(&mut self, stream: &TcpStream, most: usize) -> io::Result<u64> {
        self.next += 1;
        self.waiting.push_back((self.next, stream.try_clone()?));
        if self.waiting.len() > most
            && let Some((_, oldest)) = self.waiting.pop_front()
        {
            // It may have ended by itself.
            let _ = oldest.shutdown(Shutdown::Both);
        }
        Ok(self.next)
    }

    pub(super) fn known(&mut self, number: u64) {
        self.waiting.retain(|(waiting, _)| *waiting != number);
    }
}
