//! Hosts reach each other, lose each other when a cable is out, and leave nothing behind.

use regatta_testkit::{Hosts, Link};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// Long enough for anything that happens at all.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long silence must last to be one.
const SILENCE: Duration = Duration::from_millis(300);

/// Not a test by itself: a program on a host, which the tests start. `echo` listens and sends back what comes;
/// with an address, it sends a byte there for every line of its input and says what became of it.
#[test]
fn program() {
    let Ok(role) = std::env::var("KIT_TEST_PROGRAM") else { return };
    if role == "echo" {
        let own: IpAddr = std::env::var("REGATTA_IFACE_ADDR").unwrap().parse().unwrap();
        let listener = TcpListener::bind((own, 0)).unwrap();
        println!("says {}", listener.local_addr().unwrap());
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_nodelay(true).unwrap();
        let mut byte = [0];
        while stream.read_exact(&mut byte).is_ok() {
            stream.write_all(&byte).unwrap();
        }
        return;
    }
    let mut stream = TcpStream::connect_timeout(&role.parse().unwrap(), DEADLINE).unwrap();
    stream.set_nodelay(true).unwrap();
    println!("says {} {}", std::env::var("REGATTA_HOST").unwrap(), std::path::Path::new("/dev/shm").is_dir());
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let begun = Instant::now();
        if line != "wait" {
            stream.write_all(&[1]).unwrap();
        }
        let patience = if line == "try" { SILENCE } else { DEADLINE };
        stream.set_read_timeout(Some(patience)).unwrap();
        match stream.read(&mut [0]) {
            Ok(1) => println!("says echo after {} us", begun.elapsed().as_micros()),
            Ok(_) => println!("says end"),
            Err(error) if error.kind() == ErrorKind::WouldBlock => println!("says nothing"),
            Err(error) => println!("says {error}"),
        }
    }
}

struct Program {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Program {
    fn start(hosts: &Hosts, host: usize, role: &str) -> Self {
        let mut child = hosts
            .command(host, std::env::current_exe().unwrap())
            .args(["program", "--exact", "--nocapture"])
            .env("KIT_TEST_PROGRAM", role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, input, output }
    }

    /// The next thing that it says. It keeps the deadline itself.
    fn says(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the program ended");
            if let Some((_, said)) = line.split_once("says ") {
                return said.trim().into();
            }
        }
    }

    fn asked(&mut self, request: &str) -> String {
        writeln!(self.input.as_ref().unwrap(), "{request}").unwrap();
        self.says()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client on host 0 and the echo on host 1 that it is connected to.
fn connected(hosts: &Hosts) -> (Program, Program) {
    let mut echo = Program::start(hosts, 1, "echo");
    let address = echo.says();
    assert!(address.starts_with(&hosts.address(1).to_string()), "{address}");
    let mut client = Program::start(hosts, 0, &address);
    assert_eq!(client.says(), "host0 true");
    (client, echo)
}

fn listed() -> String {
    String::from_utf8(Command::new("ip").args(["netns", "list"]).output().unwrap().stdout).unwrap()
}

/// Every way in which hosts can be joined here: without a delay there is always a bridge.
fn ways() -> [Link; 2] {
    [Link::default(), Link { delay: Duration::from_millis(20), ..Link::default() }]
}

fn echo_time(said: &str) -> Duration {
    let time = said.strip_prefix("echo after ").and_then(|rest| rest.strip_suffix(" us"));
    Duration::from_micros(time.unwrap_or_else(|| panic!("no echo: {said}")).parse().unwrap())
}

#[test]
fn hosts_reach_each_other_after_the_delay() {
    for link in ways() {
        let Some(hosts) = Hosts::or_skip(2, &link) else { continue };
        let (mut client, _echo) = connected(&hosts);
        let time = echo_time(&client.asked("ping"));
        assert!(time >= 2 * link.delay, "{time:?}");
    }
}

#[test]
fn a_cut_cable_is_silent_until_it_is_mended() {
    for link in ways() {
        let Some(hosts) = Hosts::or_skip(3, &link) else { continue };
        let (mut client, _echo) = connected(&hosts);
        echo_time(&client.asked("ping"));
        for cut in [0, 1] {
            hosts.cut(cut);
            assert_eq!(client.asked("try"), "nothing");
            hosts.mend(cut);
            echo_time(&client.asked("wait"));
        }
        // Another host's cable does not matter.
        hosts.cut(2);
        echo_time(&client.asked("ping"));
    }
}

#[test]
fn a_link_changes_while_it_runs() {
    let Some(hosts) = Hosts::or_skip(2, &ways()[1]) else { return };
    let (mut client, _echo) = connected(&hosts);
    let slow = Link { delay: Duration::from_millis(100), rate_bits: Some(10_000_000), ..Link::default() };
    hosts.shape(0, &slow).unwrap();
    let time = echo_time(&client.asked("ping"));
    assert!(time >= Duration::from_millis(120), "{time:?}");
    hosts.shape(0, &Link { loss_percent: 100.0, ..Link::default() }).unwrap();
    assert_eq!(client.asked("try"), "nothing");
    hosts.shape(0, &Link::default()).unwrap();
    echo_time(&client.asked("wait"));
}

#[test]
fn nothing_is_left_behind() {
    for link in ways() {
        let Some(hosts) = Hosts::or_skip(2, &link) else { continue };
        let names = hosts.namespaces();
        assert!(names.len() >= 2 && names.iter().all(|name| listed().contains(name)), "{names:?}");
        drop(hosts);
        assert!(!names.iter().any(|name| listed().contains(name)), "{names:?}");
        let mut names = vec![];
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let hosts = Hosts::new(1, &link).unwrap();
            names = hosts.namespaces();
            panic!("on purpose");
        }));
        assert!(caught.is_err());
        assert!(!names.is_empty() && !names.iter().any(|name| listed().contains(name)), "{names:?}");
    }
}

#[test]
fn what_a_dead_kit_left_is_removed() {
    let Some(first) = Hosts::or_skip(1, &Link::default()) else { return };
    let mut child = Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    let left = ["0", "net"].map(|rest| format!("regatta-{}-{rest}", child.id()));
    for name in &left {
        assert!(Command::new("ip").args(["netns", "add", name]).status().unwrap().success());
    }
    let second = Hosts::new(1, &Link::default()).unwrap();
    let listed = listed();
    assert!(!left.iter().any(|name| listed.contains(name)), "{listed}");
    // What belongs to the living stays.
    assert!(
        first.namespaces().iter().chain(&second.namespaces()).all(|name| listed.contains(name)),
        "{listed}"
    );
}
