//! The job's store and clients that give up half-way, are turned away, or come with another secret.

use super::entries::ENTRY;
use super::protocol::{Answer, Hello, Request, Role};
use super::server::{MOST, REASON};
use super::{Bare, PRESENT, Reach, StoreClient, StoreServer};
use crate::error::{Error, Result};
use crate::member::call::{Call, Kind};
use crate::member::directory::{Invitation, Round};
use crate::member::timer::Timer;
use crate::numbers::element::DType;
use crate::rendezvous::{Secret, Security, wire};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Long enough on any machine; nothing waits for it to pass.
const LONG: Duration = Duration::from_secs(60);

fn connect(
    server: &StoreServer,
    rank: usize,
    security: &Security,
    limit: Duration,
) -> Result<Arc<StoreClient>> {
    let addresses = || Ok(vec![(server.addr().to_string(), security.clone())]);
    let timer = Timer::with_pauses(limit, LONG);
    let reach = Reach {
        addresses: &addresses,
        job: b"",
        rank,
        generation: 0,
        timer: &timer,
        certain: true,
        deadline: LONG,
    };
    StoreClient::connect(&reach)
}

/// Greets as a rank that is to be watched, and is told that it may.
fn greeted(server: &StoreServer, rank: usize) -> TcpStream {
    let mut stream = TcpStream::connect(server.addr()).unwrap();
    let hello = Hello { job: b"", role: Role::Watch, rank, generation: 0, who: "somebody" };
    wire::write(&mut stream, &hello.encode()).unwrap();
    assert_eq!(wire::read(&mut stream).unwrap(), b"ok");
    stream
}

#[test]
fn who_gives_up_before_it_confirms_ends_nothing_and_may_come_again() {
    let open = Security::default();
    let server = StoreServer::start("127.0.0.1:0", 2, &open).unwrap();
    let half_way = greeted(&server, 1);
    // As long as somebody holds the place, nobody else gets it; then it is free again.
    let refused = connect(&server, 1, &open, Duration::from_millis(200)).err().unwrap().to_string();
    assert!(refused.contains("another process is rank 1") && refused.contains("somebody"), "{refused}");
    drop(half_way);
    let client = connect(&server, 1, &open, LONG).unwrap();
    assert_eq!(server.first_failure(), None);
    are_present(&client, 1);
}

