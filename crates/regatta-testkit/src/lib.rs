//! Several hosts on one machine, for tests and benchmarks: Linux network namespaces that are connected by a switch.
//!
//! Each host has a network card `eth0` with an address in 10.77.0.0/16. The machine's own network is not changed: the
//! switch is a bridge in a separate namespace. The kit needs root and iproute2. If they are missing,
//! [`Hosts::or_skip`] prints why, and tests skip.
//!
//! ```no_run
//! use regatta_testkit::{Hosts, Link};
//! use std::time::Duration;
//!
//! let gigabit = Link { rate_bits: Some(1_000_000_000), delay: Duration::from_micros(500), ..Link::default() };
//! let Some(hosts) = Hosts::or_skip(2, &gigabit) else { return };
//! let server = hosts.command(0, "my-server").arg(hosts.address(0).to_string()).spawn();
//! hosts.cut(0); // The cable is unplugged: packets are lost, and neither side is notified.
//! # drop(server);
//! ```
//!
//! # How links are slowed down
//! The kernel limits the rate (`tbf`). Delay and loss are also simulated by the kernel if it has `netem`, which many
//! small kernels lack. Without it the cards are TAP devices, and threads of this process are the switch and hold
//! every frame for the delay. This takes processor time: `examples/link.rs` measures the rate that a link reaches.

mod system;
#[cfg(target_os = "linux")]
mod wire;
#[cfg(not(target_os = "linux"))]
#[path = "no_wire.rs"]
mod wire;

use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use system::{PREFIX, ip, tc};
use wire::Wire;

/// The number of hosts that this process has made. Numbers of namespaces are not used twice.
static HOSTS_MADE: AtomicUsize = AtomicUsize::new(0);
/// The number of switches that this process has made.
static SWITCHES: AtomicUsize = AtomicUsize::new(0);
/// Addresses are 10.77.x.y, where y is 1 to this number.
const HOSTS_A_BYTE: usize = 250;
/// The most hosts: x of the address must fit in a byte.
const MOST_HOSTS: usize = HOSTS_A_BYTE * 250;
/// Queue of a card that `netem` delays, in packets: long enough that none is dropped.
const NETEM_PACKETS: &str = "200000";
/// Queue of a TAP device, in packets.
const TAP_PACKETS: &str = "10000";
/// Bytes of the largest frame, with some room.
const FRAME_BYTES: u64 = 1600;
/// The shortest queue of a card with a rate, in bytes.
const MIN_QUEUE_BYTES: u64 = 256 << 10;

/// The properties of a host's cable, in the direction away from the host.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Link {
    /// Bits per second, headers included. `None`: as fast as the machine can.
    pub rate_bits: Option<u64>,
    /// The delay of a packet from the host to the switch. A round trip between two hosts takes the delays of both.
    pub delay: Duration,
    /// The share of packets that are lost, in percent.
    pub loss_percent: f64,
}

impl Link {
    /// Whether packets are delayed or lost.
    fn has_delay_or_loss(&self) -> bool {
        self.delay > Duration::ZERO || self.loss_percent > 0.0
    }
}

/// Why hosts cannot be made on this machine, as a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unavailable(String);

impl std::fmt::Display for Unavailable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unavailable {}

/// What connects the hosts.
enum Switch {
    /// A bridge in this namespace. The kernel delays and drops packets if it has `netem`.
    Bridge { namespace: String, netem: bool },
    /// Threads of this process, and TAP devices.
    Wire(Wire),
}

/// Hosts that can reach each other and nothing else. They are numbered from 0. Dropping this removes the namespaces,
/// but ends no process.
pub struct Hosts {
    names: Vec<String>,
    switch: Switch,
}

impl Hosts {
    /// Makes `count` hosts, each with a `link`. Before that it removes the namespaces that ended processes left
    /// behind.
    ///
    /// # Errors
    /// If the process is not root, iproute2 is missing, `count` is too large, or the kernel does not support `link`.
    pub fn new(count: usize, link: &Link) -> Result<Self, Unavailable> {
        system::check()?;
        if count > MOST_HOSTS {
            return Err(Unavailable(format!("{count} hosts are too many: the most is {MOST_HOSTS}")));
        }
        system::remove_leftovers();
        let own = format!("{PREFIX}{}-", std::process::id());
        let namespace = match SWITCHES.fetch_add(1, Ordering::Relaxed) {
            0 => format!("{own}net"),
            more => format!("{own}net{more}"),
        };
        let mut hosts =
            Self { names: vec![], switch: Switch::Bridge { namespace: namespace.clone(), netem: false } };
        // From here on, dropping `hosts` removes the namespaces, also after an error.
        system::add_namespace(&namespace)?;
        let netem = system::has_netem(&namespace);
        if link.has_delay_or_loss() && !netem {
            system::delete_namespace(&namespace);
            hosts.switch = Switch::Wire(Wire::new()?);
        } else {
            hosts.switch = Switch::Bridge { namespace: namespace.clone(), netem };
            ip(&["-n", &namespace, "link", "add", "bridge0", "type", "bridge", "mcast_snooping", "0"])?;
            ip(&["-n", &namespace, "link", "set", "bridge0", "up"])?;
        }
        for _ in 0..count {
            hosts.add(&format!("{own}{}", HOSTS_MADE.fetch_add(1, Ordering::Relaxed)))?;
        }
        for host in 0..count {
            hosts.shape(host, link)?;
        }
        Ok(hosts)
    }

    /// As [`new`](Self::new), for tests: if hosts cannot be made, prints the reason to standard error and returns
    /// `None`.
    pub fn or_skip(count: usize, link: &Link) -> Option<Self> {
        Self::new(count, link).inspect_err(|reason| eprintln!("skipped: {reason}")).ok()
    }

