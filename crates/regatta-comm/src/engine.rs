//! Carries out operations: hands them to the algorithm, counts them, and turns a failure into the end of the job.

use crate::algorithm::{Algorithm, Context, direct, ring, stream};
use crate::call::{Call, Kind};
use crate::element::{DType, Element, ReduceOp};
use crate::error::{Error, Result};
use crate::job::{Job, Memory};
use crate::options::Options;
use crate::transport::shared::Shared;
use crate::transport::{Transport, TransportKind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What operations need, shared with the communication thread.
pub(crate) struct Core {
    pub(crate) context: Context,
    pub(crate) options: Options,
    pub(crate) kind: TransportKind,
    pub(crate) algorithm: Algorithm,
    pub(crate) memory: Option<Arc<dyn Memory>>,
    engine: Mutex<Engine>,
    /// Memory that an operation needs for its time; as large as the largest so far.
    scratch: Mutex<Vec<u64>>,
    pub(crate) job: Arc<Job>,
}

struct Engine {
    transport: Box<dyn Transport>,
    failed: Option<Error>,
    traffic: Traffic,
}

/// What a group has done so far on this rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Operations.
    pub operations: u64,
    /// Bytes of their data (of the larger side).
    pub bytes: u64,
    /// Time spent in them.
    pub busy: Duration,
}

impl Core {
    pub(crate) fn new(
        job: Arc<Job>,
        context: Context,
        options: Options,
        transport: Box<dyn Transport>,
        memory: Option<Arc<dyn Memory>>,
        algorithm: Algorithm,
    ) -> Self {
        let kind = transport.kind();
        let engine = Mutex::new(Engine { transport, failed: None, traffic: Traffic::default() });
        Self { context, options, kind, algorithm, memory, engine, scratch: Mutex::default(), job }
    }

    pub(crate) fn traffic(&self) -> Traffic {
        self.lock().traffic
    }

    fn lock(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one operation; after a failure, ends the job.
    fn run(
        &self,
        call: Call,
        bytes: usize,
        patience: Duration,
        operation: impl FnOnce(&mut dyn Transport) -> Result<()>,
    ) -> Result<()> {
        let mut engine = self.lock();
        if let Some(error) = &engine.failed {
            return Err(error.clone());
        }
        let begun = Instant::now();
        engine.transport.set_patience(patience);
        let outcome = self.context.health.check().and_then(|()| match self.context.size {
            1 => Ok(()),
            _ => operation(&mut *engine.transport),
        });
        let Err(error) = outcome else {
            engine.traffic.operations += 1;
            engine.traffic.bytes += bytes as u64;
            engine.traffic.busy += begun.elapsed();
            return Ok(());
        };
        let error = match error {
            Error::PeerDied { rank, .. } => {
                self.context.health.verdict(Error::PeerDied { rank, call: call.to_string() })
            }
            Error::Deadline { rank, call, waited } => {
                // Others may have learnt more meanwhile.
                let rank = self.job.blame(rank);
                self.context.health.check().err().unwrap_or(Error::Deadline { rank, call, waited })
            }
            error => error,
        };
        engine.failed = Some(error.clone());
        drop(engine);
        if !matches!(error, Error::Aborted { .. }) {
            self.job.abort(&error.to_string());
        }
        Err(error)
    }

    /// The shared memory, for the direct algorithms.
    fn shared(transport: &mut dyn Transport) -> Result<&mut Shared> {
        transport.shared().ok_or_else(|| Error::Usage("the direct algorithm needs shared memory".into()))
    }

    fn registered(&self) -> Option<&dyn direct::Registered> {
        self.memory.as_ref().map(|memory| &**memory as &dyn direct::Registered)
    }

    fn fits(&self, what: &str, whole: usize, part: usize) -> Result<()> {
        let size = self.context.size;
        if Some(whole) == part.checked_mul(size) {
            return Ok(());
        }
        Err(Error::Usage(format!(
            "{what}: {whole} elements are not {size} parts (one for each rank) of {part} elements"
        )))
    }

    fn rank_exists(&self, what: &str, rank: usize) -> Result<()> {
        if rank < self.context.size {
            return Ok(());
        }
        Err(Error::Usage(format!("{what}: there is no rank {rank} in a group of {}", self.context.size)))
    }

    pub(crate) fn all_reduce<T: Element>(
        &self,
        data: &mut [T],
        op: ReduceOp,
        patience: Duration,
    ) -> Result<()> {
        let call = Call::new(Kind::AllReduce, T::DTYPE, data.len()).op(op);
        self.run(call, size_of_val(data), patience, |transport| match self.algorithm {
            Algorithm::Direct => direct::all_reduce(Self::shared(transport)?, self.registered(), call, data),
            Algorithm::Ring => ring::all_reduce(transport, &self.context, call, data),
        })
    }

    pub(crate) fn reduce_scatter<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        op: ReduceOp,
        patience: Duration,
    ) -> Result<()> {
        self.fits("reduce_scatter", input.len(), output.len())?;
        if self.context.size == 1 {
            output.copy_from_slice(input);
        }
        let call = Call::new(Kind::ReduceScatter, T::DTYPE, output.len()).op(op);
        self.run(call, size_of_val(input), patience, |transport| match self.algorithm {
            Algorithm::Direct => {
                direct::reduce_scatter(Self::shared(transport)?, self.registered(), call, input, output)
            }
            Algorithm::Ring => {
                let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
                ring::reduce_scatter(transport, &self.context, call, input, output, &mut scratch)
            }
        })
    }

