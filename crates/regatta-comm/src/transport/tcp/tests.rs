//! Groups that share connections: over a pair of sockets, step by step, and among unknown clients.

use super::connection::Connection;
use super::connections::{Connections, Settings};
use super::frame::{Header, WINDOW};
use super::greeting::{Listening, SECRET, greeting};
use super::receiving::Channel;
use super::waker::Waker;
use crate::member::health::Health;
use crate::rendezvous::Security;
use crate::tls::Stream;
use proptest::prelude::*;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(30);

/// The two ends of a connection within this process.
fn sockets() -> [TcpStream; 2] {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let other = listener.accept().unwrap().0;
    [one, other].map(|socket| {
        socket.set_nodelay(true).unwrap();
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, 8 << 10);
        socket
    })
}

/// The byte of a group's stream at a place.
fn byte(group: usize, side: usize, at: usize) -> u8 {
    (at * 31 + at / 251 * 7 + group * 101 + side * 53) as u8
}

/// One group on one side.
struct Member {
    channel: Arc<Channel>,
    inbox: usize,
    sent: usize,
    received: usize,
    /// Bytes that are to be sent, with those that were.
    wanted: usize,
}

struct Side {
    connection: Connection,
    members: Vec<Member>,
}

fn sides(groups: usize) -> [Side; 2] {
    sockets().map(|socket| {
        let connection = Connection::new(Stream::plain(socket), Arc::default(), 0);
        let member = |group| {
            let channel = Arc::new(Channel::new(group as u64, 0, Arc::new(Waker::new().unwrap())));
            let inbox = connection.join(&channel);
            Member { channel, inbox, sent: 0, received: 0, wanted: 0 }
        };
        let members = (0..groups).map(member).collect();
        Side { connection, members }
    })
}

impl Side {
    /// Sends what the group has yet to send, `first` bytes of it in a part of their own.
    fn send(&mut self, side: usize, group: usize, first: usize) -> bool {
        let Member { channel, sent, wanted, .. } = &mut self.members[group];
        let bytes: Vec<u8> = (*sent..*wanted).map(|at| byte(group, side, at)).collect();
        let (one, two) = bytes.split_at(first.min(bytes.len()));
        let mut moved = self.connection.send(channel, [one, two], false).unwrap();
        if moved.blocked == Some(super::Blocked::Credit) {
            self.connection.pump().unwrap();
            let rest = &bytes[moved.taken..];
            moved.taken += self.connection.send(channel, [rest, &[]], false).unwrap().taken;
        }
        *sent += moved.taken;
        moved.taken > 0
    }

    fn receive(&mut self, side: usize, group: usize, first: usize, second: usize) -> bool {
        let member = &mut self.members[group];
        let (mut one, mut two) = (vec![0; first], vec![0; second]);
        let count = self.connection.receive(group as u64, member.inbox, [&mut one, &mut two]).unwrap();
        for (index, &came) in one.iter().chain(&two).take(count).enumerate() {
            assert_eq!(came, byte(group, 1 - side, member.received + index));
        }
        member.received += count;
        count > 0
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn groups_share_a_connection_and_none_holds_another_up(
        groups in 2usize..5,
        steps in prop::collection::vec((0usize..2, 0usize..5, 0usize..3, 0usize..300, 0usize..120_000), 1..120),
        stuck in any::<bool>(),
    ) {
        let mut sides = sides(groups);
        let reads = |group: usize| !stuck || group > 0;
        for (side, group, what, first, second) in steps {
            let group = group % groups;
            let here = &mut sides[side];
            match what {
                0 => {
                    here.members[group].wanted += first + second;
                    here.send(side, group, first);
                }
                1 => drop(here.send(side, group, first)),
                _ if reads(group) => drop(here.receive(side, group, first, second)),
                _ => {}
            }
            for side in &sides {
                prop_assert!(side.connection.held() <= groups * WINDOW);
                prop_assert!(side.members.iter().all(|member| member.channel.credit.load(std::sync::atomic::Ordering::Relaxed) <= WINDOW));
            }
        }
        // Whoever reads gets everything, in order, though a group may not be read at all.
        let begun = Instant::now();
        loop {
            for (side, here) in sides.iter_mut().enumerate() {
                for group in 0..groups {
                    here.send(side, group, 40);
                    if reads(group) {
                        while here.receive(side, group, 32, 50_000) {}
                    }
                    here.connection.flush().unwrap();
                }
            }
            let all = (0..groups).filter(|&group| reads(group)).all(|group| {
                (0..2).all(|side| sides[1 - side].members[group].received == sides[side].members[group].wanted)
            });
            if all {
                break;
            }
            prop_assert!(begun.elapsed() < SOON, "a group is held up");
        }
        for side in &sides {
            prop_assert!(side.connection.held() <= WINDOW);
        }
    }

    #[test]
    fn what_no_rank_sends_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), group in 0u64..3, len in any::<u32>(), kind in 0u32..4) {
        let [ours, mut theirs] = sockets();
        let connection = Connection::new(Stream::plain(ours), Arc::default(), 0);
        let channel = Arc::new(Channel::new(1, 0, Arc::new(Waker::new().unwrap())));
        let inbox = connection.join(&channel);
        theirs.write_all(&[&Header { group, len, kind }.bytes()[..], &bytes].concat()).unwrap();
        drop(theirs);
        let begun = Instant::now();
        let mut got = 0;
        while let Ok(count) = connection.receive(1, inbox, [&mut [0; 16], &mut [0; 100]]) {
            got += count;
            assert!(begun.elapsed() < SOON && got <= bytes.len());
        }
        prop_assert!(connection.held() <= bytes.len());
    }
}

