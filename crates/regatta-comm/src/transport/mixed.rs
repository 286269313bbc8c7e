//! Ranks as processes on several hosts: shared memory inside each, TCP between them.

use super::shared::Shared;
use super::tcp::TcpTransport;
use super::{Transport, TransportKind};
use crate::error::Result;
use std::time::{Duration, Instant};

/// Longest sleep on sockets while memory may change, too.
const BOTH: Duration = Duration::from_micros(500);

/// The endpoint of one process.
pub(crate) struct MixedTransport {
    pub(crate) local: Shared,
    pub(crate) across: TcpTransport,
    /// The rank within this host, for ranks on it.
    pub(crate) places: Vec<Option<usize>>,
    pub(crate) patience: Duration,
}

impl Transport for MixedTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Mixed
    }

    fn try_send(&mut self, to: usize, parts: [&[u8]; 2]) -> Result<usize> {
        match self.places[to] {
            Some(place) => Ok(self.local.try_send(place, parts)),
            None => self.across.try_send(to, parts),
        }
    }

    fn try_recv(&mut self, from: usize, parts: [&mut [u8]; 2]) -> Result<usize> {
        match self.places[from] {
            Some(place) => Ok(self.local.try_recv(place, parts)),
            None => self.across.try_recv(from, parts),
        }
    }

    fn wait(&mut self, to: &[usize], from: &[usize], timeout: Duration) -> Result<()> {
        let here = |ranks: &[usize]| ranks.iter().filter_map(|&rank| self.places[rank]).collect::<Vec<_>>();
        let there = |ranks: &[usize]| {
            ranks.iter().copied().filter(|&rank| self.places[rank].is_none()).collect::<Vec<_>>()
        };
        let (to_here, from_here) = (here(to), here(from));
        let (to_there, from_there) = (there(to), there(from));
        if to_there.is_empty() && from_there.is_empty() {
            self.local.wait(&to_here, &from_here, timeout);
            return Ok(());
        }
        if to_here.is_empty() && from_here.is_empty() {
            return self.across.sleep(&to_there, &from_there, timeout, true);
        }
        // Memory cannot be polled together with sockets: look at the one between short sleeps on the other.
        let until = Instant::now() + timeout.min(BOTH);
        let looking = Instant::now() + self.patience;
        loop {
            let now = Instant::now();
            if self.local.is_ready(&to_here, &from_here) || now >= until {
                return Ok(());
            }
            if now < looking {
                if self.across.is_ready(&to_there, &from_there)? {
                    return Ok(());
                }
                std::thread::yield_now();
            } else {
                self.across.sleep(&to_there, &from_there, BOTH, false)?;
                return Ok(());
            }
        }
    }

    fn unsent(&mut self) -> Result<Option<usize>> {
        self.across.unsent()
    }

    fn lend(&mut self, allowed: bool) {
        self.across.lend(allowed);
    }

    fn enter(&mut self, bytes: usize) {
        self.across.enter(bytes);
    }

    fn has_waited(&mut self, waited: Duration) {
        self.across.has_waited(waited);
    }

    fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
        self.local.set_patience(patience);
        self.across.set_patience(patience);
    }

    fn shared(&mut self) -> Option<&mut Shared> {
        Some(&mut self.local)
    }

    fn split(&mut self) -> Option<(&mut Shared, &mut (dyn Transport + Send))> {
        Some((&mut self.local, &mut self.across))
    }
}