    pub(crate) fn all_gather<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        patience: Duration,
    ) -> Result<()> {
        self.fits("all_gather", output.len(), input.len())?;
        if self.context.size == 1 {
            output.copy_from_slice(input);
        }
        let call = Call::new(Kind::AllGather, T::DTYPE, input.len());
        self.run(call, size_of_val(output), patience, |transport| match self.algorithm {
            Algorithm::Direct => {
                direct::all_gather(Self::shared(transport)?, self.registered(), call, input, output)
            }
            Algorithm::Ring => ring::all_gather(transport, &self.context, call, input, output),
        })
    }

    pub(crate) fn broadcast<T: Element>(
        &self,
        data: &mut [T],
        root: usize,
        patience: Duration,
    ) -> Result<()> {
        self.rank_exists("broadcast", root)?;
        let call = Call::new(Kind::Broadcast, T::DTYPE, data.len()).root(root);
        self.run(call, size_of_val(data), patience, |transport| match self.algorithm {
            Algorithm::Direct => direct::broadcast(Self::shared(transport)?, self.registered(), call, data),
            Algorithm::Ring => ring::broadcast(transport, &self.context, call, data),
        })
    }

    pub(crate) fn barrier(&self, patience: Duration) -> Result<()> {
        let call = Call::new(Kind::Barrier, DType::U8, 0);
        self.run(call, 0, patience, |transport| match self.algorithm {
            Algorithm::Direct => direct::barrier(Self::shared(transport)?, call),
            Algorithm::Ring => stream::barrier(transport, &self.context, call),
        })
    }

    fn other(&self, what: &str, peer: usize) -> Result<()> {
        self.rank_exists(what, peer)?;
        if peer == self.context.rank {
            return Err(Error::Usage(format!("{what}: rank {peer} is this rank itself")));
        }
        Ok(())
    }

    pub(crate) fn send<T: Element>(&self, data: &[T], to: usize, patience: Duration) -> Result<()> {
        self.other("send", to)?;
        let call = Call::new(Kind::Send, T::DTYPE, data.len());
        self.run(call, size_of_val(data), patience, |transport| {
            let mut streams = stream::Streams { transport, context: &self.context, call };
            streams.exchange(Some((to, bytemuck::cast_slice(data))), None)
        })
    }

    pub(crate) fn recv<T: Element>(&self, data: &mut [T], from: usize, patience: Duration) -> Result<()> {
        self.other("recv", from)?;
        let call = Call::new(Kind::Send, T::DTYPE, data.len());
        self.run(call, size_of_val(data), patience, |transport| {
            let mut streams = stream::Streams { transport, context: &self.context, call };
            streams.exchange(None, Some((from, bytemuck::cast_slice_mut(data))))
        })
    }
}
