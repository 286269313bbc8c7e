//! Names of checkpoint folders: `step-NNNNNNNN`, or `step-NNNNNNNN-G` for the G-th further attempt at the same step.

use super::storage::Location;
use crate::error::{Error, Result};

/// The file that names the newest complete checkpoint.
pub(super) const LAST: &str = "last";
/// The file that names the checkpoint with the lowest validation loss.
pub(super) const BEST: &str = "best";
/// The file that is written last into a checkpoint's folder and makes it complete.
pub(super) const MANIFEST: &str = "manifest.json";

/// Step and attempt in the folder's name, by which folders are sorted; none for other folders.
pub(super) fn parse(name: &str) -> Option<(usize, usize)> {
    let number = |text: &str| {
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|_| digits)
    };
    let rest = name.strip_prefix("step-")?;
    match rest.split_once('-') {
        None => Some((number(rest)?, 0)),
        Some((step, attempt)) => Some((number(step)?, number(attempt)?)),
    }
}

/// As [`parse`], for a name that the caller chose.
pub(super) fn checked(location: &Location, name: &str) -> Result<(usize, usize)> {
    parse(name).ok_or_else(|| {
        Error::checkpoint(
            location.show(name),
            "is not a checkpoint's name: use step-NUMBER or step-NUMBER-ATTEMPT",
        )
    })
}

/// The name of the file of `rank`.
pub(super) fn rank_file(rank: usize) -> String {
    format!("rank-{rank:05}.safetensors")
}

/// A name for the checkpoint of `step` that no folder has yet, so that no earlier checkpoint is overwritten. Rank 0
/// chooses it and sends it to the others.
///
/// # Errors
/// The location cannot be listed.
pub fn fresh_folder(location: &Location, step: usize) -> Result<String> {
    let folders = location.folders().map_err(Error::io("list the checkpoints in", location.show("")))?;
    let attempts = folders.iter().filter_map(|name| parse(name)).filter(|(of, _)| *of == step);
    match attempts.map(|(_, attempt)| attempt + 1).max() {
        None => Ok(format!("step-{step:08}")),
        Some(attempt) => Ok(format!("step-{step:08}-{attempt}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_ordered() {
        assert_eq!(parse("step-00000012"), Some((12, 0)));
        assert_eq!(parse("step-00000012-3"), Some((12, 3)));
        for other in
            ["step-", "step-1x", "step-1-", "step-1-2-3", "step-+1", "last", "step-00000001.tmp", "step-../x"]
        {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_fresh_name_is_not_in_use() {
        let place = tempfile::tempdir().unwrap();
        let location = Location::folder(place.path());
        for expected in ["step-00000007", "step-00000007-1", "step-00000007-2"] {
            let name = fresh_folder(&location, 7).unwrap();
            assert_eq!(name, expected);
            std::fs::create_dir(place.path().join(name)).unwrap();
        }
        assert_eq!(fresh_folder(&location, 8).unwrap(), "step-00000008");
    }
}
