//! A switch in this process, for kernels without `netem`. Every host's card is a TAP device, and threads copy the
//! frames from card to card after the delay.
//!
//! Each host has two threads: one reads frames from the card and records when they are due, and the other delivers
//! them at that time. The kernel passes segments of up to 64 KiB with a header that says how to divide them
//! (`virtio_net_hdr`), so one gigabit per second is only a few thousand frames per second. If packets are to be lost,
//! the kernel divides segments first.

use crate::system::FOLDER;
use crate::{Link, Unavailable};
use rustix::fs::{Mode, OFlags, open};
use rustix::ioctl::{IntegerSetter, Setter, ioctl, opcode};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::ffi::c_int;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// Bytes of `struct virtio_net_hdr`, which precedes every frame.
const HEADER: usize = 10;
/// Bytes of the largest segment that is not divided yet, with its headers.
const LARGEST: usize = HEADER + 18 + (64 << 10);
// Constants of the kernel, from linux/if_tun.h.
const TUN_F_CSUM: usize = 1;
const TUN_F_TSO4: usize = 2;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const TUNSETIFF: u8 = 202;
const TUNSETOFFLOAD: u8 = 208;

/// `struct ifreq`, as `TUNSETIFF` reads it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// The switch, with a cable for every host.
pub(crate) struct Wire {
    cables: Arc<RwLock<Vec<Arc<Cable>>>>,
}

/// The card of a host, and the state of its link.
struct Cable {
    card: File,
    plugged: AtomicBool,
    delay_ns: AtomicU64,
    /// The share of frames that are lost, as the bits of an `f64`.
    lost: AtomicU64,
}

/// The hardware address of the card of `host`: locally administered, with the host in the last two bytes.
pub(crate) fn card(host: usize) -> [u8; 6] {
    [0x02, 0x77, 0, 0, (host >> 8) as u8, host as u8]
}

impl Wire {
    pub(crate) fn new() -> Result<Self, Unavailable> {
        if !Path::new("/dev/net/tun").exists() {
            return Err(Unavailable(
                "this kernel has neither netem (CONFIG_NET_SCH_NETEM) nor /dev/net/tun, so links cannot have a delay \
                 or loss"
                    .into(),
            ));
        }
        Ok(Self { cables: Arc::default() })
    }

    /// Makes `eth0` in the namespace `name`, the card of the next host.
    pub(crate) fn add(&mut self, name: &str) -> Result<(), Unavailable> {
        // A thread cannot leave the namespace that it has entered, so a new thread does this.
        let made = std::thread::scope(|scope| scope.spawn(|| tap(name)).join());
        let card = made
            .unwrap_or(Err(rustix::io::Errno::IO))
            .map_err(|error| Unavailable(format!("cannot make a TAP device in {name}: {error}")))?;
        let plugged = AtomicBool::new(true);
        let cable = Arc::new(Cable { card, plugged, delay_ns: AtomicU64::new(0), lost: AtomicU64::new(0) });
        let host = {
            let mut cables = self.cables.write().unwrap_or_else(PoisonError::into_inner);
            cables.push(cable.clone());
            cables.len() - 1
        };
        let (sender, receiver) = channel();
        let cables = self.cables.clone();
        let own = cable.clone();
        let failed = |error| Unavailable(format!("cannot start a thread: {error}"));
        let thread = |name: &str| std::thread::Builder::new().name(format!("{name}{host}"));
        thread("wire-out").spawn(move || receive(&own, host as u64, &sender)).map_err(failed)?;
        thread("wire-in").spawn(move || deliver(&cable, host, &cables, &receiver)).map_err(failed)?;
        Ok(())
    }

    fn cable(&self, host: usize) -> Arc<Cable> {
        self.cables.read().unwrap_or_else(PoisonError::into_inner)[host].clone()
    }

    pub(crate) fn plug(&self, host: usize, plugged: bool) {
        self.cable(host).plugged.store(plugged, Ordering::Relaxed);
    }

    pub(crate) fn shape(&self, host: usize, link: &Link) -> Result<(), Unavailable> {
        let cable = self.cable(host);
        offload(&cable.card, link.loss_percent == 0.0)
            .map_err(|error| Unavailable(format!("cannot set up a TAP device: {error}")))?;
        cable.lost.store((link.loss_percent / 100.0).to_bits(), Ordering::Relaxed);
        cable.delay_ns.store(link.delay.as_nanos() as u64, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        // The cards have been removed, so the threads end. Without the files, nothing keeps the namespaces alive.
        self.cables.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Makes the device `eth0` in the namespace `name`. The thread stays in that namespace.
fn tap(name: &str) -> rustix::io::Result<File> {
    let namespace: OwnedFd =
        open(Path::new(FOLDER).join(name), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
    let device = open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let mut request = Request { name: [0; 16], flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, rest: [0; 22] };
    request.name[..4].copy_from_slice(b"eth0");
    // SAFETY: TUNSETIFF reads a `struct ifreq` (40 bytes that start with the name and the flags) and keeps no pointer.
    unsafe { ioctl(&device, Setter::<{ opcode::write::<c_int>(b'T', TUNSETIFF) }, Request>::new(request)) }?;
    Ok(File::from(device))
}

/// Sets whether the kernel may pass segments that it has not divided yet.
fn offload(card: &File, whole: bool) -> rustix::io::Result<()> {
    let flags = if whole { TUN_F_CSUM | TUN_F_TSO4 } else { 0 };
    // SAFETY: TUNSETOFFLOAD takes the flags as its argument, not a pointer to them.
    unsafe { ioctl(card, IntegerSetter::<{ opcode::write::<c_int>(b'T', TUNSETOFFLOAD) }>::new_usize(flags)) }
}

/// Reads frames from a host's card until the card is removed.
fn receive(cable: &Cable, seed: u64, due: &Sender<(Instant, Vec<u8>)>) {
    let mut buffer = vec![0; LARGEST];
    let mut random = seed;
    loop {
        let count = match (&cable.card).read(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        // A random number by SplitMix64 (Steele, Lea & Flood 2014).
        random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (random ^ (random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let chance = ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1u64 << 53) as f64;
        let lost = chance < f64::from_bits(cable.lost.load(Ordering::Relaxed));
        if lost || !cable.plugged.load(Ordering::Relaxed) {
            continue;
        }
        let delay = Duration::from_nanos(cable.delay_ns.load(Ordering::Relaxed));
        if due.send((Instant::now() + delay, buffer[..count].to_vec())).is_err() {
            return;
        }
    }
}

/// Delivers the frames that a host has sent, when they are due.
fn deliver(
    cable: &Cable,
    host: usize,
    cables: &RwLock<Vec<Arc<Cable>>>,
    frames: &Receiver<(Instant, Vec<u8>)>,
) {
    // Otherwise sleeps are up to 50 us too long, which matters for short delays. If this fails, they are.
    let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
    for (due, frame) in frames {
        if let Some(early) = due.checked_duration_since(Instant::now()) {
            std::thread::sleep(early);
        }
        let Some(target) = frame.get(HEADER..HEADER + 6) else { continue };
        if !cable.plugged.load(Ordering::Relaxed) {
            continue;
        }
        for (other, cable) in cables.read().unwrap_or_else(PoisonError::into_inner).iter().enumerate() {
            let is_receiver = target[0] & 1 == 1 || target == card(other);
            if other != host && is_receiver && cable.plugged.load(Ordering::Relaxed) {
                // This fails if the card is down or removed; then the frame is lost.
                let _ = (&cable.card).write(&frame);
            }
        }
    }
}
