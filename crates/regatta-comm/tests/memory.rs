//! Memory that is short, and tensors that are long.
#![cfg(target_os = "linux")]

mod common;

use common::run;
use regatta_comm::rendezvous::{Security, StoreServer};
use regatta_comm::{Algorithm, Group, Options, ReduceOp, TransportKind};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::process::{Command, Output};
use std::time::Duration;

/// Real memory under a long tensor.
const REAL: usize = 2 << 20;

/// A tensor of `len` bytes over a small file, which is mapped again and again.
struct Long {
    start: *mut std::ffi::c_void,
    mapped: usize,
    len: usize,
}

// SAFETY: a thread owns it alone.
unsafe impl Send for Long {}

impl Long {
    fn new(len: usize) -> Self {
        let mapped = len.next_multiple_of(REAL);
        let file = memfd_create("regatta-long", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, REAL as u64).unwrap();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, and then others in its place that nobody else knows of.
        let start = unsafe {
            let nowhere = std::ptr::null_mut();
            let start =
                mmap_anonymous(nowhere, mapped, access, MapFlags::PRIVATE | MapFlags::NORESERVE).unwrap();
            for at in (0..mapped).step_by(REAL) {
                mmap(start.byte_add(at), REAL, access, MapFlags::SHARED | MapFlags::FIXED, &file, 0).unwrap();
            }
            start
        };
        Self { start, mapped, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: mapped with this length; that bytes appear at several places concerns who looks at them only.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast(), self.len) }
    }
}

impl Drop for Long {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length.
        unsafe { munmap(self.start, self.mapped) }.unwrap();
    }
}

#[test]
fn tensors_beyond_4_gib() {
    // Counters of 32 bits wrap on the way.
    let len = (4usize << 30) + 4097;
    for way in
        [(TransportKind::Thread, Some(Algorithm::Ring)), (TransportKind::Thread, Some(Algorithm::Direct))]
    {
        run(way, 2, Duration::from_secs(60), |group| {
            let mut tensor = Long::new(len);
            let bytes = tensor.bytes();
            if group.rank() == 0 {
                bytes[..REAL].iter_mut().enumerate().for_each(|(i, x)| *x = (i * 7) as u8);
            }
            group.broadcast(bytes, 0).unwrap();
            assert!((0..REAL).chain(len - REAL..len).all(|i| bytes[i] == (i % REAL * 7) as u8));
            let traffic = group.traffic();
            assert!(traffic.bytes > u64::from(u32::MAX), "{traffic:?}");
        });
    }
}

/// Not a test by itself: two ranks over shared memory, started with a small `/dev/shm`.
#[test]
fn child_ranks() {
    if std::env::var("REGATTA_TEST_CHILD").is_err() {
        return;
    }
    let server = StoreServer::start("127.0.0.1:0", 2, &Security::default()).unwrap();
    let address = server.addr().to_string();
    let options = Options::default().transport(TransportKind::Shm);
    std::thread::scope(|scope| {
        for rank in 0..2 {
            let (address, options) = (&address, &options);
            scope.spawn(move || {
                let world = regatta_comm::rendezvous::World::local(rank, 2, address);
                let group = match Group::connect(&world, options) {
                    Ok(group) => group,
                    Err(error) => return println!("error: {error}"),
                };
                let mut buffer = group.buffer::<f32>(1 << 20).unwrap();
                buffer.fill(1.0);
                group.all_reduce(&mut buffer, ReduceOp::Sum).unwrap();
                assert!(buffer.iter().all(|&x| x == 2.0));
                println!("sum is right over {}", group.transport());
            });
        }
    });
}

/// Runs `child_ranks` where `/dev/shm` is so large.
fn with_small_shm(kib: usize, folder: Option<&str>) -> Option<Output> {
    let program = std::env::current_exe().unwrap();
    let script = format!(
        "mount -t tmpfs -o size={kib}k tmpfs /dev/shm && exec \"$0\" child_ranks --exact --nocapture"
    );
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", &script]).arg(program).env("REGATTA_TEST_CHILD", "1");
    if let Some(folder) = folder {
        command.env("REGATTA_SHM_DIR", folder);
    }
    let output = command.output().ok()?;
    let text = String::from_utf8_lossy(&output.stderr);
    if text.contains("unshare:") || text.contains("mount:") {
        return None;
    }
    Some(output)
}

#[test]
fn a_small_dev_shm_is_an_error_or_a_file() {
    let Some(output) = with_small_shm(64, None) else {
        return eprintln!("skipped: needs root and `unshare`");
    };
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(out.matches("sum is right over shm").count(), 2, "{out} {err}");
    assert!(err.contains("/dev/shm") && err.contains("through a file in"), "{err}");
    // Where that folder is asked for, there is no other.
    let output = with_small_shm(64, Some("/dev/shm")).unwrap();
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(out.contains("error: ") && out.contains("/dev/shm") && out.contains("make it larger"), "{out}");
    // Room for the core, but not for a buffer: that one is on the heap then.
    let output = with_small_shm(13 << 10, None).unwrap();
    let out = String::from_utf8_lossy(&output.stdout);
    assert_eq!(out.matches("sum is right over shm").count(), 2, "{out}");
}

#[test]
fn lanes_share_the_work() {
    for transport in [TransportKind::Thread, TransportKind::Shm] {
        let wanted = Some(transport);
        let options = Options::default().transport(wanted).lanes(3).join(Duration::from_secs(20));
        common::run_with(options, transport, 3, |group| {
            for len in [1, 100_000, 3_000_001] {
                let number = |rank: usize, i: usize| (i % 100 + rank) as f32;
                let check = |data: &[f32]| {
                    assert!(
                        data.iter().enumerate().all(|(i, &x)| x == (0..3).map(|r| number(r, i)).sum::<f32>())
                    );
                };
                let mut data: Vec<f32> = (0..len).map(|i| number(group.rank(), i)).collect();
                let mut buffer = group.buffer::<f32>(len).unwrap();
                buffer.copy_from_slice(&data);
                group.all_reduce(&mut data, ReduceOp::Sum).unwrap();
                check(&data);
                group.all_reduce(&mut buffer, ReduceOp::Sum).unwrap();
                check(&buffer);
            }
        });
    }
}
