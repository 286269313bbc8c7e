//! A panic in the middle of an operation ends the job for all ranks, with the panic's message.

mod common;

use common::{WAYS, Way, run_with};
use regatta_comm::{Buffer, Error, Group, OnLate, Options, ReduceOp, TransportKind};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// Long before the deadline, which would end the wait as well.
const DEADLINE: Duration = Duration::from_secs(600);
const SOON: Duration = Duration::from_secs(120);

fn options((transport, algorithm): Way, on_late: OnLate) -> Options {
    Options::default()
        .transport((transport != TransportKind::Mixed).then_some(transport))
        .algorithm(algorithm)
        .deadline(DEADLINE)
        .warn(Duration::from_millis(200))
        .on_late(on_late)
        .join(Duration::from_secs(60))
}

fn broken() -> OnLate {
    let reason = String::from("the pager is broken");
    OnLate::new(move |_| panic!("{reason}"))
}

/// Something that one rank has to do before others go on.
#[derive(Default)]
struct Gate(Mutex<bool>, Condvar);

impl Gate {
    fn open(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }

    fn wait(&self) {
        let (open, waited) = self.1.wait_timeout_while(self.0.lock().unwrap(), SOON, |open| !*open).unwrap();
        assert!(*open && !waited.timed_out(), "the other rank never got on");
    }
}

fn is_told(error: &Error) {
    let text = error.to_string();
    assert!(text.contains("the pager is broken") && text.contains("rank 0 gave up"), "{text}");
}

#[test]
fn a_panic_on_the_communication_thread_ends_the_job() {
    for way in WAYS {
        let (begun, gate) = (Instant::now(), Gate::default());
        run_with(options(way, broken()), way.0, 3, |group| {
            if group.rank() == 0 {
                let first = group.all_reduce_async(Buffer::from(vec![1.0f32; 100_000]), ReduceOp::Sum);
                let second = group.barrier_async();
                is_told(&first.wait().unwrap_err());
                is_told(&second.wait().unwrap_err());
                // Nothing that is called later waits for what has panicked.
                is_told(&group.barrier().unwrap_err());
                is_told(&group.barrier_async().wait().unwrap_err());
                gate.open();
            } else {
                // Late, so that rank 0 reports it.
                gate.wait();
                is_told(&group.all_reduce(&mut vec![1.0f32; 100_000], ReduceOp::Sum).unwrap_err());
            }
        });
        assert!(begun.elapsed() < SOON, "{way:?}: {:?}", begun.elapsed());
    }
}

#[test]
fn a_panic_on_the_callers_thread_ends_the_job_and_goes_on() {
    for way in WAYS {
        let gate = Gate::default();
        run_with(options(way, broken()), way.0, 2, |group| {
            if group.rank() == 0 {
                let call = || group.all_reduce(&mut vec![1.0f32; 100_000], ReduceOp::Sum);
                let panic = catch_unwind(AssertUnwindSafe(call)).unwrap_err();
                assert_eq!(panic.downcast_ref::<String>().unwrap(), "the pager is broken");
                is_told(&group.barrier().unwrap_err());
                gate.open();
            } else {
                gate.wait();
                is_told(&group.all_reduce(&mut vec![1.0f32; 100_000], ReduceOp::Sum).unwrap_err());
            }
        });
    }
}

#[test]
fn a_panic_in_a_lane_ends_the_job() {
    let gate = Gate::default();
    let way = (TransportKind::Shm, None);
    let options = options(way, broken()).lanes(3);
    run_with(options, TransportKind::Shm, 2, |group| {
        if group.rank() == 0 {
            let data = Buffer::from(vec![1.0f32; 1_000_000]);
            is_told(&group.all_reduce_async(data, ReduceOp::Sum).wait().unwrap_err());
            gate.open();
        } else {
            gate.wait();
            is_told(&group.all_reduce(&mut vec![1.0f32; 1_000_000], ReduceOp::Sum).unwrap_err());
        }
    });
}

#[test]
fn a_report_may_use_what_it_captures() {
    let (sender, reports) = std::sync::mpsc::channel();
    let sender = Mutex::new(sender);
    let on_late = OnLate::new(move |late| drop(sender.lock().unwrap().send(late.clone())));
    let reports = Mutex::new(reports);
    run_with(options((TransportKind::Thread, None), on_late), TransportKind::Thread, 2, |group| {
        if group.rank() == 1 {
            let late = reports.lock().unwrap().recv_timeout(SOON).unwrap();
            assert_eq!((late.rank, late.waits_for), (0, 1));
        }
        group.barrier().unwrap();
    });
}

/// Set in the process that may map no more memory.
const CHILD: &str = "REGATTA_TEST_NO_THREADS";

#[test]
#[cfg(target_os = "linux")]
fn where_no_thread_can_be_had_the_job_ends() {
    if std::env::var_os(CHILD).is_none() {
        let name = "where_no_thread_can_be_had_the_job_ends";
        let child = Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture", "--test-threads=1"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success() && said.contains("1 passed"), "{child:?}");
        return;
    }
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let groups = Group::threads(2);
    let before = getrlimit(Resource::As);
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = pages.split(' ').next().unwrap().parse().unwrap();
    // Room for what little is allocated, and not for the stack of a thread. (Larger pages leave less room.)
    let least = pages * 4096 + (512 << 10);
    setrlimit(Resource::As, Rlimit { current: Some(least), maximum: before.maximum }).unwrap();
    let pending = groups[0].barrier_async();
    setrlimit(Resource::As, before).unwrap();
    for error in
        [pending.wait().unwrap_err(), groups[0].barrier().unwrap_err(), groups[1].barrier().unwrap_err()]
    {
        let text = error.to_string();
        assert!(
            text.contains("cannot start the communication thread") && text.contains("ulimit -u"),
            "{text}"
        );
    }
}
