//! Messages with tags between any two ranks of a group, from any source: for a parameter server, say.
//!
//! A message is a [call](Call) in its encoded form, whose root is the tag, and its bytes. Whoever waits reads what comes from
//! any peer, and keeps what nobody has asked for yet. So a rank that sends also reads: two ranks that send to each other at
//! once do not wait for each other.

use crate::error::{Error, Result};
use crate::member::call::{Call, ENCODED, Kind, show};
use crate::member::context::Context;
use crate::member::health::SLICE;
use crate::member::wait::Wait;
use crate::numbers::element::DType;
use crate::numbers::sized::filled;
use crate::transport::Transport;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A message that has come.
pub(crate) struct Arrived {
    pub from: usize,
    pub tag: u32,
    pub dtype: DType,
    /// Elements.
    pub len: usize,
    /// Their bytes, and what fills the last word.
    pub words: Vec<i64>,
    spare: Spare,
}

impl Drop for Arrived {
    fn drop(&mut self) {
        self.spare.put(std::mem::take(&mut self.words));
    }
}

/// Memory of messages that were read, for the next ones: where they come in every step, clearing new memory would take as
/// long as receiving.
#[derive(Clone, Default)]
struct Spare(Arc<Mutex<Vec<Vec<i64>>>>);

impl Spare {
    /// So many messages' memory is kept.
    const MOST: usize = 64;

    /// Memory for `len` words, whatever they are.
    fn take(&self, len: usize, what: &str) -> Result<Vec<i64>> {
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = spare.iter().position(|words| (len..=2 * len).contains(&words.len())) {
            let mut words = spare.swap_remove(index);
            words.truncate(len);
            return Ok(words);
        }
        drop(spare);
        filled(len, 0, what)
    }

    fn put(&self, words: Vec<i64>) {
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !words.is_empty() {
            if spare.len() == Self::MOST {
                spare.remove(0);
            }
            spare.push(words);
        }
    }
}

/// Which messages are wanted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Filter {
    /// None: from any rank.
    pub from: Option<usize>,
    /// None: with any tag.
    pub tag: Option<u32>,
}

impl Filter {
    fn suits(self, message: &Arrived) -> bool {
        self.from.is_none_or(|from| from == message.from) && self.tag.is_none_or(|tag| tag == message.tag)
    }
}

/// What is coming from one peer.
struct Incoming {
    header: [u8; ENCODED],
    headed: usize,
    /// The message whose header is there.
    message: Option<Arrived>,
    got: usize,
}

impl Default for Incoming {
    fn default() -> Self {
        Self { header: [0; ENCODED], headed: 0, message: None, got: 0 }
    }
}

/// All messages of one rank in one group.
pub(crate) struct Messages {
    transport: Box<dyn Transport + Send>,
    incoming: Vec<Incoming>,
    arrived: VecDeque<Arrived>,
    spare: Spare,
}

impl Messages {
    /// Over `transport`, which carries nothing else.
    pub(crate) fn new(transport: Box<dyn Transport + Send>, size: usize) -> Self {
        let incoming = (0..size).map(|_| Incoming::default()).collect();
        Self { transport, incoming, arrived: VecDeque::new(), spare: Spare::default() }
    }

    /// Sends `bytes` as what `call` says: its length in elements, its root as the tag.
    pub(crate) fn send(&mut self, context: &Context, call: Call, bytes: &[u8], to: usize) -> Result<()> {
        let header = call.to_bytes();
        let (mut headed, mut out) = (0, 0);
        let mut wait = Wait::new(context);
        // The caller may write the numbers again once this returns, before the peer has them.
        self.transport.lend(false);
        self.transport.enter(bytes.len());
        while headed < ENCODED || out < bytes.len() {
            let taken = self.transport.try_send(to, [&header[headed..], &bytes[out..]])?;
            let of_header = taken.min(ENCODED - headed);
            headed += of_header;
            out += taken - of_header;
            if taken > 0 || self.pull(context, None, call)? {
                wait.progress();
                continue;
            }
            wait.check(to, call)?;
            let from = self.others(context);
            self.transport.wait(&[to], &from, SLICE)?;
        }
        self.flush(context, &mut wait, call)
    }

    /// Waits until what was sent has left. A peer that has left the job meanwhile has taken what it wanted.
    fn flush(&mut self, context: &Context, wait: &mut Wait<'_>, call: Call) -> Result<()> {
        loop {
            match self.transport.unsent() {
                Ok(None) => return Ok(()),
                Ok(Some(peer)) if context.health.has_left(context.names[peer]) => return Ok(()),
                Ok(Some(peer)) => {
                    wait.check(peer, call)?;
                    self.transport.wait(&[peer], &[], SLICE)?;
                }
                Err(Error::PeerDied { rank, .. }) => match context.health.closed(rank, &call) {
                    Error::Left { .. } => return Ok(()),
                    error => return Err(error),
                },
                Err(error) => return Err(error),
            }
        }
    }

