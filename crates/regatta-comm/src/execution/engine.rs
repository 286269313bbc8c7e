//! Carries out operations: numbers them, hands them to an algorithm, records them, and turns a failure into the end
//! of the job.

use crate::algorithm::Algorithm;
use crate::algorithm::direct;
use crate::algorithm::select::possible;
use crate::algorithm::session::Pool;
use crate::algorithm::session::Session;
use crate::error::{Error, Result};
use crate::execution::promptness::Prompt;
use crate::execution::queue::message;
use crate::execution::traffic::Traffic;
use crate::job::options::Options;
use crate::job::{Job, Memory};
use crate::member::call::{Call, Kind};
use crate::member::context::Context;
use crate::member::recorder::{Recorder, Whose};
use crate::member::trace_folder;
use crate::numbers::element::ReduceOp;
use crate::transport::registered::Registered;
use crate::transport::shared::Shared;
use crate::transport::{Transport, TransportKind};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that go on together in a stream: stay in the second-level cache.
const CHUNK: usize = 256 << 10;

/// What operations need, shared with the communication thread.
pub(crate) struct Core {
    pub(crate) context: Context,
    pub(crate) options: Options,
    pub(crate) kind: TransportKind,
    pub(crate) memory: Option<Arc<dyn Memory>>,
    pub(crate) id: u64,
    /// Nobody has asked for anything but what is usual in shared memory, so there is nothing to look up.
    usual: bool,
    engine: Mutex<Engine>,
    pub(crate) job: Arc<Job>,
}

struct Engine {
    transport: Box<dyn Transport>,
    failed: Option<Error>,
    traffic: Traffic,
    /// Collective operations so far.
    sequence: u32,
    /// Messages so far, by peer and whether they were sent.
    messages: HashMap<(usize, bool), u32>,
    pool: Pool,
}

/// One operation that is being carried out.
pub(crate) struct Turn<'a> {
    pub session: Session<'a>,
    pub algorithm: Algorithm,
    registered: Option<&'a dyn Registered>,
}

impl<'a> Turn<'a> {
    /// The shared memory and the registered memory, for the direct algorithms.
    pub(crate) fn direct(&mut self) -> Result<(&mut Shared, Option<&'a dyn Registered>, Call)> {
        let call = self.session.call;
        let registered = self.registered;
        let shared = self.session.transport.shared();
        let shared = shared.ok_or_else(|| Error::Usage("the direct algorithm needs shared memory".into()))?;
        shared.enter();
        Ok((shared, registered, call))
    }
}

/// Bytes from which operations wait so often that it pays to be woken soon.
const WORTH_PROMPTNESS: usize = 512 << 10;

/// How one operation is to be carried out.
#[derive(Clone, Copy)]
pub(crate) struct Manner {
    /// Bytes of data, of the larger side.
    pub bytes: usize,
    /// Bytes of this rank's part of them.
    pub own: usize,
    /// Parts differ in length from rank to rank.
    pub uneven: bool,
    /// The peer of a message, and whether it is sent.
    pub message: Option<(usize, bool)>,
    /// How long to look for peers before sleeping.
    pub patience: Duration,
}

impl Core {
    pub(crate) fn new(
        job: Arc<Job>,
        id: u64,
        context: Context,
        options: Options,
        transport: Box<dyn Transport>,
        memory: Option<Arc<dyn Memory>>,
    ) -> Self {
        let kind = transport.kind();
        let engine = Engine {
            transport,
            failed: None,
            traffic: Traffic::default(),
            sequence: 0,
            messages: HashMap::new(),
            pool: vec![],
        };
        let shared = matches!(kind, TransportKind::Thread | TransportKind::Shm);
        let usual = shared && options.algorithm.is_none() && !job.tuning.covers(TransportKind::Shm);
        Self { context, options, kind, memory, id, usual, engine: Mutex::new(engine), job }
    }

    pub(crate) fn traffic(&self) -> Traffic {
        self.lock().traffic
    }

    /// Collective operations so far.
    pub(crate) fn sequence(&self) -> u32 {
        self.lock().sequence
    }