    /// Adds the next host and connects its card to the switch.
    fn add(&mut self, name: &str) -> Result<(), Unavailable> {
        let host = self.names.len();
        system::add_namespace(name)?;
        self.names.push(name.into());
        match &mut self.switch {
            Switch::Bridge { namespace, .. } => {
                let port = format!("port{host}");
                #[rustfmt::skip]
                ip(&["-n", namespace, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", name])?;
                ip(&["-n", namespace, "link", "set", &port, "master", "bridge0", "up"])?;
            }
            Switch::Wire(wire) => {
                wire.add(name)?;
                let card = wire::card(host).map(|byte| format!("{byte:02x}")).join(":");
                ip(&["-n", name, "link", "set", "eth0", "address", &card, "txqueuelen", TAP_PACKETS])?;
            }
        }
        let address = format!("{}/16", self.address(host));
        ip(&["-n", name, "address", "add", &address, "dev", "eth0"])?;
        ip(&["-n", name, "link", "set", "eth0", "up"])
    }

    /// The number of hosts.
    #[expect(clippy::len_without_is_empty, reason = "a test always makes at least one host")]
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// The IP address of `host`.
    pub fn address(&self, host: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, (host / HOSTS_A_BYTE) as u8, (host % HOSTS_A_BYTE + 1) as u8)
    }

    /// The names of the namespaces of these hosts, and of the switch if it has one.
    pub fn namespaces(&self) -> Vec<String> {
        let switch = match &self.switch {
            Switch::Bridge { namespace, .. } => Some(namespace.clone()),
            Switch::Wire(_) => None,
        };
        self.names.iter().cloned().chain(switch).collect()
    }

    /// A command that runs `program` on `host`. Its environment says which host it is on (`REGATTA_HOST`) and at
    /// which address others reach it (`REGATTA_IFACE_ADDR`). The spawned process is the program itself, not a
    /// wrapper.
    ///
    /// # Panics
    /// If there is no such host.
    pub fn command(&self, host: usize, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[host]]).arg(program);
        command.env("REGATTA_HOST", format!("host{host}"));
        command.env("REGATTA_IFACE_ADDR", self.address(host).to_string());
        command
    }

    /// Unplugs the cable of `host`: from now on packets from and to it are lost, and neither side is notified.
    ///
    /// # Panics
    /// If there is no such host.
    pub fn cut(&self, host: usize) {
        self.plug(host, false);
    }

    /// Plugs the cable of `host` in again.
    ///
    /// # Panics
    /// If there is no such host.
    pub fn mend(&self, host: usize) {
        self.plug(host, true);
    }

    /// Plugs the cable of `host` in, or unplugs it.
    fn plug(&self, host: usize, plugged: bool) {
        assert!(host < self.len(), "there is no host {host}: there are {}", self.len());
        match &self.switch {
            Switch::Bridge { namespace, .. } => {
                let state = if plugged { "up" } else { "down" };
                let done = ip(&["-n", namespace, "link", "set", &format!("port{host}"), state]);
                done.expect("the kit's own bridge has this port");
            }
            Switch::Wire(wire) => wire.plug(host, plugged),
        }
    }

    /// Changes the link of `host` while programs run on it.
    ///
    /// # Errors
    /// If `link` has a delay or loss, the kernel has no `netem`, and the hosts were made without delay and loss.
    ///
    /// # Panics
    /// If there is no such host.
    pub fn shape(&self, host: usize, link: &Link) -> Result<(), Unavailable> {
        let name = &self.names[host];
        // This fails if there is nothing to remove.
        let _ = tc(&["-n", name, "qdisc", "del", "dev", "eth0", "root"]);
        let mut position = vec!["root", "handle", "1:"];
        match &self.switch {
            Switch::Wire(wire) => wire.shape(host, link)?,
            Switch::Bridge { netem: false, .. } if link.has_delay_or_loss() => {
                return Err(Unavailable(
                    "this kernel has no netem (CONFIG_NET_SCH_NETEM): give the hosts a delay when you make them"
                        .into(),
                ));
            }
            Switch::Bridge { .. } if link.has_delay_or_loss() => {
                let delay = format!("{}us", link.delay.as_micros());
                let loss = format!("{}%", link.loss_percent);
                let netem = ["netem", "limit", NETEM_PACKETS, "delay", &delay, "loss", &loss];
                tc(&[&["-n", name, "qdisc", "add", "dev", "eth0"], &position[..], &netem].concat())?;
                position = vec!["parent", "1:1", "handle", "10:"];
            }
            Switch::Bridge { .. } => {}
        }
        let Some(rate) = link.rate_bits else { return Ok(()) };
        // The burst is what the link sends in 1 ms (the tick of the timer), and at least two frames. The queue holds
        // what the link sends in 50 ms, as that of a switch.
        let burst = (rate / 8 / 1000).max(2 * FRAME_BYTES);
        let limit = (rate / 8 / 20).max(MIN_QUEUE_BYTES) + burst;
        let (rate, burst, limit) = (format!("{rate}bit"), burst.to_string(), limit.to_string());
        let tbf = ["tbf", "rate", &rate, "burst", &burst, "limit", &limit];
        tc(&[&["-n", name, "qdisc", "add", "dev", "eth0"], &position[..], &tbf].concat())
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in self.namespaces() {
            // The card is removed first, because a process on the host may keep the namespace alive.
            let _ = ip(&["-n", &name, "link", "del", "eth0"]);
            system::delete_namespace(&name);
        }
    }
}
