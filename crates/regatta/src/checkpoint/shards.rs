//! Writes what one rank owns, in the background.

use super::header::safetensors_header;
use super::manifest::{FileEntry, PartEntry};
use super::names::{MANIFEST, checked, rank_file};
use super::storage::Location;
use crate::error::{Error, Result};
use regatta_plan::Piece;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

/// Values that are checksummed and written at once: few enough to stay in the cache in between.
const CHUNK_VALUES: usize = 256 << 10;

/// A part of a tensor to save.
#[derive(Debug, Clone)]
pub struct Part<'a> {
    /// The tensor's name.
    pub name: String,
    /// The shape of the whole tensor.
    pub shape: Vec<usize>,
    /// Which part of it.
    pub piece: Piece,
    /// The part's values.
    pub values: &'a [f32],
}

/// Writes one rank's file of each checkpoint, on a separate thread.
///
/// [`begin`](Self::begin) copies the values and returns; training continues while they are written. When the files of
/// all ranks are written, rank 0 completes the checkpoint with [`commit`](super::commit).
#[derive(Debug)]
pub struct ShardWriter {
    location: Location,
    rank: usize,
    /// Memory for the copied values. It is reused, so that page faults occur only once.
    buffer: Vec<f32>,
    pending: usize,
    finished: VecDeque<Result<FileEntry>>,
    thread: Option<Thread>,
}

#[derive(Debug)]
struct Thread {
    jobs: Sender<Job>,
    outcomes: Receiver<Outcome>,
    handle: JoinHandle<()>,
}

struct Job {
    folder: String,
    tensors: BTreeMap<String, Vec<usize>>,
    parts: Vec<(String, Piece)>,
    values: Vec<f32>,
}

struct Outcome {
    result: Result<FileEntry>,
    values: Vec<f32>,
}

impl ShardWriter {
    /// A writer of the files of `rank`, for checkpoints at `location`.
    pub fn new(location: Location, rank: usize) -> Self {
        Self { location, rank, buffer: vec![], pending: 0, finished: VecDeque::new(), thread: None }
    }

    /// Copies the values and begins to write them into the checkpoint `folder` (see
    /// [`fresh_folder`](super::fresh_folder)). If an earlier save is being written, waits for its end first; its
    /// outcome can still be fetched.
    ///
    /// # Errors
    /// A part does not fit its piece, `folder` is not a checkpoint's name, or there is too little memory for the copy.
    /// [`poll`](Self::poll) and [`wait`](Self::wait) report errors of writing.
    pub fn begin(&mut self, folder: &str, parts: Vec<Part<'_>>) -> Result<()> {
        checked(&self.location, folder)?;
        let mut tensors = BTreeMap::new();
        for part in &parts {
            let Part { name, shape, piece, values } = part;
            let fits = piece.is_valid()
                && piece.len() == values.len()
                && super::coverage::same_tensor(shape, &piece.dims)
                && tensors.insert(name.clone(), shape.clone()).is_none_or(|before| before == *shape);
            if !fits {
                return Err(Error::Usage(format!(
                    "cannot save {name}: {} values do not fit the part {piece:?} of a tensor of shape {shape:?}",
                    values.len()
                )));
            }
        }
        while self.pending > 0 {
            self.receive();
        }
        let total = parts.iter().map(|part| part.values.len()).sum();
        let mut values = std::mem::take(&mut self.buffer);
        values.clear();
        values.try_reserve_exact(total).map_err(|_| {
            Error::checkpoint(
                self.location.show(folder),
                format!("there is not enough memory for a copy of {} MiB; use more ranks", total >> 18),
            )
        })?;
        let mut pieces = Vec::with_capacity(parts.len());
        for part in parts {
            values.extend_from_slice(part.values);
            // Empty parts are not written.
            if !part.piece.is_empty() {
                pieces.push((part.name, part.piece));
            }
        }
        let job = Job { folder: folder.into(), tensors, parts: pieces, values };
        match self.thread()?.jobs.send(job) {
            Ok(()) => self.pending += 1,
            Err(_) => return Err(self.reset()),
        }
        Ok(())
    }

    /// The outcome of the earliest save whose outcome was not fetched yet, if that save has ended.
    pub fn poll(&mut self) -> Option<Result<FileEntry>> {
        if self.pending > 0
            && let Some(thread) = &self.thread
        {
            match thread.outcomes.try_recv() {
                Ok(done) => self.take(done),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => self.receive(),
            }
        }
        self.finished.pop_front()
    }

