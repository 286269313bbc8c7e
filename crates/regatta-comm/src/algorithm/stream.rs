//! Messages over the byte streams between ranks. Each begins with the call it belongs to, so that a rank that
//! is in another operation is noticed.

use super::Context;
use crate::call::{Call, ENCODED, show};
use crate::error::{Error, Result};
use crate::health::{SLICE, Wait};
use crate::transport::Transport;

/// A wait in one operation on streams.
pub(crate) struct Streams<'a> {
    pub transport: &'a mut dyn Transport,
    pub context: &'a Context,
    pub call: Call,
}

impl Streams<'_> {
    /// Sleeps until sending to `to` or receiving from `from` may go on.
    pub(crate) fn sleep(
        &mut self,
        to: Option<usize>,
        from: Option<usize>,
        wait: &mut Wait<'_>,
    ) -> Result<()> {
        if let Some(peer) = from.or(to) {
            wait.check(self.context.names[peer], self.call)?;
        }
        self.transport.wait(to, from, SLICE)
    }

    /// Checks the call that rank `from` has sent.
    pub(crate) fn check(&self, from: usize, header: [u8; ENCODED]) -> Result<()> {
        let theirs = Call::from_bytes(header);
        if theirs == Some(self.call) {
            return Ok(());
        }
        let context = self.context;
        Err(Error::Mismatch {
            rank: context.names[context.rank],
            call: self.call.to_string(),
            other: context.names[from],
            other_call: show(theirs),
        })
    }

    /// Sends one message to `to` and receives one from `from`, at the same time.
    pub(crate) fn exchange(
        &mut self,
        to: Option<(usize, &[u8])>,
        from: Option<(usize, &mut [u8])>,
    ) -> Result<()> {
        let header = self.call.to_bytes();
        let context = self.context;
        let mut wait = Wait::new(&context.health, context.deadline);
        let mut out = to.map(|(to, payload)| (to, [header.as_slice(), payload], 0usize));
        let mut theirs = [0u8; ENCODED];
        let mut read = 0usize;
        let (from, buffer) = match from {
            Some((from, buffer)) => (Some(from), buffer),
            None => (None, &mut [][..]),
        };
        let total = ENCODED + buffer.len();
        loop {
            let mut moved = 0;
            let mut to = None;
            if let Some((peer, parts, sent)) = &mut out {
                let left = match sent.checked_sub(ENCODED) {
                    None => &parts[0][*sent..],
                    Some(at) => &parts[1][at..],
                };
                if !left.is_empty() {
                    moved = self.transport.try_send(*peer, left)?;
                    *sent += moved;
                }
                if *sent < ENCODED + parts[1].len() {
                    to = Some(*peer);
                }
            }
            let mut waiting = None;
            if let Some(peer) = from.filter(|_| read < total) {
                let target = if read < ENCODED { &mut theirs[read..] } else { &mut buffer[read - ENCODED..] };
                let got = self.transport.try_recv(peer, target)?;
                read += got;
                moved += got;
                if read == ENCODED && got > 0 {
                    self.check(peer, theirs)?;
                }
                waiting = Some(peer).filter(|_| read < total);
            }
            if to.is_none() && waiting.is_none() {
                return Ok(());
            }
            if moved > 0 {
                wait.progress();
            } else {
                self.sleep(to, waiting, &mut wait)?;
            }
        }
    }
}

/// Dissemination barrier (Hensgen, Finkel & Manber 1988): ceil(log2 n) rounds of one small message each.
pub(crate) fn barrier(transport: &mut dyn Transport, context: &Context, call: Call) -> Result<()> {
    let (rank, size) = (context.rank, context.size);
    let mut streams = Streams { transport, context, call };
    let mut distance = 1;
    while distance < size {
        let (to, from) = ((rank + distance) % size, (rank + size - distance) % size);
        streams.exchange(Some((to, &[])), Some((from, &mut [])))?;
        distance *= 2;
    }
    Ok(())
}
