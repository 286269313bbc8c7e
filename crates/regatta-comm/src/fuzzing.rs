//! What `fuzz/` feeds with arbitrary bytes: one function for each of its targets, which panics where something is wrong.

use crate::algorithm::select::Table;
use crate::algorithm::simulate;
use crate::job::options::Options;
use crate::member::call::{Call, ENCODED, Kind};
use crate::member::notes::{self, Directory, Notes};
use crate::numbers::element::{DType, ReduceOp};
use crate::rendezvous::{World, store, wire};
use crate::tls::{Identity, Stream};
use crate::transport::{TransportKind, tcp};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, OnceLock};
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

/// A directory in which anything may stand.
struct Garbage(Vec<(String, Vec<u8>)>);

impl Directory for Garbage {
    fn set(&self, _: &str, _: &[u8]) -> crate::Result<()> {
        Ok(())
    }
    fn try_get(&self, _: &str, _: Instant) -> crate::Result<Option<Vec<u8>>> {
        Ok(self.0.first().map(|(_, value)| value.clone()))
    }
    fn add(&self, _: &str, amount: u64) -> crate::Result<u64> {
        Ok(amount)
    }
    fn list(&self, _: &str) -> crate::Result<Vec<(String, Vec<u8>)>> {
        Ok(self.0.clone())
    }
    fn lost(&self) -> Option<Option<usize>> {
        None
    }
    fn announce(&self, _: u64, _: u32) -> crate::Result<()> {
        Ok(())
    }
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
    // A line each: a rank and what it says.
    let prefix = |rank: &str| format!("note/0/{rank}");
    let note = |line: &[u8]| {
        let at = line.iter().position(|&byte| byte == b' ').unwrap_or(0);
        (
            prefix(&String::from_utf8_lossy(&line[..at])),
            line[at.min(line.len())..].get(1..).unwrap_or(&[]).to_vec(),
        )
    };
    let mut entries: Vec<_> = bytes.split(|&byte| byte == b'\n').map(note).collect();
    // And ranks that wait for one another, as the bytes have it.
    for (rank, &byte) in bytes.iter().take(16).enumerate() {
        let sequence = u32::from(byte >> 4);
        let value =
            [&Call { sequence, ..own }.to_bytes()[..], &u32::from(byte & 15).to_le_bytes(), &[0; 4]].concat();
        entries.push((prefix(&rank.to_string()), value));
    }
    let notes = Notes::new(Some(Arc::new(Garbage(entries))), 0, 1);
    notes.culprit(bytes.len() % 17);
    notes.quarrel(own, bytes.len() % 17, &|_| None);
    notes.joined(0);
    let _ = notes.invited(0, 1, Instant::now());
    notes::parsed(bytes);
    if let Some((said, expected)) = bytes.split_first_chunk::<{ tcp::GREETING + 8 }>() {
        assert_eq!(tcp::recognise(said, expected).is_some(), said[..tcp::GREETING] == *expected);
        let (rank, number) = tcp::recognise(said, &said[..tcp::GREETING]).expect("the same greeting");
        assert_eq!([rank as u32, number as u32].map(u32::to_le_bytes).concat(), said[tcp::GREETING..]);
    }
}

/// A TLS handshake with a stranger: the first byte says on which side. It never succeeds, and never waits for more
/// than the stranger sends.
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

/// A store: whoever says hello, and whatever is asked. Each answer is the one that a plain map gives.
pub fn rendezvous(bytes: &[u8]) {
    let store = store::Bare::new(4, b"job", STORED);
    let mut model = BTreeMap::<String, Vec<u8>>::new();
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
                store.greet(&wire::pack(&[store::MAGIC, job, role, &rank, take(3)]));
                continue;
            }
            kind => {
                let kind =
                    [&b"S"[..], b"S", b"S", b"A", b"A", b"P", b"P", b"J", b"T", b"G", b"G", b"G", b"?"]
                        [kind as usize - 3];
                let (key, mut value) = (take(key_len).to_vec(), take(value_len).to_vec());
                if code & 0x40 != 0 {
                    // Of the right form.
                    match kind {
                        b"A" => value.resize(8, 1),
                        b"J" | b"G" => value.resize(4, 1),
                        _ => {}
                    }
                }
                wire::pack(&[kind, &key, &value])
            }
        };
        let answer = store.answer(&request);
        let (answer, fields) = match (&answer, wire::unpack::<3>(&request)) {
            (Some(answer), Some(fields)) => (wire::unpack::<2>(answer).expect("an answer"), fields),
            (None, _) => continue,
            (Some(_), None) => panic!("an answer to what is no request"),
        };
        let key = String::from_utf8_lossy(fields[1]).into_owned();
        match (fields[0], answer) {
            (b"S" | b"A", [b"e", _]) => {
                assert!(store.bytes() + request.len() * 3 + 64 > STORED, "refused for nothing")
            }
            (b"S", [b"k", b""]) => drop(model.insert(key, fields[2].to_vec())),
            (b"A", [b"v", sum]) => {
                let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
                let expected =
                    model.get(&key).map_or(0, |value| number(value)).wrapping_add(number(fields[2]));
                assert_eq!(sum, expected.to_le_bytes());
                model.insert(key, sum.to_vec());
            }
            (b"P", [b"v", listed]) => {
                let listed = wire::unpack_all(listed).expect("fields");
                let expected = model.iter().filter(|(name, _)| name.starts_with(&key));
                let expected: Vec<&[u8]> =
                    expected.flat_map(|(name, value)| [name.as_bytes(), value]).collect();
                assert_eq!(listed, expected);
            }
            (b"G", [b"v", value]) => assert_eq!(Some(value), model.get(&key).map(Vec::as_slice)),
            (b"G", [b"t", b""]) => assert!(!model.contains_key(&key)),
            (b"J", [b"k", b""]) => assert!(u64::from_str_radix(&key, 16).is_ok()),
            (b"T", [b"v", time]) => assert_eq!(time.len(), 8),
            (request, answer) => panic!("{answer:?} to {request:?}"),
        }
        let bytes: usize = model.iter().map(|(key, value)| store::ENTRY + key.len() + value.len()).sum();
        assert_eq!(bytes, store.bytes());
        assert!(bytes <= STORED);
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
                let chosen = table.choose(kind, link, ranks, usize::from(which) << 8);
                assert!(chosen.offers(kind));
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
