//! Reads the records of a job's ranks, and skips what cannot be read.

use crate::error::Result;
use serde::Deserialize;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The first line of a file: which rank wrote it, and about which group.
#[derive(Debug, Clone, Deserialize)]
pub struct Header {
    pub rank: usize,
    pub world: usize,
    pub group: String,
    /// The group's members, as ranks of the world.
    pub members: Vec<usize>,
    pub host: String,
    pub pid: u32,
    /// Why the file was written.
    pub failure: String,
}

/// An operation of a rank.
#[derive(Debug, Clone, Deserialize)]
pub struct Operation {
    /// Number in its group, from 1; messages are numbered between their two ranks.
    pub sequence: u64,
    pub kind: String,
    /// The call as text.
    pub call: String,
    /// Microseconds since 1970, by a clock that the ranks share.
    pub begun_us: i64,
    /// `None` if the operation failed or was in progress when the file was written.
    pub ended_us: Option<i64>,
}

/// What one rank wrote about one group.
#[derive(Debug, Clone)]
pub struct File {
    pub header: Header,
    pub operations: Vec<Operation>,
    /// Some lines cannot be read: an operation that is missing may have happened.
    pub torn: bool,
}

/// What the ranks of a job wrote.
#[derive(Debug)]
pub struct Job {
    pub folder: PathBuf,
    pub files: Vec<File>,
    /// What could not be read, as sentences.
    pub problems: Vec<String>,
}

impl Job {
    /// Reads the files in `folder`, or else in the newest of its folders that has any.
    ///
    /// # Errors
    /// The folder does not exist, or nothing in it can be read.
    pub fn read(folder: &Path) -> Result<Self> {
        let own = files(folder).map_err(|error| format!("cannot read {}: {error}", folder.display()))?;
        let (folder, paths) = if own.is_empty() {
            newest(folder).ok_or_else(|| {
                let folder = folder.display();
                format!(
                    "no rank-R-group-G.jsonl is in {folder} or a folder in it: ranks write them when an operation \
                     fails, and REGATTA_TRACE says where"
                )
            })?
        } else {
            (folder.to_path_buf(), own)
        };
        let (mut read, mut problems) = (vec![], vec![]);
        for path in paths {
            match fs::read(&path) {
                Ok(bytes) => read.extend(parse(&path, &bytes, &mut problems)),
                Err(error) => problems.push(format!("{} is skipped: {error}", path.display())),
            }
        }
        if read.is_empty() {
            return Err(
                format!("no file in {} can be read: {}", folder.display(), problems.join("; ")).into()
            );
        }
        read.sort_by(|a, b| (&a.header.group, a.header.rank).cmp(&(&b.header.group, b.header.rank)));
        Ok(Self { folder, files: read, problems })
    }

    /// The number of ranks of the world.
    pub fn world(&self) -> usize {
        self.files.iter().map(|file| file.header.world).max().unwrap_or(0)
    }
}

/// The recorders' files in a folder, sorted.
fn files(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let recorded = |path: &PathBuf| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        name.starts_with("rank-") && name.contains("-group-") && name.ends_with(".jsonl")
    };
    let mut paths: Vec<PathBuf> =
        fs::read_dir(folder)?.flatten().map(|entry| entry.path()).filter(recorded).collect();
    paths.sort();
    Ok(paths)
}

/// Of the folders in `folder`, the one with the newest files, and these files.
fn newest(folder: &Path) -> Option<(PathBuf, Vec<PathBuf>)> {
    let written = |path: &PathBuf| fs::metadata(path).and_then(|about| about.modified()).ok();
    let mut found: Option<(Option<SystemTime>, PathBuf, Vec<PathBuf>)> = None;
    for entry in fs::read_dir(folder).ok()?.flatten() {
        let paths = files(&entry.path()).unwrap_or_default();
        let latest = paths.iter().filter_map(written).max();
        if !paths.is_empty() && found.as_ref().is_none_or(|(newest, ..)| latest > *newest) {
            found = Some((latest, entry.path(), paths));
        }
    }
    found.map(|(_, folder, paths)| (folder, paths))
}

