//! What a link between two hosts carries: sends MIB from one to the other over TCP and prints the rate, then
//! the time of a round trip of one byte.
//!
//! `link [MIB] [MBIT] [DELAY_US] [LOSS_PERCENT]`; without the link's numbers 1000 Mbit/s and 500 us, of which TCP
//! can have 1448 bytes in frames of 1514, 956 Mbit/s. A rate of 0 is none.

use regatta_testkit::{Hosts, Link};
use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::process::Stdio;
use std::time::{Duration, Instant};

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
        "{mib} MiB at {mbit} Mbit/s, {delay} us a cable, {loss_percent} % lost: {:.1?} in all",
        begun.elapsed()
    );
    if ended { Ok(()) } else { Err("a side failed".into()) }
}

/// Prints its address and then the rate at which the data came, from its first byte on.
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
    println!("{median} us a round trip (median; least {least} us)");
    let block = vec![0; 1 << 20];
    let mut left = (std::env::var("LINK_MIB")?.parse::<f64>()? * (1 << 20) as f64) as usize;
    while left > 0 {
        let count = stream.write(&block[..left.min(block.len())])?;
        left -= count;
    }
    Ok(())
}
