//! The start of a job as users meet it: a rank that fails, is late, has another secret, or too few open files.
#![cfg(target_os = "linux")]

mod common;

use common::{Place, fail, said, succeed};
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const SECRET: &str = "0123456789abcdef0123456789abcdef";
/// Waits for other ranks take this long by default; what ends well before has not waited so.
const JOIN: Duration = Duration::from_secs(60);

fn free_port() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string()
}

/// Rank `rank` of two, started by hand.
fn rank(place: &Place, port: &str, rank: &str, more: &[&str]) -> Command {
    let mut command = place.train("out", &[&["--steps", "2"], more].concat());
    let variables =
        [("RANK", rank), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)];
    command.envs(variables).env("REGATTA_SECRET", SECRET);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn both(mut first: Command, mut second: Command) -> [Output; 2] {
    let (first, second) = (first.spawn().unwrap(), second.spawn().unwrap());
    [first, second].map(|child| child.wait_with_output().unwrap())
}

#[test]
fn the_reason_of_a_rank_that_fails_at_the_start_reaches_the_others_at_once() {
    let place = Place::new();
    let bad: [&[&str]; 3] =
        [&["--set", "data.path=nowhere.txt"], &["--set", "model.heads=3"], &["--set", "model.colour=red"]];
    for (index, wrong) in bad.iter().enumerate() {
        for failing in [0, 1] {
            let begun = Instant::now();
            let port = free_port();
            let more = |number: usize| if number == failing { *wrong } else { &[] };
            let outputs = both(rank(&place, &port, "0", more(0)), rank(&place, &port, "1", more(1)));
            let other = said(&outputs[1 - failing]);
            let word = ["nowhere.txt", "heads", "colour"][index];
            assert!(outputs.iter().all(|output| !output.status.success()), "{other}");
            assert!(other.contains(&format!("rank {failing} gave up")) && other.contains(word), "{other}");
            assert!(begun.elapsed() < JOIN / 2, "{:?}", begun.elapsed());
        }
    }
}

#[test]
fn ranks_started_by_hand_train() {
    let place = Place::new();
    let port = free_port();
    let outputs = both(rank(&place, &port, "0", &[]), rank(&place, &port, "1", &[]));
    assert!(
        outputs.iter().all(|output| output.status.success()),
        "{}",
        outputs.each_ref().map(said).concat()
    );
}

#[test]
fn another_secret_is_said_on_both_sides_and_soon() {
    let place = Place::new();
    let port = free_port();
    let mut first = rank(&place, &port, "0", &[]);
    let mut second = rank(&place, &port, "1", &[]);
    first.env("REGATTA_JOIN_S", "20");
    second.env("REGATTA_SECRET", "fedcba9876543210fedcba9876543210");
    let begun = Instant::now();
    let (first, second) = (first.spawn().unwrap(), second.spawn().unwrap());
    let second = said(&second.wait_with_output().unwrap());
    assert!(begun.elapsed() < JOIN / 2, "{:?}", begun.elapsed());
    assert!(second.contains("does not hold the job's secret (REGATTA_SECRET)"), "{second}");
    let first = said(&first.wait_with_output().unwrap());
    assert!(
        first.contains("somebody at 127.0.0.1 tried to reach") && first.contains("REGATTA_SECRET differs"),
        "{first}"
    );
    assert!(first.contains("rank 1 of 2 did not join"), "{first}");
}

#[test]
fn a_short_secret_is_refused_with_the_way_to_make_one() {
    let place = Place::new();
    let text = fail(rank(&place, &free_port(), "0", &[]).env("REGATTA_SECRET", "a"));
    assert!(text.contains("REGATTA_SECRET") && text.contains("openssl rand -hex 16"), "{text}");
}

#[test]
fn a_late_rank_is_named_with_the_variable_and_the_true_time() {
    let place = Place::new();
    let text = fail(rank(&place, &free_port(), "0", &[]).env("REGATTA_JOIN_S", "0.4"));
    assert!(
        text.contains("rank 1 of 2 did not join within 0.4 s") && text.contains("REGATTA_JOIN_S"),
        "{text}"
    );
    let text = fail(rank(&place, &free_port(), "1", &[]).env("REGATTA_JOIN_S", "0.4"));
    assert!(
        text.contains("cannot reach the job's store within") && text.contains("REGATTA_JOIN_S"),
        "{text}"
    );
}

