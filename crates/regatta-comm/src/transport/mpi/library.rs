//! The MPI library of this process: initialised once, called as its thread support allows, finalised at exit.

use crate::error::{Error, Result};
use crate::numbers::element::{DType, Element, ReduceOp};
use crate::numbers::kernel;
use ::mpi::ffi;
use std::ffi::{c_char, c_int, c_void};
use std::fmt::Arguments;
use std::io::Write;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, Once, OnceLock, PoisonError};
use std::time::Duration;

/// Longer than the error texts of any MPI library.
const TEXT: usize = 4096;
/// How long other ranks may take to end after this one.
const GOODBYE: Duration = Duration::from_secs(30);

/// What MPI has told about itself.
pub(super) struct Library {
    /// Held during every call, where the library wants one caller at a time.
    turn: Option<Mutex<()>>,
    /// Rank and size of the world that MPI was started with.
    pub(super) world: (usize, usize),
    /// The smaller and the larger of f32, and of f64.
    floats: [ffi::MPI_Op; 4],
}

// SAFETY: the handles of operations never change, and MPI lets any thread use them.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

static LIBRARY: OnceLock<Result<Library>> = OnceLock::new();
/// Groups that have not ended well, or not yet.
pub(super) static OPEN: AtomicUsize = AtomicUsize::new(0);
static END: End = End { stage: Mutex::new(Stage::Running), changed: Condvar::new() };

/// Where the thread that initialised MPI waits to finalise it.
struct End {
    stage: Mutex<Stage>,
    changed: Condvar,
}

#[derive(PartialEq)]
enum Stage {
    Running,
    Wanted,
    Done,
}

impl End {
    fn set(&self, stage: Stage) {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner) = stage;
        self.changed.notify_all();
    }
}

