//! Messages with tags, from any source.

use crate::algorithm::messages::{Arrived, Filter, Messages};
use crate::error::{Error, Result};
use crate::job::Job;
use crate::member::call::{Call, Kind};
use crate::member::context::Context;
use crate::numbers::element::{DType, Element};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Sends messages to ranks of a group, and receives them from any of them: for a parameter server, or for work that is handed
/// out. Made by [`Group::mailbox`](crate::Group::mailbox).
///
/// A message has a type, a length, and a tag that the sender chooses. The receiver need not know who sends next, nor how
/// much. Messages of one sender with one tag arrive in the order in which they were sent. A mailbox is independent of the
/// group's operations, which may go on at the same time.
///
/// Calls of several threads take turns, also while one waits for a message: a thread that receives while another one sends
/// needs a mailbox of its own.
///
/// ```
/// # use regatta_comm::Group;
/// # let ranks: Vec<_> = Group::threads(3).into_iter().map(|group| std::thread::spawn(move || {
/// const PUSH: u32 = 1;
/// const PULL: u32 = 2;
/// let mailbox = group.mailbox()?;
/// if group.rank() == 0 {
///     let mut sum = 0.0;
///     for _ in 1..group.size() {
///         let message = mailbox.recv(None, Some(PUSH))?;
///         sum += message.numbers::<f32>()?[0];
///         mailbox.send(&[sum], message.from(), PULL)?;
///     }
///     assert_eq!(sum, 3.0);
/// } else {
///     mailbox.send(&[group.rank() as f32], 0, PUSH)?;
///     assert!(mailbox.recv(Some(0), Some(PULL))?.numbers::<f32>()?[0] >= 1.0);
/// }
/// # Ok::<_, regatta_comm::Error>(())
/// # })).collect();
/// # for rank in ranks { rank.join().unwrap()?; }
/// # Ok::<(), regatta_comm::Error>(())
/// ```
pub struct Mailbox {
    job: Arc<Job>,
    context: Context,
    group: u32,
    state: Mutex<State>,
}

struct State {
    messages: Messages,
    failed: Option<Error>,
    /// Messages sent, and messages asked for.
    counts: [u32; 2],
}

/// A message that was received.
pub struct Message(Arrived);

impl Message {
    /// The rank of the group that sent it.
    pub fn from(&self) -> usize {
        self.0.from
    }

    /// The tag that the sender gave it.
    pub fn tag(&self) -> u32 {
        self.0.tag
    }

    /// The type of its numbers.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// How many numbers it has.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether it has no numbers.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its numbers.
    ///
    /// # Errors
    /// Another type than the sender's.
    pub fn numbers<T: Element>(&self) -> Result<&[T]> {
        let Arrived { from, tag, dtype, len, words, .. } = &self.0;
        if T::DTYPE != *dtype {
            return Err(Error::Usage(format!(
                "the message of rank {from} with tag {tag} has numbers of the type {dtype}, not {}",
                T::DTYPE
            )));
        }
        Ok(bytemuck::cast_slice(&bytemuck::cast_slice::<i64, u8>(words)[..len * dtype.bytes()]))
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Arrived { from, tag, dtype, len, .. } = &self.0;
        write!(f, "Message({dtype}[{len}] from rank {from}, tag {tag})")
    }
}

impl Mailbox {
    pub(crate) fn new(job: Arc<Job>, context: Context, group: u32, messages: Messages) -> Self {
        let state = Mutex::new(State { messages, failed: None, counts: [0; 2] });
        Self { job, context, group, state }
    }

    /// Sends `data` to rank `to` of the group. Returns when `data` may be written again, which may be before the message
    /// has arrived.
    ///
    /// # Errors
    /// This rank itself, or a rank that does not exist; a rank that died, left, or takes nothing until the deadline.
    pub fn send<T: Element>(&self, data: &[T], to: usize, tag: u32) -> Result<()> {
        self.context.other("send", to)?;
        let call = Call::new(Kind::Send, T::DTYPE, data.len()).root(tag as usize);
        let bytes = bytemuck::cast_slice(data);
        self.with(call, 0, |messages, call| messages.send(&self.context, call, bytes, to))
    }

    /// Waits for the next message from rank `from` (none: from any rank) with `tag` (none: any).
    ///
    /// # Errors
    /// A rank that does not exist; no such message until the deadline (see [`recv_timeout`](Self::recv_timeout)); senders
    /// that died or left.
    pub fn recv(&self, from: Option<usize>, tag: Option<u32>) -> Result<Message> {
        let received = self.receive(from, tag, None)?;
        received.ok_or_else(|| Error::Internal("a wait without a limit ended without a message".into()))
    }

    /// As [`recv`](Self::recv), but gives up after `limit`, which is no error: then there is no message. With a limit of 0
    /// it only looks.
    ///
    /// # Errors
    /// A rank that does not exist; the end of the job.
    pub fn recv_timeout(
        &self,
        from: Option<usize>,
        tag: Option<u32>,
        limit: Duration,
    ) -> Result<Option<Message>> {
        self.receive(from, tag, Some(limit))
    }

    fn receive(
        &self,
        from: Option<usize>,
        tag: Option<u32>,
        limit: Option<Duration>,
    ) -> Result<Option<Message>> {
        from.map_or(Ok(()), |from| self.context.other("recv", from))?;
        if self.context.size == 1 {
            return Err(Error::Usage("recv: a group of one rank has nobody to receive from".into()));
        }
        let call = Call::new(Kind::Send, DType::U8, 0).root(tag.unwrap_or(0) as usize);
        let wanted = Filter { from, tag };
        let received =
            self.with(call, 1, |messages, call| messages.receive(&self.context, wanted, call, limit))?;
        Ok(received.map(Message))
    }

    /// Does `work` with the mailbox's messages; a failure ends the job.
    fn with<R>(
        &self,
        call: Call,
        direction: usize,
        work: impl FnOnce(&mut Messages, Call) -> Result<R>,
    ) -> Result<R> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        state.counts[direction] = state.counts[direction].wrapping_add(1);
        let call = Call { group: self.group, sequence: state.counts[direction], ..call };
        let done = self.context.health.check().and_then(|()| work(&mut state.messages, call));
        done.map_err(|error| {
            let error = self.job.end_by(&call, error);
            state.failed = Some(error.clone());
            error
        })
    }
}

impl fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mailbox(rank {} of {})", self.context.rank, self.context.size)
    }
}
