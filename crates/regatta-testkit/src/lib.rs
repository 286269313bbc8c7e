//! Several hosts on one machine, for tests and benchmarks: network namespaces of Linux, joined by a switch.
//!
//! Each host has a network card `eth0` with an address of its own in 10.77.0.0/16. Nothing of the machine's own
//! network is touched: the switch is a bridge in a namespace of its own. It needs root and iproute2; where they
//! are missing, [`Hosts::or_skip`] says so and tests skip.
//!
//! ```no_run
//! use regatta_testkit::{Hosts, Link};
//! use std::time::Duration;
//!
//! let gigabit = Link { rate_bits: Some(1_000_000_000), delay: Duration::from_micros(500), ..Link::default() };
//! let Some(hosts) = Hosts::or_skip(2, &gigabit) else { return };
//! let server = hosts.command(0, "my-server").arg(hosts.address(0).to_string()).spawn();
//! hosts.cut(0); // The cable is out: packets are lost, and nobody is told.
//! # drop(server);
//! ```
//!
//! # What makes a link slow
//! The rate is kept by the kernel (`tbf`). Delay and loss are the kernel's too (`netem`) where it has that; many
//! small kernels do not. Then the cards are TAP devices and threads of this process are the switch, which hold
//! every frame for the delay. That takes some of a processor: `examples/link.rs` measures what a link carries.

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

/// Hosts made by this process so far: numbers of namespaces are not used twice.
static MADE: AtomicUsize = AtomicUsize::new(0);
/// Switches made by this process so far.
static SWITCHES: AtomicUsize = AtomicUsize::new(0);
/// Addresses are 10.77.x.y with y from 1 to this.
const HOSTS_A_BYTE: usize = 250;
/// More would not fit the second byte of the card's address.
const MOST_HOSTS: usize = HOSTS_A_BYTE * 250;

/// What every host's cable carries away from it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Link {
    /// Bits in a second, headers included; none: as fast as the machine can.
    pub rate_bits: Option<u64>,
    /// From one end to the other. A round trip between two hosts takes both their delays.
    pub delay: Duration,
    /// How many in a hundred packets are lost.
    pub loss_percent: f64,
}

impl Link {
    fn late_or_lossy(&self) -> bool {
        self.delay > Duration::ZERO || self.loss_percent > 0.0
    }
}

/// Why there are no hosts here, as a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unavailable(String);

impl std::fmt::Display for Unavailable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unavailable {}

/// What joins the hosts.
enum Switch {
    /// A bridge in this namespace. The kernel holds up and loses packets if it has `netem`.
    Bridge { namespace: String, netem: bool },
    /// Threads of this process.
    Wire(Wire),
}

/// Hosts that reach one another and nothing else, numbered from 0. Dropping them removes their namespaces, but
/// ends no process.
pub struct Hosts {
    names: Vec<String>,
    switch: Switch,
}

impl Hosts {
    /// Makes `count` hosts with a `link` each. What kits of processes that are gone left behind is removed first.
    ///
    /// # Errors
    /// No root, no iproute2, or a kernel without what `link` needs.
    pub fn new(count: usize, link: &Link) -> Result<Self, Unavailable> {
        system::check()?;
        if count > MOST_HOSTS {
            return Err(Unavailable(format!(
                "{count} hosts are too many: there are addresses for {MOST_HOSTS}"
            )));
        }
        system::remove_leftovers();
        let own = format!("{PREFIX}{}-", std::process::id());
        let namespace = match SWITCHES.fetch_add(1, Ordering::Relaxed) {
            0 => format!("{own}net"),
            more => format!("{own}net{more}"),
        };
        let mut hosts =
            Self { names: vec![], switch: Switch::Bridge { namespace: namespace.clone(), netem: false } };
        // From here on dropping `hosts` cleans up, also after an error.
        system::add_namespace(&namespace)?;
        let netem = system::has_netem(&namespace);
        if link.late_or_lossy() && !netem {
            system::delete_namespace(&namespace);
            hosts.switch = Switch::Wire(Wire::new()?);
        } else {
            hosts.switch = Switch::Bridge { namespace: namespace.clone(), netem };
            ip(&["-n", &namespace, "link", "add", "bridge0", "type", "bridge", "mcast_snooping", "0"])?;
            ip(&["-n", &namespace, "link", "set", "bridge0", "up"])?;
        }
        for _ in 0..count {
            hosts.add(&format!("{own}{}", MADE.fetch_add(1, Ordering::Relaxed)))?;
        }
        for host in 0..count {
            hosts.shape(host, link)?;
        }
        Ok(hosts)
    }

    /// As [`new`](Self::new), for tests: where there can be no hosts, says why on standard error.
    pub fn or_skip(count: usize, link: &Link) -> Option<Self> {
        Self::new(count, link).inspect_err(|reason| eprintln!("skipped: {reason}")).ok()
    }

