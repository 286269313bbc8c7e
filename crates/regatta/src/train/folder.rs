//! The folder of a run: it belongs to one run at a time, and all ranks see it.

use super::run::Job;
use crate::checkpoint::{Candidates, Location, Which, candidates};
use crate::error::{Error, Result};
use crate::files::{Locked, try_lock};
use regatta_comm::Group;
use regatta_comm::rendezvous::hostname;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Locked while a run goes on.
const LOCK: &str = "lock";
/// How long a rank looks for what rank 0 has written: clients of network file systems may take a while to see it.
const LOOK: Duration = Duration::from_secs(10);

/// Makes a folder for a new run of all ranks of `group`: `base`, or `base-2`, `base-3` and so on where that is taken. Of
/// several jobs that do this at the same moment, each gets a folder of its own. All ranks call it.
///
/// # Errors
/// A folder that cannot be made, or a name that is no UTF-8 where there are several ranks.
pub fn claim_folder(group: &Group, base: &Path) -> Result<PathBuf> {
    if group.size() == 1 {
        return claim(base);
    }
    let name = |path: PathBuf| {
        path.into_os_string().into_string().map_err(|path| {
            Error::Usage(format!("{} is no UTF-8: give the run's folder with --out", path.display()))
        })
    };
    agree_on(group, || claim(base).and_then(name)).map(PathBuf::from)
}

fn claim(base: &Path) -> Result<PathBuf> {
    if let Some(parent) = base.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    }
    for number in 1usize.. {
        let mut name = base.as_os_str().to_owned();
        if number > 1 {
            name.push(format!("-{number}"));
        }
        let path = PathBuf::from(name);
        match fs::create_dir(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::io("create the run's folder", &path)(error)),
        }
    }
    Err(Error::Usage(format!("{}: no number is left for a new folder", base.display())))
}

/// Whether a run has left something in the folder `path` that another run would write over.
pub fn holds_run(path: &Path) -> bool {
    let some = |found: Result<Candidates>| found.is_ok_and(|found| !found.folders.is_empty());
    path.join("summary.json").exists() || some(candidates(&Location::of_run(path), Which::Last))
}

/// What rank 0 says, on all ranks; or its error. All ranks of the group call it.
pub(super) fn agree_on(group: &Group, say: impl FnOnce() -> Result<String>) -> Result<String> {
    if group.size() == 1 {
        return say();
    }
    let mine = (group.rank() == 0).then(say);
    // A first byte says whether the rest is what was said or an error.
    let mut text = match &mine {
        Some(Ok(text)) => [&[1], text.as_bytes()].concat(),
        Some(Err(error)) => [&[0], error.to_string().as_bytes()].concat(),
        None => vec![],
    };
    let mut len = [text.len() as i64];
    group.broadcast(&mut len, 0)?;
    text.resize(len[0] as usize, 0);
    group.broadcast(&mut text, 0)?;
    let said = || String::from_utf8_lossy(text.get(1..).unwrap_or_default()).into_owned();
    match mine {
        Some(said) => said,
        None if text.first() == Some(&1) => Ok(said()),
        None => Err(Error::Usage(said())),
    }
}

/// The folder of a run that goes on. While it lives, no other run takes the folder.
pub(super) struct RunFolder {
    path: PathBuf,
    /// On rank 0, where the file system has locks.
    lock: Option<File>,
    lead: bool,
    /// Whether the run has come to its first step.
    begun: bool,
    /// What should be said to the user.
    pub warnings: Vec<String>,
}

impl RunFolder {
    /// Takes the folder for this run, and checks that all ranks see it and the place of the checkpoints, and can write there.
    /// All ranks call it.
    ///
    /// # Errors
    /// A folder that another run has, or that holds an earlier run while this one begins; a folder that cannot be written;
    /// one that a rank does not share.
    pub(super) fn enter(job: &Job, location: &Location) -> Result<Self> {
        let mut folder = Self {
            path: job.out.clone(),
            lock: None,
            lead: job.group.rank() == 0,
            begun: false,
            warnings: vec![],
        };
        let token = agree_on(&job.group, || folder.lead(job, location))?;
        let wrong = folder.look(job, location, &token).err().unwrap_or_default();
        let all = job.group.all_gather_vec(wrong.as_bytes())?;
        if folder.lead && !token.is_empty() {
            // What stays is only wasted space.
            let _ = location.remove(&probe(&token));
        }
        match all.iter().find(|wrong| !wrong.is_empty()) {
            Some(wrong) => Err(Error::Usage(String::from_utf8_lossy(wrong).into_owned())),
            None => Ok(folder),
        }
    }

