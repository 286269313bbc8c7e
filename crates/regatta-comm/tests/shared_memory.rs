//! Where ranks of a host cannot share memory: they say so once, with the cause and the cure, and use TCP.
#![cfg(target_os = "linux")]

use regatta_comm::rendezvous::{Security, StoreServer, World};
use regatta_comm::{Group, Options, ReduceOp};
use std::path::Path;
use std::process::{Command, Stdio};

/// Not a test by itself: a rank in a process of its own.
#[test]
fn child_rank() {
    let Ok(store) = std::env::var("REGATTA_TEST_STORE") else { return };
    let rank = std::env::var("REGATTA_TEST_RANK").unwrap().parse().unwrap();
    let group = Group::connect(&World::local(rank, 3, &store), &Options::from_env().unwrap()).unwrap();
    let groups = std::env::var("REGATTA_TEST_GROUPS").map_or(2, |count| count.parse().unwrap());
    // Groups that follow meet the same obstacle, and have nothing new to say.
    for _ in 0..groups {
        let again = group.with_algorithm(None).unwrap();
        assert_eq!(again.transport(), group.transport());
        let mut sum = [rank as f32];
        again.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
        assert_eq!(sum, [3.0]);
    }
    let _buffer = group.buffer::<u8>(4 << 20).unwrap();
    group.barrier().unwrap();
    println!("over {}", group.transport());
}

/// What three ranks print, each with its own variables.
fn said(variables: impl Fn(usize) -> Vec<(&'static str, String)>) -> String {
    let server = StoreServer::start("127.0.0.1:0", 3, &Security::default()).unwrap();
    let start = |rank: usize| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["child_rank", "--exact", "--nocapture"]);
        command
            .env("REGATTA_TEST_STORE", server.addr().to_string())
            .env("REGATTA_TEST_RANK", rank.to_string());
        command.envs(variables(rank)).env("REGATTA_TRACE", "off");
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let ranks: Vec<_> = (0..3).map(start).collect();
    let output = |child: std::process::Child| child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    ranks.into_iter().map(output).map(|output| text(output.stdout) + &text(output.stderr)).collect()
}

/// A file system of its own, of so many bytes; none where this user may not mount.
struct Disk(tempfile::TempDir);

impl Disk {
    fn of(size: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "none"]).arg(folder.path()).status();
        if !mounted.is_ok_and(|status| status.success()) {
            eprintln!("skipped: no file system can be mounted here");
            return None;
        }
        Some(Self(folder))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

const GIVEN_UP: &str = "warning: the ranks of a host do not share memory and use TCP instead";

#[test]
fn a_full_file_system_is_named_once_with_the_cure() {
    let Some(disk) = Disk::of("64k") else { return };
    let text = said(|_| vec![("REGATTA_SHM_DIR", disk.path().display().to_string())]);
    assert_eq!(text.matches("over tcp").count(), 3, "{text}");
    assert_eq!(text.matches(GIVEN_UP).count(), 1, "{text}");
    assert!(text.contains("(os error 28)") && text.contains("--shm-size"), "{text}");
    assert_eq!(std::fs::read_dir(disk.path()).unwrap().count(), 0, "a segment is left behind");
}

#[test]
fn lanes_that_differ_are_named() {
    let text = said(|rank| vec![("REGATTA_SHM_LANES", (1 + rank % 2).to_string())]);
    assert_eq!(text.matches("over tcp").count(), 3, "{text}");
    assert!(text.contains(GIVEN_UP) && text.contains("ranks differ in REGATTA_SHM_LANES"), "{text}");
}

#[test]
fn a_buffer_that_finds_no_room_is_told_of() {
    // Room for the ranks' meeting place, and for no buffers.
    let Some(disk) = Disk::of("8m") else { return };
    let text = said(|_| vec![("REGATTA_SHM_DIR", disk.path().display().to_string())]);
    assert_eq!(text.matches("over shm").count(), 3, "{text}");
    assert!(text.contains("no room for a buffer of 4 MiB") && text.contains("REGATTA_SHM_DIR"), "{text}");
}

#[test]
fn shared_memory_that_works_needs_no_word() {
    let text = said(|_| vec![]);
    assert_eq!(text.matches("over shm").count(), 3, "{text}");
    assert!(!text.contains("warning"), "{text}");
}

#[test]
fn groups_that_have_ended_leave_their_memory_to_others() {
    // Room for the parts of a few groups: of the group of all ranks, one under way, and one that some have left.
    let Some(disk) = Disk::of("8m") else { return };
    let folder = disk.path().display().to_string();
    let text = said(|_| vec![("REGATTA_SHM_DIR", folder.clone()), ("REGATTA_TEST_GROUPS", "200".into())]);
    assert_eq!(text.matches("over shm").count(), 3, "{text}");
    assert!(!text.contains(GIVEN_UP), "{text}");
}