/// The library; `check` is called while it is being initialised, which takes all ranks.
pub(super) fn library(check: impl Fn() -> Result<()>) -> Result<&'static Library> {
    static START: Once = Once::new();
    // Whoever initialises MPI has to finalise it, so this thread stays.
    START.call_once(|| drop(std::thread::spawn(keep)));
    loop {
        match LIBRARY.get() {
            Some(Ok(library)) => return Ok(library),
            Some(Err(error)) => return Err(error.clone()),
            None => check()?,
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn keep() {
    let (library, ours) = match start() {
        Ok((library, ours)) => (Ok(library), ours),
        Err(error) => (Err(error), false),
    };
    LIBRARY.get_or_init(|| library);
    if !ours {
        return;
    }
    // SAFETY: the function may be called at any time.
    if unsafe { atexit(finalize_at_exit) } != 0 {
        return;
    }
    let stage = END.stage.lock().unwrap_or_else(PoisonError::into_inner);
    let wanted = END.changed.wait_while(stage, |stage| *stage == Stage::Running);
    drop(wanted.unwrap_or_else(PoisonError::into_inner));
    // SAFETY: no group is left, so no call is under way.
    unsafe { ffi::MPI_Finalize() };
    END.set(Stage::Done);
}

unsafe extern "C" {
    fn atexit(function: extern "C" fn()) -> c_int;
}

/// Where all groups have ended well. After a failure MPI might wait for ever for the ranks that failed.
extern "C" fn finalize_at_exit() {
    if OPEN.load(Ordering::Acquire) > 0 || finalized() {
        return;
    }
    END.set(Stage::Wanted);
    let stage = END.stage.lock().unwrap_or_else(PoisonError::into_inner);
    let waited = END.changed.wait_timeout_while(stage, GOODBYE, |stage| *stage != Stage::Done);
    if waited.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
        // There is nothing else to be done about it.
        let _ = writeln!(
            std::io::stderr(),
            "warning: MPI_Finalize has waited {} s for ranks that have not ended",
            GOODBYE.as_secs()
        );
    }
}

/// Whether MPI is no more.
pub(super) fn finalized() -> bool {
    let mut flag = 0;
    // SAFETY: may be called at any time, by any thread.
    unsafe { ffi::MPI_Finalized(&mut flag) };
    flag != 0
}

/// Initialises MPI unless the program has; whether it has not.
fn start() -> Result<(Library, bool)> {
    if finalized() {
        return Err(Error::Usage("the mpi transport: this program has finalised MPI already".into()));
    }
    let (mut begun, mut level) = (0, 0);
    // SAFETY: may be called at any time, by any thread.
    unsafe { ffi::MPI_Initialized(&mut begun) };
    let ours = begun == 0;
    // SAFETY: only read.
    let (serialized, multiple) = unsafe { (ffi::RSMPI_THREAD_SERIALIZED, ffi::RSMPI_THREAD_MULTIPLE) };
    let code = match ours {
        // SAFETY: not initialised yet, as just seen; there are no arguments to pass.
        true => unsafe { ffi::MPI_Init_thread(null_mut(), null_mut(), multiple, &mut level) },
        // SAFETY: initialised, and not finalised.
        false => unsafe { ffi::MPI_Query_thread(&mut level) },
    };
    check(code, format_args!("initialise MPI"))?;
    if ours {
        // SAFETY: initialised; the handles are MPI's own.
        unsafe {
            ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN);
            ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_SELF, ffi::RSMPI_ERRORS_RETURN);
        }
    }
    if level < serialized {
        return Err(Error::Usage(match ours {
            true => {
                "the mpi transport: this MPI library lets only the main thread call it; install one with \
                     MPI_THREAD_SERIALIZED or better"
                    .into()
            }
            false => "the mpi transport: this program has initialised MPI for its main thread only; use \
                      MPI_Init_thread with MPI_THREAD_SERIALIZED or MPI_THREAD_MULTIPLE"
                .into(),
        }));
    }
    let (mut rank, mut size) = (0, 0);
    // SAFETY: initialised, and the world exists until MPI is finalised.
    check(unsafe { ffi::MPI_Comm_rank(ffi::RSMPI_COMM_WORLD, &mut rank) }, format_args!("ask MPI its rank"))?;
    // SAFETY: as above.
    check(unsafe { ffi::MPI_Comm_size(ffi::RSMPI_COMM_WORLD, &mut size) }, format_args!("ask MPI its size"))?;
    let mut library = Library {
        turn: (level < multiple).then(Mutex::default),
        world: (rank as usize, size as usize),
        // SAFETY: only read.
        floats: [unsafe { ffi::RSMPI_MIN }; 4],
    };
    let functions: [ffi::MPI_User_function; 4] = [
        Some(combine::<f32, false>),
        Some(combine::<f32, true>),
        Some(combine::<f64, false>),
        Some(combine::<f64, true>),
    ];
    for (op, function) in library.floats.iter_mut().zip(functions) {
        // In the order of ranks, so that of equal zeros all ranks get the same one.
        // SAFETY: the function has the form that MPI calls, and lives as long as the program.
        check(unsafe { ffi::MPI_Op_create(function, 0, op) }, format_args!("make an operation of MPI"))?;
    }
    Ok((library, ours))
}

/// MPI leaves open what its own comparisons do with NaN; these keep it.
unsafe extern "C" fn combine<T: Element, const LARGER: bool>(
    from: *mut c_void,
    into: *mut c_void,
    len: *mut c_int,
    _: *mut ffi::MPI_Datatype,
) {
    // SAFETY: MPI passes a length.
    let len = unsafe { *len } as usize;
    if len == 0 {
        return;
    }
    // SAFETY: MPI passes `len` numbers of the type that the operation is used with in each; only the second are
    // written.
    let (from, into) = unsafe {
        (
            std::slice::from_raw_parts(from.cast::<T>(), len),
            std::slice::from_raw_parts_mut(into.cast::<T>(), len),
        )
    };
    kernel::combine(into, from, if LARGER { ReduceOp::Max } else { ReduceOp::Min }, true);
}

