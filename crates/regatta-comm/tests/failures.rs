//! Ranks that disagree, stall, leave, panic or are killed: every survivor gets an error that names the rank that is to blame.

mod common;

use common::{WAYS, run};
use regatta_comm::rendezvous::{Security, StoreServer, World};
use regatta_comm::{Buffer, Error, Group, OnLate, Options, ReduceOp};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// A deadline that no test waits for.
const LONG: Duration = Duration::from_secs(600);
/// Less than that by far, and more than a busy machine takes.
const SOON: Duration = Duration::from_secs(120);

#[test]
fn different_calls_name_both_sides() {
    for way in WAYS {
        let errors = run(way, 2, Duration::from_secs(20), |group| match group.rank() {
            0 => group.all_reduce(&mut [1.0f32; 1024], ReduceOp::Sum).unwrap_err().to_string(),
            _ => group.all_gather(&[1.0f64; 512], &mut [0.0; 1024]).unwrap_err().to_string(),
        });
        for error in &errors {
            assert!(
                error.contains("all_reduce #2 f32[1024] sum") && error.contains("all_gather #2 f64[512]"),
                "{way:?}: {error}"
            );
        }
        let errors = run(way, 3, Duration::from_secs(20), |group| {
            let len = if group.rank() == 2 { 300_000 } else { 200_000 };
            let first = group.all_reduce(&mut vec![1.0f32; len], ReduceOp::Sum).unwrap_err();
            // The group is unusable from here on.
            assert_eq!(group.barrier().unwrap_err().to_string(), first.to_string());
            first.to_string()
        });
        assert!(
            errors.iter().all(|error| error.contains("f32[300000]") && error.contains("f32[200000]")),
            "{errors:?}"
        );
    }
}

#[test]
fn two_roots_are_noticed() {
    for way in WAYS {
        let errors = run(way, 2, Duration::from_secs(20), |group| {
            let root = group.rank();
            // Over streams a root only sends, so it may be the next operation over them that fails.
            let outcome = group
                .broadcast(&mut [0.0f32; 8], root)
                .and_then(|()| group.all_reduce(&mut [0.0f32], ReduceOp::Sum));
            outcome.unwrap_err().to_string()
        });
        assert!(errors.iter().all(|error| error.contains("broadcast #2 f32[8] from")), "{way:?}: {errors:?}");
    }
}

#[test]
fn calls_that_no_message_shows_are_compared() {
    // Rank 1 waits for a message, rank 0 for all: nothing is sent between them over shared memory.
    for way in WAYS {
        let begun = Instant::now();
        let errors = run(way, 3, LONG, |group| match group.rank() {
            1 => group.recv(&mut [0.0f32; 8], 0).unwrap_err().to_string(),
            _ => group.all_reduce(&mut [0.0f32; 1024], ReduceOp::Sum).unwrap_err().to_string(),
        });
        assert!(begun.elapsed() < SOON, "{way:?}: {:?}", begun.elapsed());
        for error in errors {
            assert!(
                error.contains("all_reduce #2 f32[1024] sum") && error.contains("send/recv #1 f32[8]"),
                "{way:?}: {error}"
            );
        }
    }
    // Two that are in a barrier while two exchange messages of different lengths.
    for way in WAYS {
        let errors = run(way, 4, LONG, |group| match group.rank() {
            2 => group.send(&[1u8; 3], 3).and_then(|()| group.barrier()).unwrap_err().to_string(),
            3 => group.recv(&mut [1u8; 4], 2).and_then(|()| group.barrier()).unwrap_err().to_string(),
            _ => group.barrier().unwrap_err().to_string(),
        });
        assert!(errors.iter().all(|error| error.contains("u8[3]") && error.contains("u8[4]")), "{errors:?}");
    }
}

static LATE: std::sync::Mutex<Vec<regatta_comm::Late>> = std::sync::Mutex::new(vec![]);

/// Reports of the operation for which rank 2 is late; a stalled machine makes others late, too.
fn late_for_rank_2() -> Vec<regatta_comm::Late> {
    let late = LATE.lock().unwrap();
    late.iter()
        .filter(|late| late.waits_for == 2 && late.call.starts_with("all_reduce #2 "))
        .cloned()
        .collect()
}

