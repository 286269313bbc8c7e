//! Completing a checkpoint whose files are written, and removing those that nothing names any longer.

use super::State;
use super::manifest::{FileEntry, Manifest};
use super::names::{BEST, LAST, MANIFEST, checked, parse};
use super::storage::Location;
use crate::error::{Error, Result};

/// Completes the checkpoint `folder` of all ranks' `files`: writes its manifest, lets `last` (and `best`) name it,
/// and removes the checkpoints that neither names. For rank 0, after every rank has told it its [`FileEntry`].
///
/// # Errors
/// Files that do not make up every tensor exactly, or that cannot be seen from here; a write that fails. Then what
/// `last` and `best` name is as it was. Call [`abandon`] to remove what was written.
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
    location.put(LAST, folder.into())?;
    if best {
        location.put(BEST, folder.into())?;
    }
    prune(location, this);
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

/// Removes what neither `last` nor `best` names: complete checkpoints, and incomplete ones before `this`. Those
/// after it may be in writing, for ranks that are done with this one go on to the next.
fn prune(location: &Location, this: (usize, usize)) {
    // What stays is only wasted space, and the next save tries again. So where anything is unclear, it stays.
    let (Ok(folders), Ok(last), Ok(best)) = (location.folders(), location.text(LAST), location.text(BEST))
    else {
        return;
    };
    let named: Vec<&str> = [&last, &best].into_iter().flatten().map(|name| name.trim()).collect();
    if named.iter().any(|name| parse(name).is_none()) {
        return;
    }
    for folder in folders {
        let Some(place) = parse(&folder).filter(|_| !named.contains(&folder.as_str())) else { continue };
        let complete = matches!(location.size(&format!("{folder}/{MANIFEST}")), Ok(Some(_)));
        if complete || place < this {
            let _ = location.remove_folder(&folder, MANIFEST);
        }
    }
    location.remove_temporaries_of(LAST);
    location.remove_temporaries_of(BEST);
}