    /// Waits for the outcome of the earliest save whose outcome was not fetched yet.
    ///
    /// # Errors
    /// Writing failed, for example because the disk is full. Earlier checkpoints are unchanged, and no partial file of
    /// this rank is left.
    pub fn wait(&mut self) -> Result<FileEntry> {
        if self.finished.is_empty() && self.pending > 0 {
            self.receive();
        }
        let nothing = || Error::Usage("no save was begun: there is nothing to wait for".into());
        self.finished.pop_front().unwrap_or_else(|| Err(nothing()))
    }

    fn receive(&mut self) {
        match self.thread.as_ref().map(|thread| thread.outcomes.recv()) {
            Some(Ok(done)) => self.take(done),
            _ => {
                let error = self.reset();
                self.finished.push_back(Err(error));
            }
        }
    }

    fn take(&mut self, done: Outcome) {
        self.pending -= 1;
        self.buffer = done.values;
        self.finished.push_back(done.result);
    }

    /// Forgets the thread, which has panicked; the next save starts a new one. Returns the error.
    fn reset(&mut self) -> Error {
        (self.thread, self.pending) = (None, 0);
        Error::checkpoint(
            self.location.show(""),
            "the thread that writes checkpoints ended; see its message above",
        )
    }

    fn thread(&mut self) -> Result<&Thread> {
        let thread = match self.thread.take() {
            Some(thread) => thread,
            None => Thread::start(self.location.clone(), self.rank)?,
        };
        Ok(self.thread.insert(thread))
    }
}

impl Drop for ShardWriter {
    /// Waits until the pending saves are written.
    fn drop(&mut self) {
        if let Some(Thread { jobs, handle, .. }) = self.thread.take() {
            drop(jobs);
            // If the thread panicked, its message was printed then.
            let _ = handle.join();
        }
    }
}

impl Thread {
    fn start(location: Location, rank: usize) -> Result<Self> {
        let (jobs, inbox) = channel::<Job>();
        let (outbox, outcomes) = channel();
        let place = location.show("");
        let work = move || {
            for job in inbox {
                let result = write(&location, rank, &job);
                // Fails if the writer was dropped, and then no one needs the outcome.
                let _ = outbox.send(Outcome { result, values: job.values });
            }
        };
        let handle = std::thread::Builder::new().name("checkpoint".into()).spawn(work);
        Ok(Self { jobs, outcomes, handle: handle.map_err(Error::io("start a thread to write", place))? })
    }
}

/// Writes the file of `rank`. Returns its entry for the manifest.
fn write(location: &Location, rank: usize, job: &Job) -> Result<FileEntry> {
    let file = rank_file(rank);
    let name = format!("{}/{file}", job.folder);
    let path = location.show(&name);
    let manifest = format!("{}/{MANIFEST}", job.folder);
    if location.size(&manifest).map_err(Error::io("look for", location.show(&manifest)))?.is_some() {
        let problem = "belongs to a checkpoint that is already complete; save under another name";
        return Err(Error::checkpoint(path, problem));
    }
    let header = header(&job.parts, rank).map_err(|error| Error::checkpoint(&path, error.to_string()))?;
    let bytes = (header.len() + size_of_val(job.values.as_slice())) as u64;
    let mut parts = Vec::with_capacity(job.parts.len());
    let written = location.create(&name, bytes).and_then(|mut sink| {
        sink.write(&header)?;
        let mut start = 0;
        for (name, piece) in &job.parts {
            let mut checksum = crc32fast::Hasher::new();
            for chunk in job.values[start..start + piece.len()].chunks(CHUNK_VALUES) {
                let bytes = bytemuck::cast_slice(chunk);
                checksum.update(bytes);
                sink.write(bytes)?;
            }
            let offset = (header.len() + 4 * start) as u64;
            start += piece.len();
            let (name, piece, checksum) = (name.clone(), piece.clone(), checksum.finalize());
            parts.push(PartEntry { name, piece, checksum, offset });
        }
        sink.finish()
    });
    written.map_err(Error::io("write", path))?;
    let header = crc32fast::hash(&header);
    Ok(FileEntry { file, bytes, header, tensors: job.tensors.clone(), parts })
}

/// The header of a file with `parts`, which are called `NAME#0`, `NAME#1` and so on for each tensor.
fn header(parts: &[(String, Piece)], rank: usize) -> serde_json::Result<Vec<u8>> {
    let mut counts: HashMap<&str, usize> = HashMap::new();
    let tensors = parts.iter().map(|(name, piece)| {
        let count = counts.entry(name).or_default();
        *count += 1;
        (format!("{name}#{}", *count - 1), vec![piece.len()])
    });
    safetensors_header(&[("format", "regatta"), ("rank", &rank.to_string())], tensors)
}
