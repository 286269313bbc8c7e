use std::net::TcpListener;
use std::sync::mpsc;
use std::thread;

use rustls::pki_types::CertificateDer;

use super::*;

/// A generator of test data and sizes (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

/// What a handshake that is to time out is given.
const SHORT: Duration = Duration::from_millis(400);
/// Longer than a busy machine takes for anything else.
const SOON: Duration = Duration::from_secs(60);

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_nodelay(true).unwrap();
    let (server, _) = listener.accept().unwrap();
    server.set_nodelay(true).unwrap();
    (client, server)
}

/// The two ends of one handshake, each with its own identity.
fn shake(
    client: &Identity,
    server: &Identity,
    deadline: Instant,
) -> (io::Result<Stream>, io::Result<Stream>) {
    let (near, far) = sockets();
    thread::scope(|scope| {
        let server = scope.spawn(move || Stream::accept(far, server, deadline));
        let client = Stream::connect(near, client, deadline);
        (client, server.join().unwrap())
    })
}

fn pair() -> (Stream, Stream) {
    let identity = Identity::new(b"correct horse");
    let (client, server) = shake(&identity, &identity, soon());
    (client.unwrap(), server.unwrap())
}

fn failure(result: io::Result<Stream>) -> io::Error {
    result.err().expect("the handshake should fail")
}

fn plain_pair() -> (Stream, Stream) {
    let (near, far) = sockets();
    (Stream::plain(near), Stream::plain(far))
}

#[test]
fn blocking_both_directions() {
    for (near, far) in [pair(), plain_pair()] {
        for (from, to) in [(&near, &far), (&far, &near)] {
            let mut random = Random(7);
            let data = random.bytes(10 << 20);
            thread::scope(|scope| {
                scope.spawn(|| {
                    let (mut from, mut rest, mut random) = (from, &data[..], Random(8));
                    while !rest.is_empty() {
                        let (head, tail) = rest.split_at((1 + random.next() % 100_000).min(rest.len()));
                        from.write_all(head).unwrap();
                        rest = tail;
                    }
                });
                let (mut to, mut got, mut random) = (to, Vec::new(), Random(9));
                while got.len() < data.len() {
                    let mut piece = vec![0; 1 + random.next() % 100_000];
                    let count = to.read(&mut piece).unwrap();
                    assert!(count > 0);
                    got.extend_from_slice(&piece[..count]);
                }
                assert!(got == data);
            });
        }
    }
}

#[test]
fn slices_are_filled_one_after_the_other() {
    for (near, far) in [pair(), plain_pair()] {
        let mut random = Random(3);
        for _ in 0..300 {
            let length = 1 + random.next() % 40_000;
            let data = random.bytes(length);
            let split = random.next() % (data.len() + 1);
            let mut got = vec![0; data.len()];
            let into = random.next() % (data.len() + 1);
            let (mut sent, mut filled) = (0, 0);
            while filled < data.len() {
                let (a, b) = data.split_at(split);
                let (a, b) = (&a[sent.min(split)..], &b[sent.saturating_sub(split)..]);
                sent += near.try_write([a, b]).unwrap();
                near.flush().unwrap();
                if filled == 0 || !far.has_plaintext() {
                    wait(&far.socket, Wait::Readable, Some(soon())).unwrap();
                }
                let (a, b) = got.split_at_mut(into);
                let (a, b) = (&mut a[filled.min(into)..], &mut b[filled.saturating_sub(into)..]);
                filled += far.try_read([a, b]).unwrap();
            }
            assert!(got == data);
            assert!(!near.wants_write() && !far.has_plaintext());
        }
    }
}

