//! Runs a command on this machine that can start programs on several hosts with slow links.
//!
//! Usage: `on_hosts HOSTS MBIT DELAY_US COMMAND [ARGUMENT...]`. The command finds `HOST_0`, `HOST_1`, ... in its environment:
//! network namespaces, for `ip netns exec`; and their addresses as `ADDRESS_0`, `ADDRESS_1`, ... A way from host to host
//! has the rate and takes the delay. 0 Mbit/s: as fast as the machine can. Needs root.

use regatta_testkit::{Hosts, Link};
use std::error::Error;
use std::process::{Command, ExitCode};
use std::time::Duration;

const USAGE: &str = "usage: on_hosts HOSTS MBIT DELAY_US COMMAND [ARGUMENT...]";

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [count, mbit, delay, command, more @ ..] = &arguments[..] else { return Err(USAGE.into()) };
    let (mbit, delay) = (mbit.parse::<f64>()?, delay.parse::<f64>()?);
    // A path has two cables, each with half of the delay.
    let link = Link {
        rate_bits: (mbit > 0.0).then_some((mbit * 1e6) as u64),
        delay: Duration::from_secs_f64(delay / 2e6),
        loss_percent: 0.0,
    };
    let hosts = Hosts::new(count.parse()?, &link)?;
    let mut command = Command::new(command);
    command.args(more);
    for (host, name) in hosts.namespaces().iter().enumerate() {
        command.env(format!("HOST_{host}"), name);
        command.env(format!("ADDRESS_{host}"), hosts.address(host).to_string());
    }
    let status = command.status()?;
    Ok(status.code().map_or(ExitCode::FAILURE, |code| ExitCode::from(code.clamp(0, 255) as u8)))
}