    fn lock(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recorder(&self) -> MutexGuard<'_, Recorder> {
        self.context.recorder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How `call` is carried out with `bytes` of data.
    pub(crate) fn choose(&self, call: Call, bytes: usize, uneven: bool) -> Algorithm {
        let Call { kind, op, dtype, .. } = call;
        if self.usual && !uneven && op != ReduceOp::Adasum && Algorithm::Direct.offers(kind) {
            return Algorithm::Direct;
        }
        let suits = |algorithm: &Algorithm| {
            possible(*algorithm, kind, self.kind, uneven)
                // Its combination is not done element by element.
                && !(op == ReduceOp::Adasum && matches!(algorithm, Algorithm::Direct | Algorithm::Native | Algorithm::Hierarchical))
                // MPI sums integers in their own type, where the sum for a mean may not fit.
                && !(op == ReduceOp::Mean && !dtype.is_float() && *algorithm == Algorithm::Native)
        };
        let table = || self.job.tuning.choose(kind, self.kind, self.context.size, bytes);
        let chosen = self.options.algorithm.filter(suits).unwrap_or_else(table);
        match suits(&chosen) {
            true => chosen,
            false if kind == Kind::AllToAll => Algorithm::Pairwise,
            false => Algorithm::Ring,
        }
    }

    /// Runs one operation; after a failure, ends the job.
    pub(crate) fn run(
        &self,
        call: Call,
        manner: Manner,
        operation: impl FnOnce(&mut Turn<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut engine = self.lock();
        let engine = &mut *engine;
        if let Some(error) = &engine.failed {
            return Err(error.clone());
        }
        let counter = match manner.message {
            None => &mut engine.sequence,
            Some(message) => engine.messages.entry(message).or_default(),
        };
        *counter = counter.wrapping_add(1);
        let call = Call { group: self.id as u32, sequence: *counter, ..call };
        let begun = Instant::now();
        self.recorder().begin(call, begun);
        engine.transport.set_patience(manner.patience);
        let mut sent = 0;
        let mut panicked = None;
        let outcome = self.context.health.check().and_then(|()| {
            if self.context.size == 1 {
                return Ok(());
            }
            self.context.invite(call)?;
            let algorithm = self.choose(call, manner.bytes, manner.uneven);
            if algorithm == Algorithm::Direct && manner.message.is_none() {
                let root = call.root as usize == self.context.rank;
                sent = direct::sent(call.kind, root, self.context.size, manner.bytes, manner.own);
            }
            let session = Session {
                transport: &mut *engine.transport,
                context: &self.context,
                call,
                pool: &mut engine.pool,
                sent: &mut sent,
                chunk: CHUNK,
            };
            let registered = self.memory.as_ref().map(|memory| &**memory as &dyn Registered);
            let mut turn = Turn { session, algorithm, registered };
            let _prompt = (manner.bytes >= WORTH_PROMPTNESS).then(Prompt::new);
            // The peers must hear of a panic, or they would wait; then it goes on as panics do.
            match catch_unwind(AssertUnwindSafe(|| operation(&mut turn))) {
                Ok(outcome) => outcome,
                Err(panic) => {
                    let reason = format!("a panic in {call}: {}", message(&*panic));
                    panicked = Some(panic);
                    Err(self.job.give_up(&reason))
                }
            }
        });
        let Err(error) = outcome else {
            let ended = Instant::now();
            self.recorder().end(ended);
            self.context.notes.clear();
            engine.traffic.count(call.kind, manner.bytes as u64, sent, ended - begun);
            return Ok(());
        };
        let error = match error {
            Error::PeerDied { rank, .. } => self.context.health.closed(rank, &call),
            // Others may have learnt more meanwhile.
            error @ Error::Deadline { .. } => self.context.health.check().err().unwrap_or(error),
            error => error,
        };
        engine.failed = Some(error.clone());
        if !matches!(error, Error::Aborted { .. }) {
            self.job.abort(&error.to_string());
        }
        self.write_trace(&error);
        match panicked {
            Some(panic) => resume_unwind(panic),
            None => Err(error),
        }
    }

    /// Writes the last operations down, where that is wanted.
    fn write_trace(&self, failure: &Error) {
        let Some(folder) = &self.options.trace else { return };
        let whose = Whose {
            rank: self.job.rank,
            world: self.job.size,
            group: self.id,
            members: &self.context.names,
            clock_offset_us: self.job.clock_offset_us(),
        };
        let written = trace_folder::prepare(folder, self.job.name()).and_then(|folder| {
            self.recorder().write(&folder, &whose, &failure.to_string())?;
            Ok(folder)
        });
        let rank = whose.rank;
        // The failure itself is what the caller is told; a full disk must not hide it.
        crate::say::say(match written {
            Ok(folder) => {
                let folder = folder.display();
                format!("the last operations of rank {rank} are in {folder}: see `regatta trace {folder}`")
            }
            Err(error) => format!(
                "warning: cannot write the last operations of rank {rank} to {}: {error} (REGATTA_TRACE names another folder, or `off`)",
                folder.display()
            ),
        });
    }

    pub(crate) fn rank_exists(&self, what: &str, rank: usize) -> Result<()> {
        if rank < self.context.size {
            return Ok(());
        }
        Err(Error::Usage(format!("{what}: there is no rank {rank} in a group of {}", self.context.size)))
    }
}