#[test]
fn one_thread_drives_both_ends() {
    for (near, far) in [pair(), plain_pair()] {
        assert_eq!(far.try_read([&mut [0; 4], &mut [0; 4]]).unwrap(), 0);
        for turn in 0..1000_u32 {
            for (from, to) in [(&near, &far), (&far, &near)] {
                let mut got = [0; 4];
                assert_eq!(from.try_write([&turn.to_le_bytes(), &[]]).unwrap(), 4);
                assert!(from.flush().unwrap());
                wait(&to.socket, Wait::Readable, Some(soon())).unwrap();
                assert_eq!(to.try_read([&mut got, &mut []]).unwrap(), 4);
                assert_eq!(u32::from_le_bytes(got), turn);
            }
        }

        // Both send more than the sockets hold before either reads: nobody may wait for the other.
        let data = [Random(11).bytes(16 << 20), Random(12).bytes(16 << 20)];
        let ends = [&near, &far];
        let mut sent = [0; 2];
        let mut got = [vec![0; 16 << 20], vec![0; 16 << 20]];
        let mut filled = [0; 2];
        let deadline = soon();
        let mut was_full = false;
        while filled != [16 << 20; 2] || ends.iter().any(|end| end.wants_write()) {
            assert!(Instant::now() < deadline, "sent {sent:?}, got {filled:?}");
            for side in 0..2 {
                while sent[side] < data[side].len() {
                    match ends[side].try_write([&data[side][sent[side]..], &[]]).unwrap() {
                        0 => break,
                        count => sent[side] += count,
                    }
                }
                was_full |= ends[side].wants_write();
                ends[side].flush().unwrap();
            }
            for side in 0..2 {
                let rest = &mut got[side][filled[side]..];
                let most = rest.len().min(300_000);
                let (a, b) = rest[..most].split_at_mut(most / 3);
                filled[side] += ends[side].try_read([a, b]).unwrap();
            }
        }
        assert!(got[0] == data[1] && got[1] == data[0]);
        assert!(was_full || near.tls.is_none());
    }
}

#[test]
fn a_reader_waits_while_others_write() {
    let (near, far) = pair();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut got = vec![0; 4 << 20];
            (&near).read_exact(&mut got).unwrap();
            assert!(got.iter().all(|byte| *byte == 9));
        });
        // The reader of `near` has nothing to read until `far` has all of what `near` writes.
        scope.spawn(|| (&near).write_all(&vec![5; 4 << 20]).unwrap());
        let mut got = vec![0; 4 << 20];
        (&far).read_exact(&mut got).unwrap();
        assert!(got.iter().all(|byte| *byte == 5));
        (&far).write_all(&vec![9; 4 << 20]).unwrap();
    });
}

#[test]
fn shutdown_ends_readers_on_both_sides() {
    for (near, far) in [pair(), plain_pair()] {
        let (started, start) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                started.send(()).unwrap();
                assert_eq!((&near).read(&mut [0; 8]).unwrap(), 0);
            });
            start.recv().unwrap();
            near.shutdown();
            assert_eq!((&far).read(&mut [0; 8]).unwrap(), 0);
        });
        let error = far.try_read([&mut [0; 8], &mut []]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!((&near).write_all(&[1; 8]).is_err());
    }
}

