//! The job's store and clients that give up half-way, are turned away, or come with another secret.

use super::store::{MAGIC, PRESENT, Reach, StoreClient};
use super::{Secret, Security, StoreServer, wire};
use crate::error::Result;
use crate::member::health::Health;
use crate::member::notes::Directory;
use crate::member::timer::Timer;
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
    let reach = Reach { addresses: &addresses, job: b"", rank, timer: &timer, certain: true, deadline: LONG };
    StoreClient::connect(&reach, Arc::<Health>::default())
}

/// Greets as a rank that is to be watched, and is told that it may.
fn greeted(server: &StoreServer, rank: u32) -> TcpStream {
    let mut stream = TcpStream::connect(server.addr()).unwrap();
    let hello = wire::pack(&[MAGIC, b"", b"watch", &rank.to_le_bytes(), b"somebody"]);
    wire::write(&mut stream, &hello).unwrap();
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
    let begun = Instant::now();
    while client.list(PRESENT).unwrap().is_empty() {
        assert!(begun.elapsed() < LONG, "the rank is not shown as present");
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
