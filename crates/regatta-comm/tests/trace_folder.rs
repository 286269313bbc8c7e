//! Where the last operations are written when something fails: a folder that is the user's alone.
#![cfg(target_os = "linux")]

use regatta_comm::{Group, Options, ReduceOp};
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime};

/// Set in the process whose job fails.
const CHILD: &str = "REGATTA_TEST_TRACE";

/// Two ranks that call different operations.
#[test]
fn a_job_that_fails() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let groups = Group::threads_with(2, &Options::from_env().unwrap()).unwrap();
    std::thread::scope(|scope| {
        for group in groups {
            scope.spawn(move || match group.rank() {
                0 => group.barrier().unwrap_err(),
                _ => group.all_reduce(&mut [1.0f32], ReduceOp::Sum).unwrap_err(),
            });
        }
    });
}

/// The job, with `temporary` as the folder of temporary files.
fn fail(temporary: &Path, stderr: Stdio) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["a_job_that_fails", "--exact", "--nocapture"]).stderr(stderr);
    command.env("TMPDIR", temporary).env(CHILD, "1").env_remove("REGATTA_TRACE").env_remove("RUST_BACKTRACE");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    output
}

fn said(temporary: &Path) -> String {
    String::from_utf8(fail(temporary, Stdio::piped()).stderr).unwrap()
}

fn folder(temporary: &Path) -> PathBuf {
    temporary.join(format!("regatta-trace-{}", rustix::process::getuid().as_raw()))
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn the_folder_is_private_and_does_not_grow_for_ever() {
    let temporary = tempfile::tempdir().unwrap();
    let text = said(temporary.path());
    let folder = folder(temporary.path());
    assert!(text.contains(&format!("see `regatta trace {}/", folder.display())), "{text}");
    assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
    let first = names(&folder);
    assert_eq!(first.len(), 1);
    assert_eq!(names(&folder.join(&first[0])).len(), 2);

    // A job of a month ago, one of an hour ago, and what a link points to.
    let age = |path: &Path, age: u64| {
        let then = SystemTime::now() - Duration::from_secs(age);
        File::open(path).unwrap().set_modified(then).unwrap();
    };
    let precious = temporary.path().join("precious");
    for (name, seconds) in [("old", 30 * 86_400), ("young", 3600)] {
        fs::create_dir(folder.join(name)).unwrap();
        fs::write(folder.join(name).join("rank-0-group-0.jsonl"), "{}\n").unwrap();
        age(&folder.join(name), seconds);
    }
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("file"), "kept").unwrap();
    age(&precious, 30 * 86_400);
    symlink(&precious, folder.join("link")).unwrap();
    said(temporary.path());
    let left = names(&folder);
    assert!(
        left.contains(&first[0]) && left.contains(&"young".into()) && !left.contains(&"old".into()),
        "{left:?}"
    );
    assert_eq!(fs::read_to_string(precious.join("file")).unwrap(), "kept");
}

#[test]
fn links_and_the_folders_of_others_are_refused_and_said() {
    let temporary = tempfile::tempdir().unwrap();
    let victim = temporary.path().join("victim");
    fs::create_dir(&victim).unwrap();
    let folder = folder(temporary.path());
    symlink(&victim, &folder).unwrap();
    let text = said(temporary.path());
    assert!(text.contains("cannot write the last operations") && text.contains("it is a link"), "{text}");
    assert!(text.contains("REGATTA_TRACE"), "{text}");
    assert!(names(&victim).is_empty());

    fs::remove_file(&folder).unwrap();
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    let text = said(temporary.path());
    assert!(text.contains("other users can write there"), "{text}");
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: giving a folder to another user takes root");
    }
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::chown(&folder, Some(12_345), None).unwrap();
    let text = said(temporary.path());
    assert!(text.contains("it belongs to another user"), "{text}");
    assert!(names(&folder).is_empty() && fs::metadata(&folder).unwrap().uid() == 12_345);
}

#[test]
fn messages_that_cannot_be_written_change_nothing() {
    let temporary = tempfile::tempdir().unwrap();
    fail(temporary.path(), File::options().write(true).open("/dev/full").unwrap().into());
    assert_eq!(names(&folder(temporary.path())).len(), 1);
}
