//! Hosts reach each other, cannot reach each other while a cable is unplugged, and leave nothing behind.

use regatta_testkit::{Hosts, Link};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// Longer than any answer takes.
const DEADLINE: Duration = Duration::from_secs(30);
/// Time without an answer after which a host counts as unreachable.
const SILENCE: Duration = Duration::from_millis(300);

/// This is not a test, but a program that the tests start on a host. With the role `echo` it listens, and sends back
/// what it receives. If the role is an address, it sends a byte there for every line of its input, and prints the
/// result.
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

    /// The next line that the program prints for the test. The program itself has a deadline.
    fn read_answer(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the program ended");
            if let Some((_, answer)) = line.split_once("says ") {
                return answer.trim().into();
            }
        }
    }

    /// Sends a request and returns the answer.
    fn ask(&mut self, request: &str) -> String {
        writeln!(self.input.as_ref().unwrap(), "{request}").unwrap();
        self.read_answer()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client on host 0, and the echo program on host 1 that it is connected to.
fn connected(hosts: &Hosts) -> (Program, Program) {
    let mut echo = Program::start(hosts, 1, "echo");
    let address = echo.read_answer();
    assert!(address.starts_with(&hosts.address(1).to_string()), "{address}");
    let mut client = Program::start(hosts, 0, &address);
    assert_eq!(client.read_answer(), "host0 true");
    (client, echo)
}

/// The namespaces of the machine.
fn namespaces() -> String {
    String::from_utf8(Command::new("ip").args(["netns", "list"]).output().unwrap().stdout).unwrap()
}

/// Links for both kinds of switches: without a delay the switch is always a bridge.
fn links() -> [Link; 2] {
    [Link::default(), Link { delay: Duration::from_millis(20), ..Link::default() }]
}

fn echo_time(answer: &str) -> Duration {
    let time = answer.strip_prefix("echo after ").and_then(|rest| rest.strip_suffix(" us"));
    Duration::from_micros(time.unwrap_or_else(|| panic!("no echo: {answer}")).parse().unwrap())
}

#[test]
fn hosts_reach_each_other_after_the_delay() {
    for link in links() {
        let Some(hosts) = Hosts::or_skip(2, &link) else { continue };
        let (mut client, _echo) = connected(&hosts);
        let time = echo_time(&client.ask("ping"));
        assert!(time >= 2 * link.delay, "{time:?}");
    }
}

#[test]
fn a_cut_cable_loses_packets_until_it_is_mended() {
    for link in links() {
        let Some(hosts) = Hosts::or_skip(3, &link) else { continue };
        let (mut client, _echo) = connected(&hosts);
        echo_time(&client.ask("ping"));
        for cut in [0, 1] {
            hosts.cut(cut);
            assert_eq!(client.ask("try"), "nothing");
            hosts.mend(cut);
            echo_time(&client.ask("wait"));
        }
        // Cutting the cable of another host has no effect.
        hosts.cut(2);
        echo_time(&client.ask("ping"));
    }
}

#[test]
fn a_link_changes_while_it_runs() {
    let Some(hosts) = Hosts::or_skip(2, &links()[1]) else { return };
    let (mut client, _echo) = connected(&hosts);
    let slow = Link { delay: Duration::from_millis(100), rate_bits: Some(10_000_000), ..Link::default() };
    hosts.shape(0, &slow).unwrap();
    let time = echo_time(&client.ask("ping"));
    assert!(time >= Duration::from_millis(120), "{time:?}");
    hosts.shape(0, &Link { loss_percent: 100.0, ..Link::default() }).unwrap();
    assert_eq!(client.ask("try"), "nothing");
    hosts.shape(0, &Link::default()).unwrap();
    echo_time(&client.ask("wait"));
}

#[test]
fn nothing_is_left_behind() {
    for link in links() {
        let Some(hosts) = Hosts::or_skip(2, &link) else { continue };
        let names = hosts.namespaces();
        assert!(names.len() >= 2 && names.iter().all(|name| namespaces().contains(name)), "{names:?}");
        drop(hosts);
        assert!(!names.iter().any(|name| namespaces().contains(name)), "{names:?}");
        let mut names = vec![];
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let hosts = Hosts::new(1, &link).unwrap();
            names = hosts.namespaces();
            panic!("on purpose");
        }));
        assert!(caught.is_err());
        assert!(!names.is_empty() && !names.iter().any(|name| namespaces().contains(name)), "{names:?}");
    }
}

#[test]
fn namespaces_of_ended_processes_are_removed() {
    let Some(first) = Hosts::or_skip(1, &Link::default()) else { return };
    let mut child = Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    let left = ["0", "net"].map(|rest| format!("regatta-{}-{rest}", child.id()));
    for name in &left {
        assert!(Command::new("ip").args(["netns", "add", name]).status().unwrap().success());
    }
    let second = Hosts::new(1, &Link::default()).unwrap();
    let listed = namespaces();
    assert!(!left.iter().any(|name| listed.contains(name)), "{listed}");
    // Namespaces of running processes stay.
    assert!(
        first.namespaces().iter().chain(&second.namespaces()).all(|name| listed.contains(name)),
        "{listed}"
    );
}