#[test]
fn a_late_rank_is_reported_before_it_is_fatal() {
    for way in WAYS {
        LATE.lock().unwrap().clear();
        let (release, wait) = channel::<()>();
        let (release, wait) = (std::sync::Mutex::new(Some(release)), std::sync::Mutex::new(wait));
        let options = Options::default()
            .transport((way.0 != regatta_comm::TransportKind::Mixed).then_some(way.0))
            .algorithm(way.1)
            .warn(Duration::from_millis(700))
            .on_late(OnLate::new(|late| LATE.lock().unwrap().push(late.clone())))
            .join(Duration::from_secs(20));
        common::run_with(options, way.0, 3, |group| {
            match group.rank() {
                // Late until somebody says so.
                2 => {
                    let begun = Instant::now();
                    while late_for_rank_2().len() < 2 {
                        assert!(begun.elapsed() < SOON, "nobody says that rank 2 is late");
                        let _ = wait.lock().unwrap().recv_timeout(Duration::from_millis(10));
                    }
                }
                1 => drop(release.lock().unwrap().take()),
                _ => {}
            }
            let mut sum = vec![1.0f32; 1000];
            group.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
            assert_eq!(sum[0], 3.0);
        });
        let late = late_for_rank_2();
        assert!(late.iter().all(|late| late.rank < 2), "{way:?}: {late:?}");
        assert!(
            late[0].to_string().contains("for rank 2 (since ")
                && late[0].call == "all_reduce #2 f32[1000] sum"
        );
    }
}

static LATE_ROOT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

#[test]
fn parts_of_an_operation_are_no_mismatch() {
    use regatta_comm::{Algorithm, TransportKind};
    // Ranks of two hosts wait in different parts of the same operation for a rank that is late.
    let options = Options::default()
        .algorithm(Algorithm::Hierarchical)
        .warn(Duration::from_millis(1500))
        .on_late(OnLate::new(|_| {
            LATE_ROOT.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }))
        .join(Duration::from_secs(20));
    for mean in [false, true] {
        LATE_ROOT.store(0, std::sync::atomic::Ordering::SeqCst);
        common::run_with(options.clone(), TransportKind::Mixed, 4, |group| {
            let begun = Instant::now();
            while group.rank() == 1 && LATE_ROOT.load(std::sync::atomic::Ordering::SeqCst) == 0 {
                assert!(begun.elapsed() < SOON, "nobody says that rank 1 is late");
                std::thread::yield_now();
            }
            let mut data = [group.rank() as f32; 1000];
            if mean {
                group.all_reduce(&mut data, ReduceOp::Mean).unwrap();
            } else {
                group.broadcast(&mut data, 1).unwrap();
            }
            assert!(data.iter().all(|&x| x == if mean { 1.5 } else { 1.0 }));
        });
    }
}

#[test]
fn across_hosts_an_error_has_the_calls_as_they_were_made() {
    use regatta_comm::{Algorithm, TransportKind};
    let options = Options::default().algorithm(Algorithm::Hierarchical).join(Duration::from_secs(20));
    // Two hosts of two ranks: within its host, and among the hosts, rank 3 has other numbers.
    for other in 0..4 {
        let errors = common::run_with(options.clone(), TransportKind::Mixed, 4, |group| {
            let outcome = match group.rank() == other {
                true => group.broadcast(&mut [0.0f32; 8], 3),
                false => group.all_gather(&[0.0f32; 8], &mut [0.0; 32]),
            };
            // Where nothing is sent to a rank, it may be the next operation that fails.
            outcome.and_then(|()| group.barrier()).unwrap_err().to_string()
        });
        for error in &errors {
            assert!(
                error.contains("broadcast #2 f32[8] from 3") && error.contains("all_gather #2 f32[8]"),
                "{errors:?}"
            );
        }
    }
}

