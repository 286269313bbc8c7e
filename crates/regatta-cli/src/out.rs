//! All output of the program goes through here. Failed output never ends a run: if a reader has closed the pipe, a disk
//! is full or a terminal was closed, only the text is lost.
//!
//! Some commands exist for their text (`generate`, `plan show`, `checkpoint inspect`, `trace`, `bench`). They call
//! [`finish`], which returns an error if text was lost, but not if the reader closed the pipe.

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

/// Writes to standard output. Returns whether that succeeded.
pub fn write(text: Arguments<'_>) -> bool {
    let bar = BAR.lock().unwrap_or_else(PoisonError::into_inner);
    // In one write: several ranks may write to one terminal.
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
        // The error has no other place to be shown.
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    };
    match &*bar {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

/// Writes a line to standard error from another thread: a terminal or pipe that is blocked does not delay the caller.
pub fn note_in_background(line: String) {
    // Without a thread the line is lost.
    let _ = std::thread::Builder::new().spawn(move || note(format_args!("{line}")));
}

/// Sets the progress bar that messages are written above.
pub fn set_bar(bar: Option<ProgressBar>) {
    *BAR.lock().unwrap_or_else(PoisonError::into_inner) = bar;
}

/// Whether writing to standard output has failed: commands with long output can stop then.
pub fn closed() -> bool {
    LOST.lock().unwrap_or_else(PoisonError::into_inner).is_some()
}

/// Reports text that was lost, for commands that exist for their text.
///
/// # Errors
/// Text could not be written. That the reader has closed the pipe is no error.
pub fn finish() -> Result<()> {
    match LOST.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(format!("cannot write to standard output: {error}").into())
        }
        _ => Ok(()),
    }
}