#[test]
fn a_cut_stream_is_an_error() {
    let (near, far) = pair();
    near.socket.shutdown(Shutdown::Both).unwrap();
    assert_eq!((&far).read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn altered_bytes_are_an_error() {
    let (near, far) = pair();
    near.tls().unwrap().seal(Send::Data(b"all-reduce")).unwrap();
    near.tls().unwrap().outgoing.filled()[12] ^= 1;
    assert!(near.flush().unwrap());
    assert_eq!((&far).read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::InvalidData);
    assert_eq!((&near).read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::InvalidData);
}

#[test]
fn reads_time_out() {
    let (near, _far) = pair();
    near.set_read_timeout(Some(Duration::from_millis(30)));
    assert_eq!((&near).read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::TimedOut);
}

#[test]
fn keys_are_renewed_on_the_way() {
    let (near, far) = pair();
    for turn in 0..5 {
        for (mut from, mut to) in [(&near, &far), (&far, &near)] {
            from.tls().unwrap().renew_keys();
            from.write_all(&[turn; 50_000]).unwrap();
            let mut got = [0; 50_000];
            to.read_exact(&mut got).unwrap();
            assert!(got.iter().all(|byte| *byte == turn));
        }
    }
}

#[test]
fn another_secret_is_refused() {
    for (one, other) in [(&b"one"[..], &b"two"[..]), (b"", b"\0")] {
        let (client, server) = shake(&Identity::new(one), &Identity::new(other), soon());
        for error in [failure(client), failure(server)] {
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
            assert!(error.to_string().contains("REGATTA_SECRET"));
        }
    }
}

#[test]
fn the_client_learns_that_the_server_refused_it() {
    // A client that accepts the server's key but shows another one.
    let key = identity::job_key(b"job");
    let client = Identity::showing(&identity::job_key(b"other"), &key);
    let (client, server) = shake(&client, &Identity::new(b"job"), soon());
    assert_eq!(failure(client).kind(), io::ErrorKind::PermissionDenied);
    assert_eq!(failure(server).kind(), io::ErrorKind::PermissionDenied);
}

#[test]
fn showing_the_key_without_holding_it_is_refused() {
    let key = identity::job_key(b"job");
    let shown: CertificateDer<'static> = key.cert[0].clone();
    let signer = Arc::clone(&identity::job_key(b"other").key);
    let thief = Arc::new(rustls::sign::CertifiedKey::new(vec![shown], signer));
    let thief = Identity::showing(&thief, &key);
    let job = Identity::new(b"job");
    for (client, server) in [(&thief, &job), (&job, &thief)] {
        let (client, server) = shake(client, server, soon());
        assert!(client.is_err());
        assert!(server.is_err());
    }
}

#[test]
fn peers_that_do_not_speak_tls_fail_by_the_deadline() {
    let identity = Identity::new(b"job");
    for as_client in [true, false] {
        // What the peer sends, whether byte by byte, and the error that this gives.
        for (bytes, one_by_one, wait, kind) in [
            (&b"GET / HTTP/1.1\r\n\r\n garbage garbage"[..], false, SOON, io::ErrorKind::InvalidData),
            (b"", false, SHORT, io::ErrorKind::TimedOut),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", true, SHORT, io::ErrorKind::TimedOut),
        ] {
            let (near, far) = sockets();
            let (stop, stopped) = mpsc::channel::<()>();
            let start = Instant::now();
            let deadline = start + wait;
            let result = thread::scope(|scope| {
                scope.spawn(move || {
                    if !one_by_one {
                        (&far).write_all(bytes).unwrap();
                    }
                    for byte in bytes.iter().filter(|_| one_by_one).cycle() {
                        let _ = (&far).write_all(&[*byte]);
                        // Ends at last, should the handshake wait for as long as something comes.
                        if stopped.recv_timeout(Duration::from_millis(100)).is_ok() || start.elapsed() > SOON
                        {
                            return;
                        }
                    }
                    let _ = stopped.recv();
                });
                let shake = if as_client { Stream::connect } else { Stream::accept };
                let result = shake(near, &identity, deadline);
                stop.send(()).unwrap();
                result
            });
            let error = failure(result);
            assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains("REGATTA_SECRET"), "{error}");
        }
    }
}

#[test]
fn garbage_ends_a_handshake_without_a_panic() {
    let identity = Identity::new(b"correct horse");
    let mut random = Random(11);
    let mut garbage =
        vec![vec![10], vec![22, 3, 1, 0, 1, 0], vec![21, 3, 3, 0, 2, 2, 40], vec![23, 3, 3, 64, 2]];
    garbage.extend((0..50).map(|count| [vec![22, 3, 3, 0, count], random.bytes(count.into())].concat()));
    for bytes in garbage {
        for server in [false, true] {
            let (near, mut far) = sockets();
            far.write_all(&bytes).unwrap();
            far.shutdown(Shutdown::Write).unwrap();
            match server {
                true => failure(Stream::accept(near, &identity, soon())),
                false => failure(Stream::connect(near, &identity, soon())),
            };
        }
    }
}

#[test]
fn a_deadline_counts_for_all_bytes() {
    for (near, far) in [pair(), plain_pair()] {
        (&far).write_all(b"ab").unwrap();
        let mut said = [0; 2];
        near.read_exact_by(&mut said, soon()).unwrap();
        assert_eq!(&said, b"ab");
        (&far).write_all(b"c").unwrap();
        let late = near.read_exact_by(&mut said, Instant::now()).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        drop(far);
        let cut = near.read_exact_by(&mut said, soon()).unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
    }
}

#[test]
fn one_side_without_the_secret() {
    let identity = Identity::new(b"job");
    for tls_client in [true, false] {
        let (near, far) = sockets();
        let error = thread::scope(|scope| {
            scope.spawn(move || {
                // A rank without a secret says its piece, reads what comes back and gives up on it.
                let far = Stream::plain(far);
                far.set_read_timeout(Some(Duration::from_millis(100)));
                (&far).write_all(b"regatta hello, this is rank 1").unwrap();
                let _ = (&far).read(&mut [0; 16]);
            });
            let shake = if tls_client { Stream::connect } else { Stream::accept };
            failure(shake(near, &identity, soon()))
        });
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        assert!(error.to_string().contains("REGATTA_SECRET"), "{error}");
    }
}

#[test]
fn a_peer_that_closes_is_told_apart() {
    let (near, far) = sockets();
    drop(far);
    let error = failure(Stream::connect(near, &Identity::new(b"job"), soon()));
    assert!(
        matches!(
            error.kind(),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
        ),
        "{error}"
    );
}

/// 256 MiB over loopback, one thread at each end, as the engine does it. Run with
/// `cargo test --release throughput -- --ignored --nocapture --test-threads=1`.
#[test]
#[ignore = "a measurement"]
fn throughput() {
    const TOTAL: usize = 256 << 20;
    for (name, make) in [("plain", plain_pair as fn() -> _), ("TLS", pair)] {
        let mut rates = Vec::new();
        for _ in 0..7 {
            let (near, far) = make();
            let data = vec![7; 4 << 20];
            let mut into = vec![0; 4 << 20];
            let start = Instant::now();
            thread::scope(|scope| {
                scope.spawn(|| {
                    let mut sent = 0;
                    while sent < TOTAL || near.wants_write() {
                        let at = sent % data.len();
                        let count = near.try_write([&data[at..], &[]]).unwrap();
                        sent += count;
                        if sent >= TOTAL {
                            near.flush().unwrap();
                        }
                        if count == 0 {
                            wait(&near.socket, Wait::Writable, Some(soon())).unwrap();
                        }
                    }
                });
                let mut got = 0;
                while got < TOTAL {
                    let at = got % into.len();
                    match far.try_read([&mut into[at..], &mut []]).unwrap() {
                        0 => wait(&far.socket, Wait::Readable, Some(soon())).unwrap(),
                        count => got += count,
                    }
                }
            });
            rates.push(TOTAL as f64 / start.elapsed().as_secs_f64() / 1e9);
        }
        rates.sort_by(f64::total_cmp);
        println!("{name}: median {:.2} GB/s of {rates:.2?}", rates[rates.len() / 2]);
    }
    let (near, far) = pair();
    let start = Instant::now();
    for _ in 0..2000 {
        for (from, to) in [(&near, &far), (&far, &near)] {
            from.try_write([&[1; 32], &[2; 64]]).unwrap();
            let mut got = [0; 96];
            wait(&to.socket, Wait::Readable, Some(soon())).unwrap();
            assert_eq!(to.try_read([&mut got, &mut []]).unwrap(), 96);
        }
    }
    println!("96 bytes one way, one thread: {:.1} us", start.elapsed().as_secs_f64() * 1e6 / 4000.0);
    let start = Instant::now();
    for _ in 0..50 {
        pair();
    }
    println!("handshake, both ends: {:.0} us", start.elapsed().as_secs_f64() * 1e6 / 50.0);
}