/// The error that MPI's `code` is.
fn check(code: c_int, action: Arguments<'_>) -> Result<()> {
    // MPI_SUCCESS, in every MPI library.
    if code == 0 {
        return Ok(());
    }
    let mut text = [0u8; TEXT];
    let mut len = 0;
    // SAFETY: there is room for more than MPI_MAX_ERROR_STRING.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &mut len) };
    let text = String::from_utf8_lossy(&text[..(len.max(0) as usize).min(TEXT)]).into_owned();
    Err(Error::System { action: action.to_string(), reason: format!("{text} (MPI error {code})") })
}

impl Library {
    /// Makes one call of MPI, when it is this thread's turn. `action` says in errors what could not be done.
    pub(super) fn call(&self, action: Arguments<'_>, call: impl FnOnce() -> c_int) -> Result<()> {
        let turn = self.turn.as_ref().map(|turn| turn.lock().unwrap_or_else(PoisonError::into_inner));
        let outcome = check(call(), action);
        drop(turn);
        outcome
    }

    /// What MPI calls a reduction of `dtype` by `op`.
    pub(super) fn op(&self, op: ReduceOp, dtype: DType) -> Result<ffi::MPI_Op> {
        let [smaller32, larger32, smaller64, larger64] = self.floats;
        // SAFETY: only read.
        Ok(unsafe {
            match (op, dtype) {
                (ReduceOp::Sum | ReduceOp::Mean, _) => ffi::RSMPI_SUM,
                (ReduceOp::Product, _) => ffi::RSMPI_PROD,
                (ReduceOp::And, _) => ffi::RSMPI_BAND,
                (ReduceOp::Or, _) => ffi::RSMPI_BOR,
                (ReduceOp::Min, DType::F32) => smaller32,
                (ReduceOp::Max, DType::F32) => larger32,
                (ReduceOp::Min, DType::F64) => smaller64,
                (ReduceOp::Max, DType::F64) => larger64,
                (ReduceOp::Min, _) => ffi::RSMPI_MIN,
                (ReduceOp::Max, _) => ffi::RSMPI_MAX,
                (ReduceOp::Adasum, _) => return Err(Error::Internal("MPI has no adasum".into())),
            }
        })
    }
}

/// What MPI calls numbers of this type.
pub(super) fn datatype(dtype: DType) -> Result<ffi::MPI_Datatype> {
    // SAFETY: only read.
    Ok(unsafe {
        match dtype {
            DType::F32 => ffi::RSMPI_FLOAT,
            DType::F64 => ffi::RSMPI_DOUBLE,
            DType::I32 => ffi::RSMPI_INT32_T,
            DType::I64 => ffi::RSMPI_INT64_T,
            DType::U8 => ffi::RSMPI_UINT8_T,
            DType::I8 => ffi::RSMPI_INT8_T,
            _ => return Err(Error::Internal(format!("MPI has no {dtype}"))),
        }
    })
}

/// Memory that MPI reads or writes until its request is done. Dropped before, it stays MPI's for good.
pub(super) struct Loan<M> {
    request: ffi::MPI_Request,
    memory: Option<M>,
}

// SAFETY: MPI lets any thread use a request, one at a time.
unsafe impl<M: Send> Send for Loan<M> {}

impl<M> Loan<M> {
    /// `start` begins what is done with `memory`, which is on the heap.
    pub(super) fn new(
        library: &Library,
        action: Arguments<'_>,
        mut memory: M,
        start: impl FnOnce(&mut M, &mut ffi::MPI_Request) -> c_int,
    ) -> Result<Self> {
        // SAFETY: only read.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        library.call(action, || start(&mut memory, &mut request))?;
        Ok(Self { request, memory: Some(memory) })
    }

    /// Lets MPI go on; the memory, once it is done.
    pub(super) fn reclaim(&mut self, library: &Library) -> Result<Option<M>> {
        let mut done = 0;
        let request = &mut self.request;
        library.call(format_args!("go on with an operation of MPI"), || {
            // SAFETY: the request is MPI's, or null, which is done.
            unsafe { ffi::MPI_Test(request, &mut done, ffi::RSMPI_STATUS_IGNORE) }
        })?;
        Ok(if done != 0 { self.memory.take() } else { None })
    }
}

impl<M> Drop for Loan<M> {
    fn drop(&mut self) {
        std::mem::forget(self.memory.take());
    }
}