#[test]
fn a_group_that_is_dropped_within_a_frame_breaks_the_connection() {
    let mut sides = sides(2);
    sides[0].members[0].wanted = 10 * WINDOW;
    while sides[0].send(0, 0, 0) {}
    let [one, other] = &mut sides;
    let waiting = &one.members[1];
    // The frame of the first group is not complete.
    assert_eq!(
        one.connection.send(&waiting.channel, [b"x", b""], false).unwrap().blocked,
        Some(super::Blocked::Turn)
    );
    one.connection.leave(0, one.members[0].inbox);
    assert!(!waiting.channel.waker.doze(), "nobody has told the other group");
    assert!(one.connection.send(&waiting.channel, [b"x", b""], false).is_err());
    let begun = Instant::now();
    while other.connection.pump().is_ok() {
        assert!(begun.elapsed() < SOON);
    }
    assert!(other.connection.receive(1, other.members[1].inbox, [&mut [0], &mut []]).is_err());
}

#[test]
fn a_peer_that_leaves_a_group_ends_it_and_no_other() {
    let mut sides = sides(2);
    let [one, other] = &mut sides;
    one.members[0].wanted = 10;
    assert!(one.send(0, 0, 3));
    one.connection.leave(0, one.members[0].inbox);
    let begun = Instant::now();
    while !other.receive(1, 0, 0, 100) {
        assert!(begun.elapsed() < SOON);
    }
    assert_eq!(other.members[0].received, 10);
    while other.connection.receive(0, other.members[0].inbox, [&mut [0], &mut []]).is_ok() {
        assert!(begun.elapsed() < SOON);
    }
    assert!(other.connection.send(&other.members[0].channel, [b"x", b""], false).is_err());
    one.members[1].wanted = 5;
    assert!(one.send(0, 1, 0));
    while other.members[1].received < 5 {
        other.receive(1, 1, 0, 100);
        assert!(begun.elapsed() < SOON);
    }
}

fn connections(rank: usize, listening: [Listening; 2], streams: usize) -> Arc<Connections> {
    let contacts = listening.iter().map(|listening| Some(listening.contact())).collect();
    let listening = listening.into_iter().nth(rank).unwrap();
    Connections::new(Settings {
        rank,
        contacts,
        listening: Ok(listening),
        security: Security::default(),
        health: Arc::<Health>::default(),
        streams,
        join: SOON,
    })
}

fn listening() -> Listening {
    Listening::new(IpAddr::from([127, 0, 0, 1])).unwrap()
}

/// The connections to a rank, once they are there.
fn reach(connections: &Arc<Connections>, peer: usize) -> super::Pair {
    let begun = Instant::now();
    loop {
        if let Some(pair) = connections.get(peer).unwrap() {
            return pair;
        }
        assert!(begun.elapsed() < SOON, "no connection");
        std::thread::yield_now();
    }
}

/// Two ranks that know each other.
fn two_ranks(streams: usize) -> [Arc<Connections>; 2] {
    let (one, other) = (listening(), listening());
    let copy = |listening: &Listening| Listening {
        listener: listening.listener.try_clone().unwrap(),
        address: listening.address,
        secret: listening.secret,
    };
    let (for_one, for_other) = ([copy(&one), copy(&other)], [one, other]);
    [connections(0, for_one, streams), connections(1, for_other, streams)]
}

