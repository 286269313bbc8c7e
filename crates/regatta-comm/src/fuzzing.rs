//! What `fuzz/` feeds with arbitrary bytes: one function for each of its targets, which panics where something is wrong.

use crate::algorithm::backend::Wanted;
use crate::algorithm::select::Table;
use crate::algorithm::simulate;
use crate::job::options::Options;
use crate::member::call::{Call, ENCODED, Kind};
use crate::member::directory::{Invitation, Note};
use crate::member::waits::Waits;
use crate::numbers::element::{DType, ReduceOp};
use crate::rendezvous::store::{Answer, Request};
use crate::rendezvous::{World, store, wire};
use crate::tls::{Identity, Stream};
use crate::transport::{TransportKind, tcp};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Gives a few bytes at a time.
struct Trickle<'a>(&'a [u8], usize);

impl Read for Trickle<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let count = into.len().min(self.1);
        self.0.read(&mut into[..count])
    }
}

/// Frames and their fields.
pub fn wire(bytes: &[u8]) {
    let mut stream = Trickle(bytes, 1 + bytes.len() % 7);
    while let Ok(frame) = wire::read(&mut stream) {
        let mut again = vec![];
        wire::write(&mut again, &frame).expect("what was a frame is one");
        assert_eq!(wire::read(&mut again.as_slice()).expect("a frame"), frame);
        fields(&frame);
    }
    fields(bytes);
}

fn fields(message: &[u8]) {
    fn same<const N: usize>(message: &[u8], all: Option<&[&[u8]]>) {
        let some = wire::unpack::<N>(message);
        assert_eq!(some.as_ref().map(|fields| &fields[..]), all.filter(|all| all.len() == N));
    }
    let all = wire::unpack_all(message);
    if let Some(all) = &all {
        assert_eq!(wire::pack(all), message);
    }
    let all = all.as_deref();
    same::<0>(message, all);
    same::<1>(message, all);
    same::<2>(message, all);
    same::<3>(message, all);
    same::<5>(message, all);
}

/// Calls, notes, invitations and greetings.
pub fn call(bytes: &[u8]) {
    let mut own = Call::new(Kind::AllReduce, DType::F32, 3);
    if let Some(encoded) = bytes.first_chunk::<ENCODED>()
        && let Some(call) = Call::from_bytes(encoded)
    {
        assert_eq!(&call.to_bytes(), encoded);
        assert!(!call.to_string().is_empty());
        own = call;
    }
    // Ranks that wait for one another, as the bytes have it.
    let mut waits = Waits::default();
    for (rank, &byte) in bytes.iter().take(16).enumerate() {
        let call = Call { sequence: u32::from(byte >> 4), ..own };
        let note = Note { rank: rank % 8, call, waits_for: usize::from(byte & 15) };
        let heard = waits.say(0, &note, u64::from(byte & 3));
        heard.conflict(own, &|sequence| Some(Call { sequence, ..own }));
        let chain_end = waits.chain_end(0, rank % 8, usize::from(byte & 15));
        assert!(chain_end <= 15 && waits.len() <= 8);
    }
    if let Some(note) = Note::from_bytes(bytes) {
        assert_eq!(note.to_bytes(), bytes);
    }
    if let Some(invitation) = Invitation::from_bytes(bytes) {
        assert_eq!(invitation.to_bytes(), bytes);
    }
    if let Some((said, expected)) = bytes.split_first_chunk::<{ tcp::GREETING + 8 }>() {
        assert_eq!(tcp::recognise(said, expected).is_some(), said[..tcp::GREETING] == *expected);
        let (rank, number) = tcp::recognise(said, &said[..tcp::GREETING]).expect("the same greeting");
        assert_eq!([rank as u32, number as u32].map(u32::to_le_bytes).concat(), said[tcp::GREETING..]);
    }
}

/// A TLS handshake with an unknown client: the first byte says on which side. It never succeeds, and never waits for more
/// than the unknown client sends.
pub fn tls(bytes: &[u8]) {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    static IDENTITY: OnceLock<Identity> = OnceLock::new();
    let identity = IDENTITY.get_or_init(|| Identity::new(b"the job's secret"));
    let Some((side, bytes)) = bytes.split_first() else { return };
    let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let (ours, theirs) = pair.expect("a pair of sockets");
    let (ours, mut theirs) = (TcpStream::from(ours), TcpStream::from(theirs));
    theirs.write_all(bytes).expect("room for a short message");
    theirs.shutdown(Shutdown::Write).expect("a connection");
    let deadline = Instant::now() + Duration::from_secs(5);
    let outcome = match side & 1 {
        0 => Stream::accept(ours, identity, deadline),
        _ => Stream::connect(ours, identity, deadline),
    };
    assert!(outcome.is_err() && Instant::now() < deadline);
}

