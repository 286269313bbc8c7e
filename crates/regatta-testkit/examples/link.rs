//! Measures a link between two hosts: the round-trip time of one byte, and the rate at which MIB are sent over TCP.
//!
//! Usage: `link [MIB] [MBIT] [DELAY_US] [LOSS_PERCENT]`. The defaults are 1000 Mbit/s and 500 us per cable. TCP can
//! use 956 Mbit/s of that: 1448 of the 1514 bytes of a frame. A rate of 0 means no limit.

use regatta_testkit::{Hosts, Link};
use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Round trips of which the median is printed.
const ROUND_TRIPS: usize = 200;

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::var("LINK_ROLE").as_deref() {
        Ok("receive") => return receive(),
        Ok(address) => return send(address),
        Err(_) => {}
    }
    let arguments: Vec<f64> = std::env::args().skip(1).map(|text| text.parse()).collect::<Result<_, _>>()?;
    let number = |place: usize, default: f64| arguments.get(place).copied().unwrap_or(default);
    let (mib, mbit, delay, loss_percent) =
        (number(0, 256.0), number(1, 1000.0), number(2, 500.0), number(3, 0.0));
    let link = Link {
        rate_bits: (mbit > 0.0).then_some((mbit * 1e6) as u64),
        delay: Duration::from_secs_f64(delay / 1e6),
        loss_percent,
    };
    let hosts = Hosts::new(2, &link)?;
    let program = std::env::current_exe()?;
    let mut receiver =
        hosts.command(1, &program).env("LINK_ROLE", "receive").stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(receiver.stdout.take().ok_or("no output")?).lines();
    let address = lines.next().ok_or("the receiver ended")??;
    let begun = Instant::now();
    let mut sender =
        hosts.command(0, &program).env("LINK_ROLE", address).env("LINK_MIB", mib.to_string()).spawn()?;
    for line in lines {
        println!("{}", line?);
    }
    let ended = sender.wait()?.success() && receiver.wait()?.success();
    println!(
        "{mib} MiB at {mbit} Mbit/s, {delay} us per cable, {loss_percent} % lost: {:.1?} in total",
        begun.elapsed()
    );
    if ended { Ok(()) } else { Err("the sender or the receiver failed".into()) }
}

/// Receives: prints its address, and then the rate of the data, measured from the first byte on.
fn receive() -> Result<(), Box<dyn Error>> {
    let own: IpAddr = std::env::var("REGATTA_IFACE_ADDR")?.parse()?;
    let listener = TcpListener::bind((own, 0))?;
    println!("{}", listener.local_addr()?);
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let mut byte = [0];
    for _ in 0..ROUND_TRIPS {
        stream.read_exact(&mut byte)?;
        stream.write_all(&byte)?;
    }
    let mut buffer = vec![0; 1 << 20];
    stream.read_exact(&mut byte)?;
    let begun = Instant::now();
    let mut bytes = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            count => bytes += count,
        }
    }
    println!("{:.1} Mbit/s of goodput", bytes as f64 * 8e-6 / begun.elapsed().as_secs_f64());
    Ok(())
}

/// Sends: measures round trips, then sends the data.
fn send(address: &str) -> Result<(), Box<dyn Error>> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut times = vec![];
    for _ in 0..ROUND_TRIPS {
        let begun = Instant::now();
        stream.write_all(&[0])?;
        stream.read_exact(&mut [0])?;
        times.push(begun.elapsed());
    }
    times.sort_unstable();
    let (median, least) = (times[ROUND_TRIPS / 2].as_micros(), times[0].as_micros());
    println!("{median} us per round trip (median; minimum {least} us)");
    let block = vec![0; 1 << 20];
    let mut left = (std::env::var("LINK_MIB")?.parse::<f64>()? * (1 << 20) as f64) as usize;
    while left > 0 {
        let count = stream.write(&block[..left.min(block.len())])?;
        left -= count;
    }
    Ok(())
}