#[test]
fn whoever_dials_there_is_one_connection() {
    for (streams, dials) in [(1, [true, false]), (1, [false, true]), (3, [true, true]), (2, [true, false])] {
        for _ in 0..5 {
            let ranks = two_ranks(streams);
            let waker = Arc::new(Waker::new().unwrap());
            for (rank, connections) in ranks.iter().enumerate() {
                assert_eq!(connections.enter(&waker, &[1 - rank]).unwrap(), 1);
            }
            for (rank, connections) in ranks.iter().enumerate() {
                if dials[rank] {
                    let _ = connections.get(1 - rank).unwrap();
                }
            }
            let [one, other] = [reach(&ranks[0], 1), reach(&ranks[1], 0)];
            assert_eq!((one.len(), other.len()), (streams, streams));
            for (one, other) in one.iter().zip(other.iter()) {
                assert_eq!(one.stream.local_addr().unwrap(), other.stream.peer_addr().unwrap());
            }
            ranks.iter().for_each(|connections| connections.close(Duration::from_secs(1)));
        }
    }
}

#[test]
fn unknown_clients_are_dropped_and_hold_nobody_up() {
    let ranks = two_ranks(1);
    let waker = Arc::new(Waker::new().unwrap());
    ranks[0].enter(&waker, &[1]).unwrap();
    let contact = ranks[1].contact(0);
    let say = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(contact.address).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    };
    let who = |rank: u32, number: u32| [rank, number].map(u32::to_le_bytes).concat();
    let (right, wrong) = (greeting(&contact.secret), greeting(&[8; SECRET]));
    let mut held =
        vec![say(b""), say(b"GET / HTTP/1.1\r\n\r\n"), say(&[255; 100]), say(&[wrong, who(1, 0)].concat())];
    // Of our job, but none of the ranks that are still to come.
    for (rank, number) in [(0, 0), (9, 0), (1, 5)] {
        held.push(say(&[right.clone(), who(rank, number)].concat()));
    }
    ranks[1].enter(&waker, &[0]).unwrap();
    let [other, one] = [reach(&ranks[1], 0), reach(&ranks[0], 1)];
    let channel = Arc::new(Channel::new(7, 0, waker));
    let inboxes = [&one, &other].map(|pair| pair[0].join(&channel));
    assert_eq!(one[0].send(&channel, [b"!", b""], false).unwrap().taken, 1);
    let (begun, mut came) = (Instant::now(), [0]);
    while other[0].receive(7, inboxes[1], [&mut came, &mut []]).unwrap() == 0 {
        assert!(begun.elapsed() < SOON);
    }
    assert_eq!(&came, b"!");
    // A second rank 1 gets no for an answer, and unknown clients get none.
    let mut answer = vec![];
    let mut late = say(&[right, who(1, 0)].concat());
    late.set_read_timeout(Some(SOON)).unwrap();
    late.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"n");
    answer.clear();
    held[3].set_read_timeout(Some(SOON)).unwrap();
    held[3].read_to_end(&mut answer).unwrap();
    assert!(answer.is_empty());
    ranks.iter().for_each(|connections| connections.close(Duration::from_secs(1)));
}

#[test]
fn what_was_sent_comes_though_its_rank_has_ended() {
    // More than the peer has read when the connection is closed, with bytes that nobody reads on the other side.
    let ranks = two_ranks(1);
    let waker = Arc::new(Waker::new().unwrap());
    for (rank, connections) in ranks.iter().enumerate() {
        connections.enter(&waker, &[1 - rank]).unwrap();
    }
    let [one, other] = [reach(&ranks[0], 1), reach(&ranks[1], 0)];
    let channels = [1, 1].map(|group| Arc::new(Channel::new(group, 0, waker.clone())));
    let inboxes = [one[0].join(&channels[0]), other[0].join(&channels[1])];
    let data: Vec<u8> = (0..WINDOW).map(|at| byte(1, 0, at)).collect();
    let mut sent = 0;
    while sent < data.len() {
        let more = one[0].send(&channels[0], [&data[sent..], &[]], false).unwrap();
        sent += more.taken;
        if more.taken == 0 {
            break;
        }
    }
    other[0].send(&channels[1], [b"nobody reads this", b""], false).unwrap();
    drop(one);
    let ending = ranks[0].clone();
    let ending = std::thread::spawn(move || ending.close(SOON));
    let (begun, mut came) = (Instant::now(), 0);
    while came < sent {
        let mut bytes = vec![0; 10_000];
        let count = other[0].receive(1, inboxes[1], [&mut bytes, &mut []]).unwrap();
        assert!(bytes[..count] == data[came..came + count]);
        came += count;
        assert!(begun.elapsed() < SOON);
    }
    ending.join().unwrap();
    ranks[1].close(SOON);
}