/// A store's requests, without a socket; at most this many bytes of entries.
pub const STORED: usize = 4096;

/// A store: whoever says hello, and whatever is asked. What is set is there as in a plain map.
pub fn rendezvous(bytes: &[u8]) {
    let store = store::Bare::new(4, b"job", STORED);
    let mut model = Model::default();
    let mut rest = bytes;
    let mut take = |count: usize| {
        let (taken, left) = rest.split_at(count.min(rest.len()));
        rest = left;
        taken
    };
    while let [code, len] = *take(2) {
        let (key_len, value_len) =
            (usize::from(len & 15), usize::from(len >> 4) * usize::from(1 + (code >> 7) * 40));
        let request = match code & 15 {
            // As it is.
            0 => take(len.into()).to_vec(),
            1 => {
                store.greet(take(len.into()));
                continue;
            }
            2 => {
                let (job, role) = (
                    [&b"job"[..], b"other"][len as usize & 1],
                    [&b"watch"[..], b"request"][len as usize >> 1 & 1],
                );
                let rank = u32::from(len >> 2).to_le_bytes();
                let generation = (key_len as u64 & 1).to_le_bytes();
                store.greet(&wire::pack(&[store::MAGIC, job, role, &rank, &generation, take(3)]));
                continue;
            }
            // Of the right form, about entries.
            kind @ 3..9 => {
                let (key, value) = (String::from_utf8_lossy(take(key_len)).into_owned(), take(value_len));
                let (from, count) = (usize::from(len & 3), 1 + usize::from(len >> 4 & 3));
                let numbered = format!("{key}/{}", value_len % 4);
                let request = match kind {
                    3 => Request::Set { key: &key, value },
                    4 | 5 => Request::Set { key: &numbered, value },
                    6 => Request::List { prefix: &key },
                    7 => Request::Get { key: &key, wait: Duration::MAX },
                    _ => Request::Gather { prefix: &format!("{key}/"), from, count, wait: Duration::MAX },
                };
                request.encode()
            }
            // Goes on to another generation, with a number that no key here holds.
            13 if len & 2 > 0 => {
                let generation = 1 << 60 | (key_len as u64 & 3);
                let members = take(2).iter().map(|&rank| rank.into()).collect();
                Request::Begin { generation, members }.encode()
            }
            // Of another kind, with fields of the right lengths.
            kind => {
                let lengths: &[usize] = match kind {
                    9 => &[8, ENCODED + 8, 8],
                    10 => &[8, 4],
                    11 => &[8, 4, 4],
                    12 => &[16, 4],
                    13 => &[8],
                    14 => &[16, 4, if len & 1 == 0 { 4 } else { ENCODED }],
                    _ => &[16, 4, 4],
                };
                let letter = &b"NUCJRIW"[kind as usize - 9..][..1];
                let mut fields = vec![letter.to_vec()];
                fields.extend(lengths.iter().map(|&length| {
                    let mut field = take(length.min(5)).to_vec();
                    field.resize(length, 0);
                    field
                }));
                wire::pack(&fields.iter().map(Vec::as_slice).collect::<Vec<_>>())
            }
        };
        let answer = store.answer(&request);
        let (Some(answer), Some(request)) = (&answer, Request::decode(&request)) else {
            assert!(answer.is_none(), "an answer to what is no request");
            continue;
        };
        assert!(answer.len() <= wire::LONGEST);
        let answer = Answer::decode(answer).expect("an answer");
        let held = store.traffic().entry_bytes;
        assert!(held <= STORED);
        model.expect(&request, &answer, held);
        assert!(model.bytes() <= store.traffic().entry_bytes);
    }
}

/// What a store holds, plainly.
#[derive(Default)]
struct Model {
    entries: BTreeMap<String, Vec<u8>>,
    readers: BTreeMap<String, usize>,
}

impl Model {
    fn bytes(&self) -> usize {
        self.entries.iter().map(|(key, value)| store::ENTRY + key.len() + value.len()).sum()
    }