    /// The first message that `wanted` suits: of each peer and tag they come in the order in which they were sent. None
    /// where `limit` has passed; without a limit the group's deadline is one, and an error.
    pub(crate) fn receive(
        &mut self,
        context: &Context,
        wanted: Filter,
        call: Call,
        limit: Option<Duration>,
    ) -> Result<Option<Arrived>> {
        let begun = Instant::now();
        let mut wait = Wait::new(context);
        loop {
            if let Some(index) = self.arrived.iter().position(|message| wanted.suits(message)) {
                return Ok(self.arrived.remove(index));
            }
            if self.pull(context, wanted.from, call)? {
                wait.progress();
                continue;
            }
            let left = limit.map(|limit| limit.saturating_sub(begun.elapsed()));
            match left {
                Some(Duration::ZERO) => {
                    context.health.check()?;
                    return Ok(None);
                }
                Some(_) => context.health.check()?,
                None => wait.check(self.awaited(context, wanted.from), call)?,
            }
            let from = self.others(context);
            self.transport.wait(&[], &from, left.unwrap_or(SLICE).min(SLICE))?;
        }
    }

    /// A rank that a message may still come from.
    fn awaited(&self, context: &Context, from: Option<usize>) -> usize {
        from.or_else(|| self.others(context).first().copied()).unwrap_or(context.rank)
    }

    /// All other ranks that have not left; all others where none is left.
    fn others(&self, context: &Context) -> Vec<usize> {
        let other = |&rank: &usize| rank != context.rank && !context.health.has_left(context.names[rank]);
        let others: Vec<usize> = (0..context.size).filter(other).collect();
        if others.is_empty() {
            (0..context.size).filter(|&rank| rank != context.rank).collect()
        } else {
            others
        }
    }

    /// Reads what has come; whether anything has. A peer that has left, and from which no message is wanted (`wanted`) or
    /// half there, is no failure.
    fn pull(&mut self, context: &Context, wanted: Option<usize>, call: Call) -> Result<bool> {
        let mut moved = false;
        for peer in (0..context.size).filter(|&peer| peer != context.rank) {
            match self.pull_from(context, peer) {
                Ok(some) => moved |= some,
                Err(Error::PeerDied { rank, .. })
                    if wanted != Some(peer) && self.incoming[peer].headed == 0 =>
                {
                    match context.health.closed(rank, &call) {
                        Error::Left { .. } => {}
                        error => return Err(error),
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(moved)
    }

    /// Reads what has come from `peer`. An error after something has come is left for the next call.
    fn pull_from(&mut self, context: &Context, peer: usize) -> Result<bool> {
        let mut moved = false;
        loop {
            match self.read_once(context, peer) {
                Ok(true) => moved = true,
                Err(error) if !moved => return Err(error),
                Ok(false) | Err(_) => return Ok(moved),
            }
        }
    }

    /// Reads a header or numbers from `peer` once; whether anything has come.
    fn read_once(&mut self, context: &Context, peer: usize) -> Result<bool> {
        let incoming = &mut self.incoming[peer];
        let count = match &mut incoming.message {
            None => {
                let count =
                    self.transport.try_recv(peer, [&mut incoming.header[incoming.headed..], &mut []])?;
                incoming.headed += count;
                if incoming.headed == ENCODED {
                    incoming.message = Some(announced(context, peer, &incoming.header, &self.spare)?);
                    incoming.got = 0;
                }
                count
            }
            Some(message) => {
                let bytes = message.len * message.dtype.bytes();
                let body = &mut bytemuck::cast_slice_mut::<i64, u8>(&mut message.words)[..bytes];
                let count = self.transport.try_recv(peer, [&mut body[incoming.got..], &mut []])?;
                incoming.got += count;
                count
            }
        };
        let whole = |message: &mut Arrived| incoming.got == message.len * message.dtype.bytes();
        if let Some(message) = incoming.message.take_if(whole) {
            incoming.headed = 0;
            self.arrived.push_back(message);
        }
        Ok(count > 0)
    }
}

/// The message that `header` announces, with room for its bytes.
fn announced(context: &Context, from: usize, header: &[u8; ENCODED], spare: &Spare) -> Result<Arrived> {
    let call = Call::from_bytes(header);
    let name = context.names[from];
    let Some(Call { kind: Kind::Send, dtype, root: tag, len, .. }) = call else {
        return Err(Error::Internal(format!("rank {name} sent {} where a message was due", show(call))));
    };
    let what = format!("a message of rank {name} with tag {tag}");
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let bytes = len.saturating_mul(dtype.bytes());
    Ok(Arrived { from, tag, dtype, len, words: spare.take(bytes.div_ceil(8), &what)?, spare: spare.clone() })
}
