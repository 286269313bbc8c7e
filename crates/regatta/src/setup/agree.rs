//! Sends a value from rank 0 to all ranks.

use crate::error::{Error, Result};
use regatta_comm::Group;

/// First byte of a message with a value.
const VALUE: u8 = 1;
/// First byte of a message with an error.
const ERROR: u8 = 0;

/// Calls `decide` on rank 0 and returns its text, or its error, on all ranks. All ranks of the group call it.
pub(crate) fn agree_on(group: &Group, decide: impl FnOnce() -> Result<String>) -> Result<String> {
    if group.size() == 1 {
        return decide();
    }
    let own = (group.rank() == 0).then(decide);
    let mut text = match &own {
        Some(Ok(text)) => [&[VALUE], text.as_bytes()].concat(),
        Some(Err(error)) => [&[ERROR], error.to_string().as_bytes()].concat(),
        None => vec![],
    };
    let mut len = [text.len() as i64];
    group.broadcast(&mut len, 0)?;
    text.resize(len[0] as usize, 0);
    group.broadcast(&mut text, 0)?;
    let received = || String::from_utf8_lossy(text.get(1..).unwrap_or_default()).into_owned();
    match own {
        Some(own) => own,
        None if text.first() == Some(&VALUE) => Ok(received()),
        None => Err(Error::Usage(received())),
    }
}
