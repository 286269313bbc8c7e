//! The folder of a run. Only one run at a time uses it, and all ranks must see it.

use super::job::Job;
use crate::checkpoint::{Candidates, Location, Which, candidates};
use crate::error::{Error, Result};
use crate::files::{Locked, try_lock};
use crate::setup::agree_on;
use regatta_comm::Group;
use regatta_comm::hostname;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Name of the file that is locked during a run.
const LOCK: &str = "lock";
/// How long a rank waits to see rank 0's file: clients of network file systems may see it late.
const VISIBLE_WITHIN: Duration = Duration::from_secs(10);
/// Time between two looks for rank 0's file.
const RETRY_AFTER: Duration = Duration::from_millis(50);

/// Creates a folder for a new run of all ranks of `group`: `base`, or `base-2`, `base-3` and so on if it exists.
/// Several jobs that call this at the same time get different folders. All ranks call it and get the same path.
///
/// # Errors
/// The folder cannot be created, or its name is not UTF-8 and there are several ranks.
pub fn claim_folder(group: &Group, base: &Path) -> Result<PathBuf> {
    if group.size() == 1 {
        return claim(base);
    }
    let name = |path: PathBuf| {
        path.into_os_string().into_string().map_err(|path| {
            Error::Usage(format!("{} is not UTF-8: give the run's folder with --out", path.display()))
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

/// Whether the folder `path` has a summary or checkpoints of a run, which a new run would overwrite.
pub fn holds_run(path: &Path) -> bool {
    let any = |found: Result<Candidates>| found.is_ok_and(|found| !found.folders.is_empty());
    path.join("summary.json").exists() || any(candidates(&Location::of_run(path), Which::Last))
}

/// The folder of a running run. While this value lives, no other run can use the folder.
pub(super) struct RunFolder {
    path: PathBuf,
    /// The locked file, on rank 0, if the file system has locks.
    lock: Option<File>,
    /// Whether this is rank 0.
    lead: bool,
    /// Whether the run has reached its first step.
    begun: bool,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

impl RunFolder {
    /// Locks the folder for this run, and checks that all ranks see it and the location of checkpoints, and can write
    /// there. All ranks call it.
    ///
    /// # Errors
    /// Another run uses the folder, a new run's folder has an earlier run, the folder cannot be written, or a rank
    /// does not share it.
    pub(super) fn enter(job: &Job, location: &Location) -> Result<Self> {
        let mut folder =
            Self { path: job.out.clone(), lock: None, lead: job.leads(), begun: false, warnings: vec![] };
        if job.is_free() && !folder.lead {
            // The first worker writes there, and no other.
            return Ok(folder);
        }
        let token = agree_on(&job.group, || folder.create(job, location))?;
        let problem = folder.check_shared(job, location, &token).err().unwrap_or_default();
        let all = job.group.all_gather_vec(problem.as_bytes())?;
        if folder.lead && !token.is_empty() {
            // A file that stays costs only space.
            let _ = location.remove(&probe(&token));
        }
        match all.iter().find(|problem| !problem.is_empty()) {
            Some(problem) => Err(Error::Usage(String::from_utf8_lossy(problem).into_owned())),
            None => Ok(folder),
        }
    }

    /// Rank 0's part: creates and locks the folder, and writes a file with a token. Returns the token, for which the
    /// others look; it is empty if the disk is full.
    fn create(&mut self, job: &Job, location: &Location) -> Result<String> {
        let out = &job.out;
        fs::create_dir_all(out).map_err(Error::io("create the run's folder", out))?;
        self.lock(out)?;
        if job.resume.is_none() {
            self.check_new(job, location)?;
        }
        if let Some(path) = &job.config.train.trace {
            // A path that cannot be written is an error now, not at the end of the run.
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
                // There may be space when the first checkpoint is written.
                self.warnings.push(format!("the disk is full, so no checkpoint can be written now: {error}"));
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
                // The text is only for the message below, so errors do not matter.
                let _ = file.set_len(0).and_then(|()| file.write_all(who.as_bytes()));
                self.lock = Some(file);
                Ok(())
            }
            Ok(Locked::Taken) => {
                let who = fs::read_to_string(&path).unwrap_or_default();
                let who = if who.trim().is_empty() { "another process" } else { who.trim() };
                Err(Error::Usage(format!(
                    "{} is used by another run ({who}): wait for its end, or give another --out",
                    out.display()
                )))
            }
            Ok(Locked::Unavailable(error)) => {
                self.warnings.push(format!(
                    "{} cannot be locked ({error}): make sure that no other run uses this folder at the same time",
                    out.display()
                ));
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::StorageFull => Ok(()),
            Err(error) => Err(Error::io("lock", &path)(error)),
        }
    }

    /// Checks that a new run does not overwrite an earlier one.
    fn check_new(&self, job: &Job, location: &Location) -> Result<()> {
        let has_checkpoints = !candidates(location, Which::Last)?.folders.is_empty();
        if !has_checkpoints && !job.out.join("summary.json").exists() {
            return Ok(());
        }
        let (place, other) = match &job.config.train.checkpoint_url {
            Some(url) if has_checkpoints => (url.clone(), "train.checkpoint_url"),
            _ => (job.out.display().to_string(), "--out"),
        };
        Err(Error::Usage(format!(
            "{place} has an earlier run: continue it with --resume, or give another {other}"
        )))
    }

    /// On other ranks: waits for rank 0's token, and tries to write a file. The error says what failed.
    fn check_shared(&self, job: &Job, location: &Location, token: &str) -> Result<(), String> {
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
        // The others wait for this rank meanwhile and must not reach their deadline.
        let timeout = VISIBLE_WITHIN.min(Duration::from_secs_f64(job.config.parallel.deadline_s / 3.0));
        let begun = Instant::now();
        loop {
            match location.text(&probe(token)) {
                Ok(Some(text)) if text == token => break,
                Err(error) if error.kind() != io::ErrorKind::NotADirectory => {
                    return wrong(format!("cannot read ({error}) the files of rank 0 in"));
                }
                _ if begun.elapsed() >= timeout => {
                    return wrong("does not see the files of rank 0 in".into());
                }
                _ => {
                    location.refresh();
                    std::thread::sleep(RETRY_AFTER);
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
            Err(error) => wrong(format!("cannot write ({error}) into")),
        }
    }

    /// Marks that the run has reached its first step, so that its folder stays.
    pub(super) fn begin(&mut self) {
        self.begun = true;
    }
}

impl Drop for RunFolder {
    /// Removes the folder of a run that did not reach its first step, if it is empty.
    fn drop(&mut self) {
        if self.begun || !self.lead || self.lock.is_none() {
            return;
        }
        // Only empty folders are removed. The lock file is removed while it is locked.
        let _ = fs::remove_dir(crate::checkpoint::folder(&self.path));
        let empty = || Some(fs::read_dir(&self.path).ok()?.flatten().all(|entry| entry.file_name() == LOCK));
        if empty() == Some(true) {
            let _ = fs::remove_file(self.path.join(LOCK));
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Name of the file by which ranks check that they share a folder.
fn probe(token: &str) -> String {
    format!("probe-{token}")
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Whether the reason of `error` is a full disk or an exceeded quota.
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
