//! Completing a checkpoint whose files are written, and removing those that nothing names any longer.

use super::State;
use super::manifest::{FileEntry, Manifest};
use super::names::{BEST, LAST, MANIFEST, checked, parse};
use super::storage::Location;
use crate::error::{Error, Result};

/// Completes the checkpoint `folder` of all ranks' `files`: writes its manifest and reads it back, lets `last` (and `best`)
/// name it, and removes the checkpoints that nothing keeps: neither `last` nor `best`, nor the configuration's `train.keep`
/// and `train.keep_every`. Nothing is removed while the last validation loss is not finite. For rank 0, after every rank has
/// told it its [`FileEntry`].
///
/// # Errors
/// Files that do not make up every tensor exactly, or that cannot be seen from here; a write that fails, or that cannot be
/// read. Then what `last` and `best` name is as it was. Call [`abandon`] to remove what was written.
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
                "was written by its rank but is not whole as rank 0 sees it: give all ranks the same folder, on a \
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
        // A manifest that nobody can read must not count as one: older checkpoints stay in its place.
        let _ = location.remove_folder(folder, MANIFEST);
        return Err(error);
    }
    location.put(LAST, folder.into())?;
    if best {
        location.put(BEST, folder.into())?;
    }
    // After a validation loss that is not finite, the older ones may be what is left to go on from.
    if state.val_loss.is_none_or(f64::is_finite) {
        prune(location, this, state.config.train.keep, state.config.train.keep_every);
    }
    Ok(())
}

/// Removes the checkpoint `folder` that will not be completed, as when a rank could not write its file.
///
/// # Errors
/// A checkpoint that is complete, or a folder that cannot be removed.
pub fn abandon(location: &Location, folder: &str) -> Result<()> {
    checked(location, folder)?;
    let path = location.show(folder);
    if location.size(&format!("{folder}/{MANIFEST}")).map_err(Error::io("look into", &path))?.is_some() {
        return Err(Error::checkpoint(path, "is complete, and is not removed as an abandoned one"));
    }
    location.remove_folder(folder, MANIFEST).map_err(Error::io("remove", path))
}

/// Removes what nothing keeps: complete checkpoints, and incomplete ones before `this`. Those after it may be in writing,
/// for ranks that are done with this one go on to the next. Complete ones after it are of a run that was taken back.
fn prune(location: &Location, this: (usize, usize), keep: usize, keep_every: usize) {
    // What stays is only wasted space, and the next save tries again. So where anything is unclear, it stays.
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

/// Of complete checkpoints in their order (step and attempt): the newest `keep`, and of every `every` steps the first
/// one. Where checkpoints come every so many steps, and `every` is a multiple of that, these are its multiples.
fn kept(complete: &[(usize, usize)], keep: usize, every: usize) -> Vec<(usize, usize)> {
    let newest = &complete[complete.len().saturating_sub(keep)..];
    let stretch = |step: usize| step.checked_div(every).unwrap_or(0);
    let mut kept = newest.to_vec();
    for (index, (step, _)) in complete.iter().enumerate() {
        let before = complete[..index].iter().rev().map(|(step, _)| *step).find(|before| before != step);
        if stretch(*step) > 0 && before.is_none_or(|before| stretch(before) < stretch(*step)) {
            kept.push(complete[index]);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_and_one_of_every_stretch_are_kept() {
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
        // Checkpoints by the clock come at any step.
        assert_eq!(sorted(&at(&[7, 29, 33, 58, 59, 61, 95, 97]), 1, 30), at(&[33, 61, 95, 97]));
        // What is kept for good stays when those before it are gone.
        assert_eq!(sorted(&at(&[33, 61, 95, 97, 130]), 2, 30), at(&[33, 61, 95, 97, 130]));
        // All attempts at that step, for one of them may be what a run went on from.
        assert_eq!(sorted(&[(30, 0), (30, 1), (40, 0), (50, 0)], 1, 30), [(30, 0), (30, 1), (50, 0)]);
        assert_eq!(sorted(&[], 2, 5), []);
    }
}
