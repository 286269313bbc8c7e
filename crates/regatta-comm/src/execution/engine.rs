//! Carries out operations: numbers them, hands them to an algorithm, records them, and turns a failure into the end
//! of the job.

use crate::algorithm::Algorithm;
use crate::algorithm::backend::{Start, Task, Turn, Wanted};
use crate::algorithm::select::fallback;
use crate::algorithm::session::{Pool, Session};
use crate::error::{Error, Result};
use crate::execution::promptness::Prompt;
use crate::execution::queue::message;
use crate::execution::traffic::{Counted, Traffic};
use crate::job::Job;
use crate::job::options::Options;
use crate::member::call::Call;
use crate::member::context::Context;
use crate::member::recorder::Whose;
use crate::member::trace_folder;
use crate::transport::registered::Registered;
use crate::transport::{Registry, Transport, TransportKind};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes that go on together in a stream: stay in the second-level cache.
const CHUNK: usize = 256 << 10;

/// What operations need, shared with the communication thread.
pub(crate) struct Core {
    pub(crate) context: Context,
    pub(crate) options: Options,
    pub(crate) kind: TransportKind,
    pub(crate) memory: Option<Arc<Registry>>,
    pub(crate) id: u64,
    /// Nobody has asked for anything but what is usual in shared memory, so there is nothing to look up.
    usual: bool,
    engine: Mutex<Engine>,
    /// Not in the engine, which an operation keeps as long as it lasts; written by whoever has it.
    traffic: Counted,
    pub(crate) job: Arc<Job>,
}

struct Engine {
    transport: Box<dyn Transport + Send>,
    failed: Option<Error>,
    /// Collective operations so far.
    sequence: u32,
    /// Messages so far, by peer and whether they were sent.
    messages: HashMap<(usize, bool), u32>,
    pool: Pool,
}

/// Bytes from which operations wait so often that it pays to be woken soon.
const WORTH_PROMPTNESS: usize = 512 << 10;

impl Core {
    pub(crate) fn new(
        job: Arc<Job>,
        id: u64,
        context: Context,
        options: Options,
        transport: Box<dyn Transport + Send>,
        memory: Option<Arc<Registry>>,
    ) -> Self {
        let kind = transport.kind();
        let engine = Engine { transport, failed: None, sequence: 0, messages: HashMap::new(), pool: vec![] };
        let shared = matches!(kind, TransportKind::Thread | TransportKind::Shm);
        let usual = shared && options.algorithm.is_none() && !job.tuning.covers(TransportKind::Shm);
        Self {
            context,
            options,
            kind,
            memory,
            id,
            usual,
            engine: Mutex::new(engine),
            traffic: Counted::default(),
            job,
        }
    }

    pub(crate) fn traffic(&self) -> Traffic {
        self.traffic.read()
    }

    /// Collective operations so far.
    pub(crate) fn sequence(&self) -> u32 {
        self.lock().sequence
    }

    fn lock(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How what is wanted is carried out with `bytes` of data; none where nothing can do it.
    pub(crate) fn choose(&self, wanted: &Wanted, bytes: usize) -> Option<Algorithm> {
        if self.usual {
            return fallback(wanted);
        }
        let asked = self.options.algorithm.filter(|algorithm| algorithm.suits(wanted));
        asked.or_else(|| self.job.tuning.choose(wanted, self.context.size, bytes))
    }

    /// Runs one operation, looking for peers for `patience` before sleeping; after a failure, ends the job.
    pub(crate) fn execute(&self, task: &mut Task<'_>, patience: Duration) -> Result<()> {
        let mut engine = self.lock();
        let engine = &mut *engine;
        if let Some(error) = &engine.failed {
            return Err(error.clone());
        }
        let counter = match task.message {
            None => &mut engine.sequence,
            Some(message) => engine.messages.entry(message).or_default(),
        };
        *counter = counter.wrapping_add(1);
        let call = Call { group: self.id as u32, sequence: *counter, ..task.call };
        engine.transport.set_patience(patience);
        let start = Start::new(&self.context.recorder, call);
        let mut sent = 0;
        let mut panicked = None;
        let outcome = self.context.health.check().and_then(|()| {
            if self.context.size == 1 {
                return Ok(());
            }
            self.context.invite(call)?;
            let algorithm = self.choose(&task.wanted(self.kind), task.bytes);
            let algorithm = algorithm
                .ok_or_else(|| Error::Internal(format!("nothing carries out {call} over {}", self.kind)))?;
            let session = Session {
                transport: &mut *engine.transport,
                context: &self.context,
                call,
                pool: &mut engine.pool,
                sent: &mut sent,
                chunk: CHUNK,
            };
            let registered = self.memory.as_ref().map(|memory| &**memory as &dyn Registered);
            if !algorithm.backend().starts_itself(task) {
                start.now();
            }
            let mut turn = Turn { session, algorithm, registered, start: &start };
            let _prompt = (task.bytes >= WORTH_PROMPTNESS).then(Prompt::new);
            // The peers must hear of a panic, or they would wait; then it goes on as panics do.
            match catch_unwind(AssertUnwindSafe(|| algorithm.backend().run(&mut turn, task))) {
                Ok(outcome) => outcome,
                Err(panic) => {
                    let reason = format!("a panic in {call}: {}", message(&*panic));
                    panicked = Some(panic);
                    Err(self.job.give_up(&reason))
                }
            }
        });
        // What has failed before it began is on record, too.
        let begun = start.now();
        let Err(error) = outcome else {
            let ended = self.context.recorder.end(begun, start.brief.get());
            self.context.notes.clear();
            self.traffic.add(call.kind, task.bytes as u64, sent, ended - begun);
            return Ok(());
        };
        let error = self.job.end_by(&call, error);
        engine.failed = Some(error.clone());
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
            self.context.recorder.write(&folder, &whose, &failure.to_string())?;
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
}