/// Waits until so many ranks are shown as present.
fn are_present(client: &StoreClient, ranks: usize) {
    let begun = Instant::now();
    while client.list(PRESENT).unwrap().len() < ranks {
        assert!(begun.elapsed() < LONG, "not all ranks are shown as present");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn who_says_goodbye_may_be_gone_when_news_is_told() {
    let open = Security { secret: Some(Secret::random().unwrap()), ..Security::default() };
    for _ in 0..20 {
        let server = StoreServer::start("127.0.0.1:0", 24, &open).unwrap();
        let mut clients: Vec<_> = (0..24).map(|rank| connect(&server, rank, &open, LONG).unwrap()).collect();
        let stays = clients.pop().unwrap();
        std::thread::scope(|scope| {
            for client in clients {
                scope.spawn(move || drop(client));
            }
        });
        let begun = Instant::now();
        while stays.list(PRESENT).unwrap().len() > 1 && server.first_failure().is_none() {
            assert!(begun.elapsed() < LONG, "not all have been heard");
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(server.first_failure(), None);
    }
}

#[test]
fn another_secret_is_given_up_before_the_time_is_over() {
    let security = || Security { secret: Some(Secret::random().unwrap()), ..Security::default() };
    let server = StoreServer::start("127.0.0.1:0", 1, &security()).unwrap();
    let begun = Instant::now();
    let error = connect(&server, 0, &security(), 10 * LONG).err().unwrap().to_string();
    assert!(error.contains("REGATTA_SECRET must be the same on all ranks"), "{error}");
    assert!(begun.elapsed() < LONG, "{:?}", begun.elapsed());
}

fn ask(store: &Bare, request: Request<'_>) -> Answer {
    Answer::decode(&store.answer(&request.encode()).unwrap()).unwrap()
}

fn set(store: &Bare, key: &str, value: &[u8]) -> bool {
    ask(store, Request::Set { key, value }) == Answer::Done
}

#[test]
fn each_rank_of_this_job_watches_once() {
    let store = Bare::new(2, b"job", MOST);
    let greet =
        |job: &[u8], role, rank| store.greet(&Hello { job, role, rank, generation: 0, who: "who" }.encode());
    let (watch, requests) = (Role::Watch, Role::Requests);
    assert!(greet(b"job", requests, 1) && greet(b"job", watch, 1) && greet(b"job", requests, 1));
    assert!(!greet(b"job", watch, 1) && !greet(b"job", watch, 2) && !greet(b"other", watch, 0));
}

#[test]
fn what_is_kept_has_a_bound() {
    let store = Bare::new(2, b"", 1000);
    assert!(set(&store, "a", &[0; 100]));
    let stored = (0..100).filter(|n| set(&store, &format!("{n}"), &[0; 100])).count();
    assert_eq!(stored, 5);
    // An entry may still become shorter, and notes are refused alike.
    assert!(!set(&store, "a", &[0; 200]) && set(&store, "a", &[0; 50]));
    assert_eq!(store.traffic().entry_bytes, 6 * (ENTRY + 101) - 50);
    let join = Request::Join { round: Round { token: 1, size: 2, rank: 0 }, sequence: 1 };
    assert!(matches!(ask(&store, join), Answer::Refused(_)));
}

#[test]
fn what_no_frame_holds_is_refused() {
    let store = Bare::new(2, b"", MOST);
    for n in 0..3 {
        assert!(set(&store, &format!("list/{n}"), &[0; 500_000]));
    }
    assert!(matches!(ask(&store, Request::List { prefix: "list/" }), Answer::Refused(_)));
    assert!(matches!(ask(&store, Request::List { prefix: "list/1" }), Answer::Entries(_)));
}

#[test]
fn requests_are_answered_while_a_watcher_takes_no_news() {
    let security = Security::default();
    let server = StoreServer::start("127.0.0.1:0", 1, &security).unwrap();
    let client = connect(&server, 0, &security, LONG).unwrap();
    let telling = server.hold_watchers();
    let (sender, answered) = std::sync::mpsc::channel();
    let asked = client.clone();
    std::thread::spawn(move || sender.send(asked.set("a", b"b")));
    assert_eq!(answered.recv_timeout(LONG), Ok(Ok(())));
    drop(telling);
}

#[test]
fn the_longest_reason_reaches_everyone() {
    let security = Security::default();
    let server = StoreServer::start("127.0.0.1:0", 1, &security).unwrap();
    let client = connect(&server, 0, &security, LONG).unwrap();
    let until = Instant::now() + LONG;
    // The server's end of the watch connection may come to watch only now, and is told then.
    server.abort(None, &"\u{e9}".repeat(wire::LONGEST));
    let own = || Error::Rendezvous("no news".into());
    let heard = loop {
        match client.health().verdict(own()) {
            Error::Aborted { reason, .. } => break reason,
            _ => assert!(Instant::now() < until, "nobody has heard of it"),
        }
    };
    assert!(heard.len() <= REASON && heard.chars().all(|c| c == '\u{e9}'));
}

#[test]
fn all_gather_what_all_publish_in_one_round_trip_and_it_is_dropped() {
    const RANKS: usize = 5;
    let security = Security::default();
    let server = StoreServer::start("127.0.0.1:0", RANKS, &security).unwrap();
    let clients: Vec<_> = (0..RANKS).map(|rank| connect(&server, rank, &security, LONG).unwrap()).collect();
    let names: Vec<usize> = (0..RANKS).collect();
    are_present(&clients[0], RANKS);
    let before = server.traffic();
    std::thread::scope(|scope| {
        for (rank, client) in clients.iter().enumerate() {
            let names = &names;
            scope.spawn(move || {
                // What no single frame holds for all comes in several.
                for (group, len) in [(0, 10), (1, 300_000), (2, 0)] {
                    client.set(&format!("group/{group}/{rank}"), &vec![rank as u8; len]).unwrap();
                    let all = client.gather(&format!("group/{group}/"), names, &Timer::new(LONG)).unwrap();
                    assert_eq!(all, names.iter().map(|&rank| vec![rank as u8; len]).collect::<Vec<_>>());
                }
            });
        }
    });
    let after = server.traffic();
    assert_eq!((after.entries, after.entry_bytes), (before.entries, before.entry_bytes));
    // Five values of 300,000 bytes take two frames.
    assert_eq!(after.requests - before.requests, (RANKS * (2 + 3 + 2)) as u64);
    let each = 10 * RANKS * RANKS + 300_000 * RANKS * RANKS;
    assert!(after.bytes_out - before.bytes_out > each as u64);
    assert!(after.bytes_in - before.bytes_in > (300_010 * RANKS) as u64);
    // Who is late is named, and who has left.
    let error =
        clients[0].gather("late/", &names, &Timer::new(Duration::from_millis(50))).unwrap_err().to_string();
    assert!(error.contains("rank 0 did not come within"), "{error}");
    clients[0].set("late/0", b"").unwrap();
    let error =
        clients[0].gather("late/", &names, &Timer::new(Duration::from_millis(50))).unwrap_err().to_string();
    assert!(error.contains("rank 1 did not come within"), "{error}");
    let mut clients = clients;
    drop(clients.remove(1));
    let left = clients[0].gather("late/", &names, &Timer::new(LONG)).unwrap_err().to_string();
    assert!(left.contains("rank 1 has left the job"), "{left}");
}

#[test]
fn a_hundred_thousand_announced_operations_leave_nothing() {
    let store = Bare::new(2, b"", MOST);
    let (first, second) = (Round { token: 5, size: 2, rank: 0 }, Round { token: 5, size: 2, rank: 1 });
    assert_eq!(ask(&store, Request::Join { round: second, sequence: 0 }), Answer::Number(1));
    let begun = store.traffic();
    for sequence in 1..=100_000 {
        let call = Call { sequence, ..Call::new(Kind::Barrier, DType::U8, 0) };
        let invite = Request::Invite { round: first, sequence, invitation: Invitation::Call(call) };
        assert_eq!(ask(&store, invite), Answer::Done);
        let invited = Request::Invited { round: second, sequence, wait: LONG };
        assert_eq!(ask(&store, invited), Answer::Value(call.to_bytes().to_vec()));
    }
    let after = store.traffic();
    assert!(after.entry_bytes < begun.entry_bytes + 1000, "{after:?}");
    assert_eq!(ask(&store, Request::Join { round: first, sequence: 100_000 }), Answer::Number(2));
    let end = Request::Invite { round: first, sequence: 100_001, invitation: Invitation::End { rank: 0 } };
    assert_eq!(ask(&store, end), Answer::Done);
    assert!(matches!(
        ask(&store, Request::Invited { round: second, sequence: 100_001, wait: LONG }),
        Answer::Value(_)
    ));
    assert_eq!(store.traffic().entry_bytes, 0);
}