#[test]
fn the_last_operations_are_written_down() {
    for way in WAYS {
        let folder = tempfile::tempdir().unwrap();
        let options = Options::default()
            .transport((way.0 != regatta_comm::TransportKind::Mixed).then_some(way.0))
            .algorithm(way.1)
            .trace(folder.path().to_path_buf())
            .join(Duration::from_secs(20));
        common::run_with(options, way.0, 2, |group| {
            for len in 0..300 {
                group.all_reduce(&mut vec![0.0f32; len], ReduceOp::Sum).unwrap();
            }
            let len = 7 + group.rank();
            group.all_reduce(&mut vec![0i32; len], ReduceOp::Max).unwrap_err();
        });
        let jobs: Vec<_> =
            std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(jobs.len(), 1, "{way:?}: one job");
        for rank in 0..2 {
            let text = std::fs::read_to_string(jobs[0].join(format!("rank-{rank}-group-0.jsonl"))).unwrap();
            let lines: Vec<&str> = text.lines().collect();
            assert_eq!(lines.len(), 257, "a line about the rank, and 256 operations");
            assert!(
                lines[0].contains(&format!("\"rank\":{rank},\"world\":2")) && lines[0].contains("i32[8] max")
            );
            assert!(
                lines[256].contains(&format!("\"call\":\"all_reduce #302 i32[{}] max\"", 7 + rank)),
                "{}",
                lines[256]
            );
            assert!(lines[256].ends_with("\"ended_us\":null}") && !lines[255].ends_with("null}"));
        }
    }
}

#[test]
fn a_late_rank_is_named_at_the_deadline() {
    for way in WAYS {
        let (release, wait) = channel::<()>();
        let wait = std::sync::Mutex::new(wait);
        let release = std::sync::Mutex::new(Some(release));
        let errors = run(way, 2, Duration::from_secs(3), |group| {
            if group.rank() == 1 {
                // Computes, as it were, until the other has given up.
                let _ = wait.lock().unwrap().recv();
                // What rank 0 left behind may still be answered; the news of its end comes at once.
                return loop {
                    if let Err(error) = group.all_reduce(&mut [0.0f32; 64], ReduceOp::Sum) {
                        break error.to_string();
                    }
                };
            }
            let begun = Instant::now();
            let error = group.all_reduce(&mut [0.0f32; 64], ReduceOp::Sum).unwrap_err();
            assert!(begun.elapsed() < SOON);
            drop(release.lock().unwrap().take());
            error.to_string()
        });
        assert!(errors[0].contains("still waiting for rank 1"), "{}", errors[0]);
        assert!(errors[1].contains("rank 0 gave up") && errors[1].contains("rank 1"), "{}", errors[1]);
    }
}

#[test]
fn a_rank_that_left_or_aborted_is_named() {
    for way in WAYS {
        let errors = run(way, 2, Duration::from_secs(20), |group| match group.rank() {
            0 => group.barrier().unwrap_err().to_string(),
            _ => {
                drop(group);
                String::new()
            }
        });
        assert!(errors[0].contains("rank 1"), "{way:?}: {}", errors[0]);
        let errors = run(way, 3, Duration::from_secs(20), |group| match group.rank() {
            2 => {
                group.abort("its data is gone");
                String::new()
            }
            _ => group.barrier().unwrap_err().to_string(),
        });
        assert!(
            errors[..2].iter().all(|error| error.contains("rank 2 gave up: its data is gone")),
            "{errors:?}"
        );
    }
}

#[test]
fn a_panicking_rank_ends_the_others() {
    for way in WAYS {
        let errors = run(way, 2, Duration::from_secs(20), |group| match group.rank() {
            0 => group.barrier().unwrap_err().to_string(),
            _ => {
                let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
                    let _group = group;
                    panic!("on purpose");
                }));
                assert!(caught.is_err());
                String::new()
            }
        });
        assert!(errors[0].contains("rank 1 gave up: it panicked"), "{}", errors[0]);
    }
}

#[test]
fn a_panic_with_operations_under_way_ends_the_others() {
    for way in WAYS {
        let begun = Instant::now();
        let errors = run(way, 2, LONG, |group| match group.rank() {
            // Both wait for the other's message.
            0 => group.recv(&mut [0u8], 1).unwrap_err().to_string(),
            _ => {
                let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
                    let _pending = group.recv_async(Buffer::from(vec![0u8]), 0);
                    panic!("on purpose");
                }));
                assert!(caught.is_err());
                String::new()
            }
        });
        assert!(errors[0].contains("rank 1 gave up: it panicked"), "{way:?}: {}", errors[0]);
        assert!(begun.elapsed() < SOON, "{way:?}: {:?}", begun.elapsed());
    }
}

#[test]
fn a_port_in_use_is_a_clear_error() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let Err(error) = StoreServer::start(&address, 1, &Security::default()) else {
        panic!("the port was taken")
    };
    let error = error.to_string();
    assert!(error.contains(&address) && error.contains("in use") && error.contains("MASTER_PORT"), "{error}");
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let server = StoreServer::start("127.0.0.1:0", 3, &Security::default()).unwrap();
    let world = World::local(0, 3, &server.addr().to_string());
    let options = Options::default().join(Duration::from_secs(3));
    let Err(error) = Group::connect(&world, &options) else { panic!("nobody else came") };
    assert!(error.to_string().contains("rank 1, 2 of 3 did not join"), "{error}");
}