    /// Rank 0's part: makes, locks and probes the folder. Returns the token that the others look for.
    fn lead(&mut self, job: &Job, location: &Location) -> Result<String> {
        let out = &job.out;
        fs::create_dir_all(out).map_err(Error::io("create the run's folder", out))?;
        self.lock(out)?;
        if job.resume.is_none() {
            self.is_new(job, location)?;
        }
        if let Some(path) = &job.config.train.trace {
            // A path that cannot be written is told now, and not when all is done.
            let opened = File::options().create(true).append(true).open(path);
            opened.map_err(Error::io("write the trace", path))?;
        }
        let token = format!("{:x}-{:x}", std::process::id(), now().as_nanos());
        let written = location
            .create_folder()
            .map_err(Error::io("create", location.show("")))
            .and_then(|()| location.put(&probe(&token), token.clone().into_bytes()));
        match written {
            Ok(()) => Ok(token),
            Err(error) if full(&error) => {
                // There may be room when the first checkpoint comes.
                self.warnings.push(format!("the disk is full, no checkpoint can be written now: {error}"));
                Ok(String::new())
            }
            Err(error) => Err(error),
        }
    }

    fn lock(&mut self, out: &Path) -> Result<()> {
        let path = out.join(LOCK);
        match try_lock(&path) {
            Ok(Locked::Ours(mut file)) => {
                let who = format!("process {} on {}\n", std::process::id(), hostname());
                // For the message below; the lock is what counts.
                let _ = file.set_len(0).and_then(|()| file.write_all(who.as_bytes()));
                self.lock = Some(file);
                Ok(())
            }
            Ok(Locked::Taken) => {
                let who = fs::read_to_string(&path).unwrap_or_default();
                let who = if who.trim().is_empty() { "another process" } else { who.trim() };
                Err(Error::Usage(format!(
                    "{} belongs to a run that is going on ({who}): wait for its end, or give another --out",
                    out.display()
                )))
            }
            Ok(Locked::Unavailable(error)) => {
                self.warnings.push(format!(
                    "{} cannot be locked ({error}): see to it that no other run uses this folder at the same time",
                    out.display()
                ));
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::StorageFull => Ok(()),
            Err(error) => Err(Error::io("lock", &path)(error)),
        }
    }

    /// Checks that a run that begins does not write over another.
    fn is_new(&self, job: &Job, location: &Location) -> Result<()> {
        let there = !candidates(location, Which::Last)?.folders.is_empty();
        if !there && !job.out.join("summary.json").exists() {
            return Ok(());
        }
        let (place, other) = match &job.config.train.checkpoint_url {
            Some(url) if there => (url.clone(), "train.checkpoint_url"),
            _ => (job.out.display().to_string(), "--out"),
        };
        Err(Error::Usage(format!(
            "{place} holds an earlier run: go on with --resume, or give another {other}"
        )))
    }

    /// Looks for rank 0's token, and tries to write beside it. Says what is wrong.
    fn look(&self, job: &Job, location: &Location, token: &str) -> Result<(), String> {
        if self.lead || token.is_empty() {
            return Ok(());
        }
        let rank = job.group.rank();
        let wrong = |problem: String| {
            Err(format!(
                "rank {rank} on {} {problem} {}: all ranks need the same folder, on a file system that they share; give \
                 --out a folder there, or train.checkpoint_url an object store",
                hostname(),
                location.show("").display()
            ))
        };
        // The others wait for this rank meanwhile, with their own deadline.
        let patience = LOOK.min(Duration::from_secs_f64(job.config.parallel.deadline_s / 3.0));
        let begun = Instant::now();
        loop {
            match location.text(&probe(token)) {
                Ok(Some(text)) if text == token => break,
                Err(error) if error.kind() != io::ErrorKind::NotADirectory => {
                    return wrong(format!("cannot read ({error}) what rank 0 writes to"));
                }
                _ if begun.elapsed() >= patience => {
                    return wrong("does not see what rank 0 writes to".into());
                }
                _ => {
                    location.refresh();
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
        let own = format!("{}-{rank}", probe(token));
        match location.put(&own, vec![]) {
            Ok(()) => {
                let _ = location.remove(&own);
                Ok(())
            }
            Err(error) if full(&error) => Ok(()),
            Err(error) => wrong(format!("cannot write ({error}) to")),
        }
    }

    /// From now on the folder holds something of the run.
    pub(super) fn begin(&mut self) {
        self.begun = true;
    }
}

impl Drop for RunFolder {
    /// Leaves nothing of a run that did not come to its first step.
    fn drop(&mut self) {
        if self.begun || !self.lead || self.lock.is_none() {
            return;
        }
        // Folders are removed where they are empty, and nothing else is. The lock file goes while it is still locked.
        let _ = fs::remove_dir(crate::checkpoint::folder(&self.path));
        let empty = || Some(fs::read_dir(&self.path).ok()?.flatten().all(|entry| entry.file_name() == LOCK));
        if empty() == Some(true) {
            let _ = fs::remove_file(self.path.join(LOCK));
            let _ = fs::remove_dir(&self.path);
        }
    }
}

fn probe(token: &str) -> String {
    format!("probe-{token}")
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn full(error: &Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error, Error::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_at_once_get_a_folder_each() {
        let place = tempfile::tempdir().unwrap();
        let base = place.path().join("runs/name");
        let claimed: Vec<PathBuf> = std::thread::scope(|scope| {
            let all: Vec<_> = (0..16).map(|_| scope.spawn(|| claim(&base).unwrap())).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        });
        let mut names: Vec<_> = claimed.iter().map(|path| path.file_name().unwrap().to_owned()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 16);
        assert!(base.is_dir() && place.path().join("runs/name-16").is_dir());
    }
}
