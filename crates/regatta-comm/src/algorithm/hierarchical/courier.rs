//! What takes a host's numbers to the other hosts.

use crate::algorithm::session::{Pool, Session};
use crate::error::{Error, Result};
use crate::member::call::Call;
use crate::member::context::Context;
use crate::transport::Among;
use crate::transport::Transport;
use crate::transport::shared::Shared;

/// This rank, among those of other hosts that do the same part of the work.
pub(super) struct Courier<'a> {
    transport: &'a mut (dyn Transport + Send),
    context: &'a Context,
    /// One of each host; empty where this rank stays at home.
    ranks: Vec<usize>,
    pool: &'a mut Pool,
    sent: &'a mut u64,
    chunk: usize,
}

/// The memory that the host's ranks share, and this rank as a courier among `ranks`: for two threads at once.
pub(super) fn split<'a>(
    session: &'a mut Session<'_>,
    ranks: Vec<usize>,
) -> Result<(&'a mut Shared, Courier<'a>)> {
    let (context, chunk) = (session.context, session.chunk);
    let no_memory =
        || Error::Internal("the hierarchical algorithm has no memory that the ranks of a host share".into());
    let (shared, transport) = session.transport.split().ok_or_else(no_memory)?;
    let (pool, sent) = (&mut *session.pool, &mut *session.sent);
    Ok((shared, Courier { transport, context, ranks, pool, sent, chunk }))
}

impl Courier<'_> {
    /// Does `operation` among the couriers.
    pub(super) fn across(
        &mut self,
        call: Call,
        operation: impl FnOnce(&mut Session<'_>) -> Result<()>,
    ) -> Result<()> {
        if self.ranks.len() < 2 {
            return Ok(());
        }
        let context = self.context.among(&self.ranks);
        let mut transport = Among { transport: &mut *self.transport, ranks: &self.ranks };
        let (pool, sent, chunk) = (&mut *self.pool, &mut *self.sent, self.chunk);
        operation(&mut Session { transport: &mut transport, context: &context, call, pool, sent, chunk })
    }
}
