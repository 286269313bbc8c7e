//! What preparing data tells on its way.

use std::path::Path;

/// Something that a user who waits for data, or relies on it, should hear.
#[derive(Debug)]
pub enum Notice<'a> {
    /// Something about the data that is likely not what was meant.
    Warning(&'a str),
    /// Data is prepared anew in this folder; beside it there are `others`, prepared from other versions of the same
    /// source or with other settings.
    Preparing {
        /// Where the result goes.
        folder: &'a Path,
        /// Folders of the same name that are there already.
        others: usize,
    },
    /// Another process prepares the same data, and this one waits for it.
    Waiting {
        /// Where the result goes.
        folder: &'a Path,
    },
    /// How far a step is that may take long.
    Progress {
        /// What is done.
        step: &'static str,
        /// So much of it.
        done: u64,
        /// So much in all.
        of: u64,
    },
}

/// Who hears of it.
pub type Listener<'a> = dyn FnMut(Notice<'_>) + 'a;
