//! Messages about the preparation of data.

use std::path::Path;

/// A message for the user about data that is being prepared.
#[derive(Debug)]
pub enum Notice<'a> {
    /// The data is probably not what the user intended.
    Warning(&'a str),
    /// Data is prepared in this folder. There are `others`, prepared from other versions of the same source or with
    /// other settings.
    Preparing {
        /// Where the result is written.
        folder: &'a Path,
        /// Number of existing folders of the same name.
        others: usize,
    },
    /// Another process prepares the same data, and this one waits for it.
    Waiting {
        /// Where the result is written.
        folder: &'a Path,
    },
    /// The progress of a step that may take long.
    Progress {
        /// The name of the step.
        step: &'static str,
        /// Bytes or tokens that are done.
        done: u64,
        /// Bytes or tokens in all.
        of: u64,
    },
}

/// A function that receives the messages.
pub type Listener<'a> = dyn FnMut(Notice<'_>) + 'a;