#[test]
fn unknown_clients_neither_join_nor_disturb() {
    let server = StoreServer::start("127.0.0.1:0", 1, &Security::default()).unwrap();
    let mut held = vec![];
    for garbage in [b"GET / HTTP/1.1\r\n\r\n".as_slice(), &[255; 64], &[0; 8], b""] {
        let mut stream = std::net::TcpStream::connect(server.addr()).unwrap();
        stream.write_all(garbage).unwrap();
        held.push(stream);
    }
    let world = World::local(0, 1, &server.addr().to_string());
    let group = Group::connect(&world, &Options::default()).unwrap();
    group.barrier().unwrap();
    let foreign = World { job: "another".into(), ..world };
    let options = Options::default().join(Duration::from_millis(50));
    assert!(matches!(Group::connect(&foreign, &options), Err(Error::Rendezvous(_))));
}

/// Not a test by itself: a rank in a process of its own, which `killed_and_stopped_processes` starts.
#[test]
fn child_rank() {
    if std::env::var("REGATTA_TEST_CHILD").is_err() {
        return;
    }
    let group = Group::from_env(&Options::from_env().unwrap()).unwrap();
    let mut data = vec![1.0f32; 100_000];
    println!("ready");
    loop {
        if let Err(error) = group.all_reduce(&mut data, ReduceOp::Max) {
            println!("error: {error}");
            return;
        }
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn children(transport: &str, size: usize, deadline: &str) -> (StoreServer, Vec<Killed>) {
    let server = StoreServer::start("127.0.0.1:0", size, &Security::default()).unwrap();
    let start = |rank: usize| {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["child_rank", "--exact", "--nocapture"])
            .env("REGATTA_TEST_CHILD", "1")
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", size.to_string())
            .env("REGATTA_STORE", server.addr().to_string())
            .env("REGATTA_TRACE", "off")
            .env("REGATTA_TRANSPORT", transport)
            .env("REGATTA_DEADLINE_S", deadline)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Killed(child)
    };
    let children = (0..size).map(start).collect();
    (server, children)
}

/// Reads lines until one contains `wanted`.
fn line(reader: &mut impl BufRead, wanted: &str) -> String {
    let mut text = String::new();
    loop {
        let mut line = String::new();
        assert!(reader.read_line(&mut line).unwrap() > 0, "no {wanted:?} in {text}");
        if line.contains(wanted) {
            return line;
        }
        text.push_str(&line);
    }
}

#[cfg(target_os = "linux")]
fn segments_of(pids: &[u32]) -> Vec<String> {
    let names = std::fs::read_dir("/dev/shm")
        .unwrap()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned());
    names.filter(|name| pids.iter().any(|pid| name.starts_with(&format!("regatta-shm-{pid}-")))).collect()
}

#[test]
#[cfg(target_os = "linux")]
fn killed_and_stopped_processes() {
    for transport in ["shm", "tcp"] {
        for (signal, deadline, blamed) in
            [("-KILL", "600", "rank 1 (host "), ("-STOP", "10", "waiting for rank 1")]
        {
            let (_server, mut ranks) = children(transport, 3, deadline);
            let mut outputs: Vec<_> =
                ranks.iter_mut().map(|rank| BufReader::new(rank.0.stdout.take().unwrap())).collect();
            outputs.iter_mut().for_each(|output| drop(line(output, "ready")));
            let pids: Vec<u32> = ranks.iter().map(|rank| rank.0.id()).collect();
            assert!(Command::new("kill").args([signal, &pids[1].to_string()]).status().unwrap().success());
            let begun = Instant::now();
            let errors: Vec<_> = [0, 2].map(|rank| line(&mut outputs[rank], "error: ")).into();
            assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
            assert!(errors.iter().all(|error| error.contains("rank 1")), "{transport} {signal}: {errors:?}");
            assert!(errors.iter().any(|error| error.contains(blamed)), "{transport} {signal}: {errors:?}");
            for rank in [0, 2] {
                ranks[rank].0.wait().unwrap();
            }
            drop(ranks);
            assert_eq!(segments_of(&pids), Vec::<String>::new());
        }
    }
}