/// Reads a file as far as possible; adds what cannot be read to `problems`.
fn parse(path: &Path, bytes: &[u8], problems: &mut Vec<String>) -> Option<File> {
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.lines().enumerate();
    let path = path.display();
    let header: Header = match lines.next().map(|(_, line)| serde_json::from_str(line)) {
        Some(Ok(header)) => header,
        Some(Err(_)) => {
            problems.push(format!("{path} is skipped: its first line does not say which rank wrote it"));
            return None;
        }
        None => {
            problems.push(format!("{path} is skipped: it is empty"));
            return None;
        }
    };
    let mut file = File { header, operations: vec![], torn: false };
    for (index, line) in lines {
        match serde_json::from_str(line) {
            Ok(operation) => file.operations.push(operation),
            Err(_) => {
                file.torn = true;
                problems.push(format!("line {} of {path} is skipped: it is not an operation", index + 1));
            }
        }
    }
    Some(file)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::fmt::Write as _;

    /// The file of a rank of group 0 with these calls, each with the times at which it began and ended.
    pub fn file(rank: usize, world: usize, failure: &str, calls: &[(&str, i64, Option<i64>)]) -> String {
        let members: Vec<usize> = (0..world).collect();
        let mut text = format!(
            "{{\"rank\":{rank},\"world\":{world},\"group\":\"0\",\"members\":{members:?},\"host\":\"h\",\"pid\":{},\
             \"failure\":\"{failure}\"}}\n",
            100 + rank
        );
        for (call, begun, ended) in calls {
            let kind = call.split(' ').next().unwrap();
            let sequence = call.split(['#', ' ']).nth(2).unwrap();
            let ended = ended.map_or("null".into(), |ended| ended.to_string());
            writeln!(
                text,
                "{{\"sequence\":{sequence},\"kind\":\"{kind}\",\"dtype\":\"f32\",\"len\":1,\"op\":\"sum\",\"root\":0,\
                 \"call\":\"{call}\",\"begun_us\":{begun},\"ended_us\":{ended}}}"
            )
            .unwrap();
        }
        text
    }

    /// Reads such files as a job.
    pub fn job(texts: &[String]) -> Job {
        let folder = tempfile::tempdir().unwrap();
        for (rank, text) in texts.iter().enumerate() {
            fs::write(folder.path().join(format!("rank-{rank}-group-0.jsonl")), text).unwrap();
        }
        Job::read(folder.path()).unwrap()
    }

    #[test]
    fn bad_files_are_named_and_skipped() {
        let whole = file(0, 4, "why", &[("barrier #1", 1, Some(2)), ("barrier #2", 3, None)]);
        let torn = whole[..whole.len() - 30].replace("\"rank\":0", "\"rank\":1");
        let job = job(&[whole, torn, "garbage\n{}".into(), String::new(), "\u{fffd}\0".into()]);
        assert_eq!(job.files.len(), 2);
        assert_eq!((job.files[0].operations.len(), job.files[0].torn), (2, false));
        assert_eq!((job.files[1].operations.len(), job.files[1].torn), (1, true));
        assert_eq!(job.world(), 4);
        for (problem, part) in job.problems.iter().zip([
            "line 3 of ",
            "rank-2-group-0.jsonl is skipped: its first line",
            "rank-3-group-0.jsonl is skipped: it is empty",
            "rank-4-group-0.jsonl is skipped: its first line",
        ]) {
            assert!(problem.contains(part), "{problem}");
        }
    }

    #[test]
    fn the_newest_job_of_a_parent_is_read() {
        let parent = tempfile::tempdir().unwrap();
        assert!(Job::read(parent.path()).unwrap_err().to_string().contains("REGATTA_TRACE"));
        assert!(Job::read(&parent.path().join("none")).unwrap_err().to_string().contains("cannot read"));
        let write = |name: &str, age_s: u64| {
            fs::create_dir(parent.path().join(name)).unwrap();
            let path = parent.path().join(name).join("rank-0-group-0.jsonl");
            fs::write(&path, file(0, 1, name, &[])).unwrap();
            let time = SystemTime::now() - std::time::Duration::from_secs(age_s);
            fs::File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
        };
        write("old", 100);
        write("new", 1);
        write("older", 200);
        fs::create_dir(parent.path().join("empty")).unwrap();
        let job = Job::read(parent.path()).unwrap();
        assert_eq!((job.files[0].header.failure.as_str(), job.folder), ("new", parent.path().join("new")));
    }
}
