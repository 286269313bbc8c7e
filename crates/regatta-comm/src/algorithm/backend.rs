//! The seam between operations and what carries them out: shared memory, messages, MPI, a device's library.
//!
//! A new backend is one file under `backends/`, which implements [`Backend`], and one line in the list of algorithms in
//! `algorithm/mod.rs`, which gives it a name. It says what it offers, and [`fallback`](super::select::fallback) finds it.

use super::Algorithm;
use super::parts::Parts;
use super::session::Session;
use crate::error::Result;
use crate::member::call::{Call, Kind};
use crate::member::recorder::Recorder;
use crate::numbers::element::{DType, Element, ReduceOp};
use crate::numbers::memory::{Input, Output, Space};
use crate::transport::TransportKind;
use crate::transport::registered::Registered;
use std::cell::Cell;

/// What an operation asks of the algorithm that is to carry it out. It is the same on all ranks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub kind: Kind,
    pub link: TransportKind,
    pub dtype: DType,
    /// A sum, where nothing is reduced.
    pub op: ReduceOp,
    /// Parts differ in length from rank to rank.
    pub uneven: bool,
    pub space: Space,
}

impl Wanted {
    /// The plain form of an operation: f32 in host memory, in parts of one length.
    pub(crate) fn plain(kind: Kind, link: TransportKind) -> Self {
        Self { kind, link, dtype: DType::F32, op: ReduceOp::Sum, uneven: false, space: Space::Host }
    }
}

/// How well an algorithm suits an operation; later is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Offer {
    /// It cannot carry it out.
    No,
    /// It can, and is used where the table or the user says so.
    Able,
    /// It is used where nothing better is there.
    Usual,
    /// It is used wherever it can be.
    Best,
}

/// What carries operations out.
pub(crate) trait Backend: Sync {
    /// How well `algorithm`, one of this backend's, suits what is wanted.
    fn offers(&self, algorithm: Algorithm, wanted: &Wanted) -> Offer;

    /// Carries an operation out that `turn.algorithm` offers, among two ranks or more. The arguments have been checked.
    fn run(&self, turn: &mut Turn<'_>, task: &mut Task<'_>) -> Result<()>;

    /// Whether [`run`](Self::run) puts the beginning of `task` on record itself, with `turn.start`, before it waits for
    /// another rank. Else it is on record before `run` is called.
    fn starts_itself(&self, _task: &Task<'_>) -> bool {
        false
    }
}

/// What a backend works with, from operation to operation.
pub(crate) struct Turn<'a> {
    /// With the call: kind, type, reduction and root.
    pub session: Session<'a>,
    pub algorithm: Algorithm,
    pub registered: Option<&'a dyn Registered>,
    pub start: &'a Start<'a>,
}

/// Puts the beginning of an operation on record, with its time.
///
/// That takes a good part of the time of a small operation, so it may be done a moment later: when peers have been shown
/// what they wait for, and it is on its way to them.
pub(crate) struct Start<'a> {
    recorder: &'a Recorder,
    call: Call,
    begun: Cell<Option<u64>>,
    /// The operation found its peers there: it took no longer than such operations take.
    pub brief: Cell<bool>,
}

impl<'a> Start<'a> {
    pub(crate) fn new(recorder: &'a Recorder, call: Call) -> Self {
        Self { recorder, call, begun: Cell::default(), brief: Cell::default() }
    }

    /// When the operation has begun, as the recorder has it: now, where that is not on record yet.
    pub(crate) fn now(&self) -> u64 {
        self.begun.get().unwrap_or_else(|| {
            let begun = self.recorder.begin(self.call);
            self.begun.set(Some(begun));
            begun
        })
    }
}

/// One operation: what was called, and the memory that it is about. Where it works in place, the input is left out.
pub(crate) struct Task<'a> {
    pub call: Call,
    pub input: Option<Input<'a>>,
    pub output: Option<Output<'a>>,
    /// How the whole is divided; for an all-to-all, what this rank sends.
    pub parts: Parts,
    /// What this rank receives in an all-to-all, where that differs.
    pub received: Option<Parts>,
    /// Parts differ in length from rank to rank.
    pub uneven: bool,
    /// Bytes of data, of the larger side.
    pub bytes: usize,
    /// Bytes of this rank's part of them.
    pub own: usize,
    /// The peer of a message, and whether it is sent.
    pub message: Option<(usize, bool)>,
}

impl Task<'_> {
    pub(crate) fn wanted(&self, link: TransportKind) -> Wanted {
        let Call { kind, dtype, op, .. } = self.call;
        Wanted { kind, link, dtype, op, uneven: self.uneven, space: self.space() }
    }

    /// Where the memory is: input and output are in one place.
    pub(crate) fn space(&self) -> Space {
        let output = self.output.as_ref().map(Output::space);
        output.or(self.input.as_ref().map(Input::space)).unwrap_or(Space::Host)
    }
}

/// Both sides of an operation in host memory.
pub(crate) type Sides<'a, T> = (Option<&'a [T]>, &'a mut [T]);

/// The numbers of an operation in host memory; what is left out is empty.
pub(crate) fn numbers<'a, T: Element>(
    input: Option<Input<'a>>,
    output: Option<&'a mut Output<'_>>,
) -> Result<Sides<'a, T>> {
    let input = input.map(Input::host).transpose()?;
    Ok((input, output.map(Output::host).transpose()?.unwrap_or_default()))
}
