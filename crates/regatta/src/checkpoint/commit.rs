//! Completes a checkpoint whose files are written, and removes checkpoints that are no longer kept.

use super::State;
use super::manifest::{FileEntry, Manifest};
use super::names::{BEST, LAST, MANIFEST, checked, parse};
use super::storage::Location;
use crate::error::{Error, Result};

/// Completes the checkpoint `folder` from the `files` of all ranks: writes its manifest, reads it back, and makes
/// `last` (and `best`, where `best` is true) name it. Then removes the checkpoints that `last`, `best`, `train.keep`
/// and `train.keep_every` do not keep. Removes nothing while the last validation loss is not finite. Rank 0 calls this
/// after every rank has sent it its [`FileEntry`].
///
/// # Errors
/// The files do not cover every tensor exactly once, rank 0 cannot see a file, or a write or a read fails. `last` and
/// `best` then name what they named before. Call [`abandon`] to remove the files.
pub fn commit(
    location: &Location,
    folder: &str,
    state: &State,
    files: Vec<FileEntry>,
    best: bool,
) -> Result<()> {
    let this = checked(location, folder)?;
    let path = location.show(folder);
    for file in &files {
        let name = format!("{folder}/{}", file.file);
        let found = location.size(&name).map_err(Error::io("look for", location.show(&name)))?;
        if found != Some(file.bytes) {
            return Err(Error::checkpoint(
                location.show(&name),
                "was written by its rank, but rank 0 does not see all of it: give all ranks the same folder, on a \
                 file system that they share, or an object store's URL",
            ));
        }
    }
    let manifest = Manifest::new(state.clone(), files).map_err(|problem| {
        Error::checkpoint(&path, format!("the ranks did not save every tensor once: {problem}"))
    })?;
    let bytes = manifest.to_bytes().map_err(|error| Error::checkpoint(&path, error.to_string()))?;
    location.put(&format!("{folder}/{MANIFEST}"), bytes)?;
    if let Err(error) = Manifest::read(location, folder) {
        // An unreadable manifest must not mark the checkpoint as complete: the older ones stay.
        let _ = location.remove_folder(folder, MANIFEST);
        return Err(error);
    }
    location.put(LAST, folder.into())?;
    if best {
        location.put(BEST, folder.into())?;
    }
    // After a validation loss that is not finite, the user may need an older checkpoint.
    if state.val_loss.is_none_or(f64::is_finite) {
        prune(location, this, state.config.train.keep, state.config.train.keep_every);
    }
    Ok(())
}

/// Removes the incomplete checkpoint `folder`, for example after a rank could not write its file.
///
/// # Errors
/// The checkpoint is complete, or the folder cannot be removed.
pub fn abandon(location: &Location, folder: &str) -> Result<()> {
    checked(location, folder)?;
    let path = location.show(folder);
    if location.size(&format!("{folder}/{MANIFEST}")).map_err(Error::io("look into", &path))?.is_some() {
        return Err(Error::checkpoint(path, "is complete, and is not removed as an abandoned one"));
    }
    location.remove_folder(folder, MANIFEST).map_err(Error::io("remove", path))
}

/// Removes complete checkpoints that are not kept, and incomplete ones before `this`. Incomplete ones after it may be
/// in progress, because ranks that have finished this one begin the next. Complete ones after it are from a run that
/// was resumed at an earlier step.
fn prune(location: &Location, this: (usize, usize), keep: usize, keep_every: usize) {
    // A checkpoint that stays costs only space, and the next save tries again. So in doubt nothing is removed.
    let (Ok(folders), Ok(last), Ok(best)) = (location.folders(), location.text(LAST), location.text(BEST))
    else {
        return;
    };
    let named: Vec<&str> = [&last, &best].into_iter().flatten().map(|name| name.trim()).collect();
    if named.iter().any(|name| parse(name).is_none()) {
        return;
    }
    let complete = |folder: &str| matches!(location.size(&format!("{folder}/{MANIFEST}")), Ok(Some(_)));
    let mut all: Vec<_> = folders
        .iter()
        .filter_map(|folder| parse(folder).map(|place| (place, folder.as_str(), complete(folder))))
        .collect();
    all.sort();
    let until_this =
        all.iter().filter(|(place, _, complete)| *complete && *place <= this).map(|(place, ..)| *place);
    let kept = kept(&until_this.collect::<Vec<_>>(), keep, keep_every);
    for (place, folder, complete) in all {
        if !named.contains(&folder) && !kept.contains(&place) && (complete || place < this) {
            let _ = location.remove_folder(folder, MANIFEST);
        }
    }
    location.remove_temporaries_of(LAST);
    location.remove_temporaries_of(BEST);
}

/// Selects from `complete`, sorted by step and attempt, the newest `keep` and the first one of every `every` steps.
/// Where `every` is a multiple of the steps between checkpoints, the latter are the checkpoints at multiples of
/// `every`.
fn kept(complete: &[(usize, usize)], keep: usize, every: usize) -> Vec<(usize, usize)> {
    let newest = &complete[complete.len().saturating_sub(keep)..];
    let interval = |step: usize| step.checked_div(every).unwrap_or(0);
    let mut kept = newest.to_vec();
    for (index, (step, _)) in complete.iter().enumerate() {
        let before = complete[..index].iter().rev().map(|(step, _)| *step).find(|before| before != step);
        if interval(*step) > 0 && before.is_none_or(|before| interval(before) < interval(*step)) {
            kept.push(complete[index]);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_and_one_of_every_interval_are_kept() {
        let at = |steps: &[usize]| steps.iter().map(|&step| (step, 0)).collect::<Vec<_>>();
        let sorted = |complete: &[(usize, usize)], keep, every| {
            let mut kept = kept(complete, keep, every);
            kept.sort();
            kept.dedup();
            kept
        };
        let tens = at(&[10, 20, 30, 40, 50, 60, 70]);
        assert_eq!(sorted(&tens, 1, 0), at(&[70]));
        assert_eq!(sorted(&tens, 3, 0), at(&[50, 60, 70]));
        assert_eq!(sorted(&tens, 100, 0), tens);
        assert_eq!(sorted(&tens, 1, 30), at(&[30, 60, 70]));
        // Checkpoints that are due by time come at any step.
        assert_eq!(sorted(&at(&[7, 29, 33, 58, 59, 61, 95, 97]), 1, 30), at(&[33, 61, 95, 97]));
        // A checkpoint that is kept for good stays when the ones before it are removed.
        assert_eq!(sorted(&at(&[33, 61, 95, 97, 130]), 2, 30), at(&[33, 61, 95, 97, 130]));
        // All attempts at that step stay, because a run may have resumed from any of them.
        assert_eq!(sorted(&[(30, 0), (30, 1), (40, 0), (50, 0)], 1, 30), [(30, 0), (30, 1), (50, 0)]);
        assert_eq!(sorted(&[], 2, 5), []);
    }
}