    fn expect(&mut self, request: &Request<'_>, answer: &Answer, held: usize) {
        match (request, answer) {
            // Members that others have named otherwise, or a way back: that ends what it was for.
            (Request::Begin { .. }, _) | (Request::Get { .. } | Request::Gather { .. }, Answer::Ended) => {}
            (_, Answer::Refused(_)) => {
                let size = request.encode().len();
                assert!(held + size + store::ENTRY + 512 > STORED, "refused for nothing");
            }
            (Request::Set { key, value }, Answer::Done) => {
                self.entries.insert(key.to_string(), value.to_vec());
            }
            (Request::List { prefix }, Answer::Entries(listed)) => {
                let expected = self.entries.iter().filter(|(name, _)| name.starts_with(prefix));
                assert!(listed.iter().map(|(key, value)| (key, value)).eq(expected));
            }
            (Request::Get { key, .. }, Answer::Value(value)) => {
                assert_eq!(Some(value), self.entries.get(*key));
            }
            (Request::Get { key, .. }, Answer::NotYet) => assert!(!self.entries.contains_key(*key)),
            (Request::Gather { prefix, count, .. }, Answer::Missing(missing)) => {
                let gone = |number: &usize| !self.entries.contains_key(&format!("{prefix}{number}"));
                assert!(missing.iter().copied().eq((0..*count).filter(gone)));
            }
            (Request::Gather { prefix, from, count, .. }, Answer::Values(values)) => {
                let value = |number: usize| self.entries[&format!("{prefix}{number}")].clone();
                assert!(values.iter().cloned().eq((*from..*count).map(value)));
                let readers = self.readers.entry(prefix.to_string()).or_default();
                *readers += 1;
                if *readers >= *count {
                    self.entries.retain(|key, _| !key.starts_with(prefix));
                    self.readers.retain(|key, _| !key.starts_with(prefix));
                }
            }
            (
                Request::Set { .. } | Request::List { .. } | Request::Get { .. } | Request::Gather { .. },
                _,
            ) => {
                panic!("{answer:?} to {request:?}")
            }
            _ => {}
        }
    }
}

/// Tuning tables, and what launchers and users say in the environment: the first byte says which.
pub fn table(bytes: &[u8]) {
    let Some((&which, bytes)) = bytes.split_first() else { return };
    let text = String::from_utf8_lossy(bytes);
    if which & 1 == 0 {
        let Ok(table) = Table::parse(&text) else { return };
        assert_eq!(Table::parse(&table.to_string()).as_ref(), Ok(&table));
        for &kind in Kind::ALL.iter().filter(|kind| !matches!(kind, Kind::Send | Kind::Join)) {
            for (index, ranks) in [0, 1, 3, 1 << 40, usize::MAX].into_iter().enumerate() {
                let link = TransportKind::ALL[index];
                let chosen = table.choose(&Wanted::plain(kind, link), ranks, usize::from(which) << 8);
                assert!(chosen.is_none_or(|chosen| chosen.offers(kind)));
            }
        }
        return;
    }
    const NAMES: [&str; 42] = [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "REGATTA_STORE",
        "TORCHELASTIC_RUN_ID",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "PMIX_NAMESPACE",
        "SLURM_STEP_ID",
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_JOB_ID",
        "SLURM_JOB_NODELIST",
        "REGATTA_TRANSPORT",
        "REGATTA_ALGORITHM",
        "REGATTA_DEADLINE_S",
        "REGATTA_WARN_S",
        "REGATTA_JOIN_S",
        "REGATTA_TCP_STREAMS",
        "REGATTA_SHM_LANES",
        "REGATTA_SECRET",
        "REGATTA_TLS",
        "REGATTA_TRACE",
        "SLURM_STEP_NODELIST",
        "SLURM_TASKS_PER_NODE",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_NODEID",
        "PMI_RANK",
        "PMI_SIZE",
        "MPI_LOCALRANKID",
        "MPI_LOCALNRANKS",
        "PALS_RANKID",
        "FLUX_TASK_RANK",
        "FLUX_JOB_SIZE",
        "FLUX_JOB_NNODES",
    ];
    // A line each: a letter or another byte for the name, then the value.
    let vars: BTreeMap<&str, &str> = text
        .split('\n')
        .filter_map(|line| {
            let first = line.chars().next()?;
            Some((NAMES[first as usize % NAMES.len()], &line[first.len_utf8()..]))
        })
        .collect();
    let get = |name: &str| vars.get(name).filter(|value| !value.is_empty()).map(|value| value.to_string());
    let _ = Options::from(&get);
    if let Ok(Some(world)) = World::from(&get) {
        let World { rank, size, local_rank, local_size, .. } = world;
        assert!(rank < size && local_rank < local_size && u32::try_from(size).is_ok());
    }
    let _ = (text.parse::<ReduceOp>(), text.parse::<DType>());
}

/// Operations by all their algorithms, over a network that is as slow as it likes: see `algorithm/simulate.rs`.
pub fn schedule(bytes: &[u8]) {
    simulate::simulate(bytes);
}
