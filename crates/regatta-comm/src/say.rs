//! Messages that nobody asked for, on standard error.

use std::fmt::Display;
use std::io::Write;

/// Writes a line to standard error. A job must not end because its messages cannot be written: that is no error.
pub(crate) fn say(line: impl Display) {
    // In one piece: several ranks may write to one terminal.
    let _ = std::io::stderr().lock().write_all(format!("{line}\n").as_bytes());
}
