//! Everything that the program says goes through here. What it says is never worth a run: a reader that has gone away, a
//! full disk behind standard output or a terminal that was closed cost the text, and nothing else.
//!
//! Where the text itself is what somebody asked for (`generate`, `plan show`, `checkpoint inspect`, `trace`, `bench`),
//! [`finish`] tells a reader who has seen enough, which is no error, from text that was lost.

use crate::error::Result;
use indicatif::ProgressBar;
use std::fmt::Arguments;
use std::io::{ErrorKind, Write};
use std::sync::{Mutex, PoisonError};

/// The progress bar on the terminal, which messages must not tear.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);
/// Why the first write to standard output failed.
static LOST: Mutex<Option<std::io::Error>> = Mutex::new(None);

/// Writes a line to standard output.
macro_rules! show {
    ($($text:tt)*) => { $crate::out::write(format_args!("{}\n", format_args!($($text)*))) };
}
/// Writes a line to standard error.
macro_rules! say {
    ($($text:tt)*) => { $crate::out::note(format_args!($($text)*)) };
}
pub(crate) use {say, show};

/// Writes to standard output. Whether it could be written.
pub fn write(text: Arguments<'_>) -> bool {
    let bar = BAR.lock().unwrap_or_else(PoisonError::into_inner);
    // In one piece: several ranks may write to one terminal.
    let text = text.to_string();
    let write = || {
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush())
    };
    let outcome = match &*bar {
        Some(bar) => bar.suspend(write),
        None => write(),
    };
    drop(bar);
    match outcome {
        Ok(()) => true,
        Err(error) => {
            LOST.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            false
        }
    }
}

/// Writes a line to standard error.
pub fn note(line: Arguments<'_>) {
    let bar = BAR.lock().unwrap_or_else(PoisonError::into_inner);
    let text = format!("{line}\n");
    let write = || {
        // There is nobody left to tell.
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    };
    match &*bar {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

/// Writes a line to standard error some time soon, without waiting: for who must not be held up by a terminal or a pipe
/// that takes nothing.
pub fn aside(line: String) {
    // Without a thread the line is lost.
    let _ = std::thread::Builder::new().spawn(move || note(format_args!("{line}")));
}

/// From now on messages go above this bar.
pub fn above(bar: Option<ProgressBar>) {
    *BAR.lock().unwrap_or_else(PoisonError::into_inner) = bar;
}

/// Whether standard output has failed: whoever writes much can stop.
pub fn closed() -> bool {
    LOST.lock().unwrap_or_else(PoisonError::into_inner).is_some()
}

/// For commands whose text is what was asked for.
///
/// # Errors
/// Text that could not be written, unless the reader has closed the pipe: it has seen enough.
pub fn finish() -> Result<()> {
    match LOST.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(format!("cannot write to standard output: {error}").into())
        }
        _ => Ok(()),
    }
}