    /// Adds the next host, with its card in the switch.
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
                ip(&["-n", name, "link", "set", "eth0", "address", &card, "txqueuelen", "10000"])?;
            }
        }
        let address = format!("{}/16", self.address(host));
        ip(&["-n", name, "address", "add", &address, "dev", "eth0"])?;
        ip(&["-n", name, "link", "set", "eth0", "up"])
    }

    /// How many hosts there are.
    #[expect(clippy::len_without_is_empty, reason = "nobody makes no hosts")]
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// The address of `host`.
    pub fn address(&self, host: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, (host / HOSTS_A_BYTE) as u8, (host % HOSTS_A_BYTE + 1) as u8)
    }

    /// The namespaces of these hosts, and of their switch where it has one.
    pub fn namespaces(&self) -> Vec<String> {
        let switch = match &self.switch {
            Switch::Bridge { namespace, .. } => Some(namespace.clone()),
            Switch::Wire(_) => None,
        };
        self.names.iter().cloned().chain(switch).collect()
    }

    /// `program`, to be run on `host`. Its environment tells Regatta which host it is on (`REGATTA_HOST`) and at
    /// which address others reach it (`REGATTA_IFACE_ADDR`). The process that is spawned is the program itself.
    ///
    /// # Panics
    /// When there is no such host.
    pub fn command(&self, host: usize, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[host]]).arg(program);
        command.env("REGATTA_HOST", format!("host{host}"));
        command.env("REGATTA_IFACE_ADDR", self.address(host).to_string());
        command
    }

    /// Takes the cable of `host` out: from now on packets from and to it are lost, without a word to either side.
    ///
    /// # Panics
    /// When there is no such host.
    pub fn cut(&self, host: usize) {
        self.plug(host, false);
    }

    /// Puts the cable of `host` back in.
    ///
    /// # Panics
    /// When there is no such host.
    pub fn mend(&self, host: usize) {
        self.plug(host, true);
    }

    fn plug(&self, host: usize, plugged: bool) {
        assert!(host < self.len(), "there is no host {host} of {}", self.len());
        match &self.switch {
            Switch::Bridge { namespace, .. } => {
                let state = if plugged { "up" } else { "down" };
                let done = ip(&["-n", namespace, "link", "set", &format!("port{host}"), state]);
                done.expect("the kit's own bridge has this port");
            }
            Switch::Wire(wire) => wire.plug(host, plugged),
        }
    }

    /// Changes the link of `host` while it runs.
    ///
    /// # Errors
    /// A delay or loss, where the kernel has no `netem` and the hosts were made without either.
    ///
    /// # Panics
    /// When there is no such host.
    pub fn shape(&self, host: usize, link: &Link) -> Result<(), Unavailable> {
        let name = &self.names[host];
        // There may be nothing to remove.
        let _ = tc(&["-n", name, "qdisc", "del", "dev", "eth0", "root"]);
        let mut place = vec!["root", "handle", "1:"];
        match &self.switch {
            Switch::Wire(wire) => wire.shape(host, link)?,
            Switch::Bridge { netem: false, .. } if link.late_or_lossy() => {
                return Err(Unavailable(
                    "this kernel has no netem (CONFIG_NET_SCH_NETEM): make the hosts with a delay at first"
                        .into(),
                ));
            }
            Switch::Bridge { .. } if link.late_or_lossy() => {
                let delay = format!("{}us", link.delay.as_micros());
                let loss = format!("{}%", link.loss_percent);
                let netem = ["netem", "limit", "200000", "delay", &delay, "loss", &loss];
                tc(&[&["-n", name, "qdisc", "add", "dev", "eth0"], &place[..], &netem].concat())?;
                place = vec!["parent", "1:1", "handle", "10:"];
            }
            Switch::Bridge { .. } => {}
        }
        let Some(rate) = link.rate_bits else { return Ok(()) };
        // A burst lasts a millisecond, the timer's tick, and holds two frames; the queue holds 50 ms, as a switch's.
        let burst = (rate / 8 / 1000).max(2 * 1600);
        let limit = (rate / 8 / 20).max(256 << 10) + burst;
        let (rate, burst, limit) = (format!("{rate}bit"), burst.to_string(), limit.to_string());
        let tbf = ["tbf", "rate", &rate, "burst", &burst, "limit", &limit];
        tc(&[&["-n", name, "qdisc", "add", "dev", "eth0"], &place[..], &tbf].concat())
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in self.namespaces() {
            // The card goes first: the namespace itself may live on, in a process on the host.
            let _ = ip(&["-n", &name, "link", "del", "eth0"]);
            system::delete_namespace(&name);
        }
    }
}