#[test]
fn ranks_that_differ_in_how_they_connect_are_told_so() {
    let place = Place::new();
    let text = |more: &[&str], variable: &str, value: &str| {
        let port = free_port();
        let mut second = rank(&place, &port, "1", more);
        second.env(variable, value);
        both(rank(&place, &port, "0", &[]), second).each_ref().map(said).concat()
    };
    let size = text(&["--set", "train.batch=9"], "WORLD_SIZE", "3");
    assert!(size.contains("WORLD_SIZE: is 3 on rank 1, and 2 on rank 0"), "{size}");
    let transport = text(&["--transport", "tcp"], "REGATTA_TRANSPORT", "shm");
    assert!(transport.contains("REGATTA_TRANSPORT: is tcp on rank 1, and left out on rank 0"), "{transport}");
    let streams = text(&[], "REGATTA_TCP_STREAMS", "2");
    assert!(streams.contains("REGATTA_TCP_STREAMS: is 2 on rank 1, and 1 on rank 0"), "{streams}");
}

/// `regatta ARGUMENTS`, run by a shell after `before`.
fn after(place: &Place, before: &str, arguments: &[&str]) -> Command {
    let own = place.regatta(arguments);
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("{before} && exec \"$0\" \"$@\"")])
        .arg(own.get_program())
        .args(own.get_args());
    command.current_dir(own.get_current_dir().unwrap()).stdin(Stdio::null());
    for (name, value) in own.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

const MEETING: [&str; 9] =
    ["bench", "collective", "--op", "all_reduce", "--transport", "tcp", "--sizes", "1024", "--workers"];

#[test]
fn too_few_open_files_are_named() {
    let place = Place::new();
    let many = [&MEETING[..], &["8"]].concat();
    let begun = Instant::now();
    let text = fail(&mut after(&place, "ulimit -n 20", &many));
    assert!(text.contains("open files") && text.contains("ulimit -n"), "{text}");
    assert!(begun.elapsed() < JOIN / 2, "{:?}", begun.elapsed());
    // A limit that this user may raise is raised.
    succeed(&mut after(&place, "ulimit -S -n 20", &many));
}

#[test]
fn a_host_without_loopback_is_told_what_to_switch_on() {
    let place = Place::new();
    if !Command::new("unshare").args(["-n", "true"]).status().is_ok_and(|status| status.success()) {
        return eprintln!("skipped: no network namespace can be made here");
    }
    let own = place.regatta(&[&MEETING[..], &["2"]].concat());
    let mut command = Command::new("unshare");
    command.arg("-n").arg(own.get_program()).args(own.get_args()).stdin(Stdio::null());
    let begun = Instant::now();
    let text = fail(&mut command);
    assert!(text.contains("ip link set lo up"), "{text}");
    assert!(begun.elapsed() < JOIN / 2, "{:?}", begun.elapsed());
}

/// Ended and waited for when dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_name_that_appears_later_is_waited_for() {
    let place = Place::new();
    if !Command::new("unshare").args(["-m", "true"]).status().is_ok_and(|status| status.success()) {
        return eprintln!("skipped: no mount namespace can be made here");
    }
    let port = free_port();
    let hosts = place.path("hosts");
    std::fs::write(&hosts, "127.0.0.1 localhost\n").unwrap();
    let start = |number: &str| {
        let own = rank(&place, &port, number, &[]);
        let mut command = Command::new("unshare");
        let script = format!("mount --bind {} /etc/hosts && exec \"$0\" \"$@\"", hosts.display());
        command.args(["-m", "sh", "-c", &script]).arg(own.get_program()).args(own.get_args());
        command.current_dir(own.get_current_dir().unwrap()).stdin(Stdio::null());
        for (name, value) in own.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        command.env("MASTER_ADDR", "regatta-rank-0").env("REGATTA_WARN_S", "0.3");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Killed(command.spawn().unwrap())
    };
    let (mut first, mut second) = (start("0"), start("1"));
    // Rank 0 says that it waits. Only then does the name appear, in the same file.
    let mut lines = BufReader::new(first.0.stderr.take().unwrap()).lines();
    let waits =
        lines.find_map(|line| line.ok().filter(|line| line.contains("regatta-rank-0"))).unwrap_or_default();
    assert!(waits.contains("rank 0 waits for the name"), "{waits}");
    let said: std::thread::JoinHandle<Vec<String>> =
        std::thread::spawn(move || lines.map_while(Result::ok).collect());
    std::fs::write(&hosts, "127.0.0.1 localhost regatta-rank-0\n").unwrap();
    let ends = [first.0.wait().unwrap(), second.0.wait().unwrap()];
    assert!(ends.iter().all(|end| end.success()), "{ends:?} {:?}", said.join());
}
