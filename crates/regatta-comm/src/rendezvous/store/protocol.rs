//! What ranks and the store say to each other. Nothing here trusts the bytes: what is no message is `None`.

use crate::member::directory::{Heard, Invitation, Note, Round};
use crate::rendezvous::wire;
use std::time::Duration;

pub(crate) const MAGIC: &[u8] = b"regatta-store-5";
/// What the server says to a rank that may come in, where it does not say why it may not.
pub(super) const WELCOME: &[u8] = b"ok";
/// What a rank says once it knows that it is admitted.
pub(super) const CONFIRMED: &[u8] = b"here";
/// Most entries that are gathered at once.
pub(super) const MOST_GATHERED: usize = 1 << 17;
/// Stands for no rank.
pub(super) const NOBODY: u32 = u32::MAX;
/// Stands for all generations.
const ALL: u64 = u64::MAX;

/// What the keys of a generation's entries begin with.
pub(super) fn scope(generation: u64) -> String {
    match generation {
        0 => String::new(),
        later => format!("g{later}/"),
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Watch,
    Requests,
}

/// The first message on a connection.
pub(super) struct Hello<'a> {
    pub job: &'a [u8],
    pub role: Role,
    pub rank: usize,
    /// The generation that the rank comes for: 0 at the start of the job.
    pub generation: u64,
    /// Host and process, for errors.
    pub who: &'a str,
}

impl<'a> Hello<'a> {
    pub(super) fn encode(&self) -> Vec<u8> {
        let role: &[u8] = match self.role {
            Role::Watch => b"watch",
            Role::Requests => b"request",
        };
        let (rank, generation) = (rank_code(Some(self.rank)), self.generation.to_le_bytes());
        wire::pack(&[MAGIC, self.job, role, &rank, &generation, self.who.as_bytes()])
    }

    pub(super) fn decode(message: &'a [u8]) -> Option<Self> {
        let [MAGIC, job, role, rank, generation, who] = wire::unpack::<6>(message)? else { return None };
        let role = if role == b"watch" { Role::Watch } else { Role::Requests };
        let (rank, generation) = (parse_rank(rank)?, long(generation)?);
        Some(Self { job, role, rank, generation, who: std::str::from_utf8(who).ok()? })
    }
}

/// What a rank asks for. Times are those that the server may wait.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Request<'a> {
    /// Sets an entry: `Done`.
    Set { key: &'a str, value: &'a [u8] },
    /// All entries whose key begins with `prefix`: `Entries`.
    List { prefix: &'a str },
    /// The entry, once it is there: `Value`, or `NotYet`.
    Get { key: &'a str, wait: Duration },
    /// The entries `{prefix}{from}` to `{prefix}{count - 1}`, once all from 0 are there: `Values`, as many as a message
    /// holds, or `Missing`. When `count` ranks have read the last one, all entries under the prefix are dropped.
    Gather { prefix: &'a str, from: usize, count: usize, wait: Duration },
    /// Leaves a note in a group, with the last version that the rank has seen: `Heard`.
    Say { group: u64, note: Note, seen: u64 },
    /// Takes a rank's note back: `Done`.
    Unsay { group: u64, rank: usize },
    /// Whom `rank`, which waits for `peer`, really waits for: `Number`.
    ChainEnd { group: u64, rank: usize, peer: usize },
    /// Joins a round after an operation, and tells all ranks: `Number`, of ranks that have joined.
    Join { round: Round, sequence: u32 },
    /// Who has joined: `Ranks`.
    Joined { token: u64 },
    /// Says what an operation of a round is: `Done`.
    Invite { round: Round, sequence: u32, invitation: Invitation },
    /// What an operation of a round is, once somebody has said it: `Value`, or `NotYet`.
    Invited { round: Round, sequence: u32, wait: Duration },
    /// The server's clock, in microseconds since 1970: `Number`.
    Time,
    /// Goes on to another generation of the job, which has these members: `Done`.
    Begin { generation: u64, members: Vec<usize> },
}

impl<'a> Request<'a> {
    pub(crate) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Set { key, value } => wire::pack(&[b"S", key.as_bytes(), value]),
            Self::List { prefix } => wire::pack(&[b"P", prefix.as_bytes()]),
            Self::Get { key, wait } => wire::pack(&[b"G", key.as_bytes(), &millis(*wait)]),
            Self::Gather { prefix, from, count, wait } => {
                wire::pack(&[b"A", prefix.as_bytes(), &short(*from), &short(*count), &millis(*wait)])
            }
            Self::Say { group, note, seen } => {
                wire::pack(&[b"N", &group.to_le_bytes(), &note.to_bytes(), &seen.to_le_bytes()])
            }
            Self::Unsay { group, rank } => wire::pack(&[b"U", &group.to_le_bytes(), &short(*rank)]),
            Self::ChainEnd { group, rank, peer } => {
                wire::pack(&[b"C", &group.to_le_bytes(), &short(*rank), &short(*peer)])
            }
            Self::Join { round, sequence } => {
                wire::pack(&[b"J", &encode_round(*round), &sequence.to_le_bytes()])
            }
            Self::Joined { token } => wire::pack(&[b"R", &token.to_le_bytes()]),
            Self::Invite { round, sequence, invitation } => {
                let sequence = sequence.to_le_bytes();
                wire::pack(&[b"I", &encode_round(*round), &sequence, &invitation.to_bytes()])
            }
            Self::Invited { round, sequence, wait } => {
                wire::pack(&[b"W", &encode_round(*round), &sequence.to_le_bytes(), &millis(*wait)])
            }
            Self::Time => wire::pack(&[b"T"]),
            Self::Begin { generation, members } => {
                wire::pack(&[b"B", &generation.to_le_bytes(), &shorts(members)])
            }
        }
    }

    pub(crate) fn decode(message: &'a [u8]) -> Option<Self> {
        Some(match wire::unpack_all(message)?.as_slice() {
            [b"S", key, value] => Self::Set { key: text(key)?, value },
            [b"P", prefix] => Self::List { prefix: text(prefix)? },
            [b"G", key, wait] => Self::Get { key: text(key)?, wait: time(wait)? },
            [b"A", prefix, from, count, wait] => {
                let (from, count) = (number(from)?, number(count)?);
                if from >= count || count > MOST_GATHERED {
                    return None;
                }
                Self::Gather { prefix: text(prefix)?, from, count, wait: time(wait)? }
            }
            [b"N", group, note, seen] => {
                Self::Say { group: long(group)?, note: Note::from_bytes(note)?, seen: long(seen)? }
            }
            [b"U", group, rank] => Self::Unsay { group: long(group)?, rank: number(rank)? },
            [b"C", group, rank, peer] => {
                Self::ChainEnd { group: long(group)?, rank: number(rank)?, peer: number(peer)? }
            }
            [b"J", round, sequence] => Self::Join { round: decode_round(round)?, sequence: code(sequence)? },
            [b"R", token] => Self::Joined { token: long(token)? },
            [b"I", round, sequence, invitation] => Self::Invite {
                round: decode_round(round)?,
                sequence: code(sequence)?,
                invitation: Invitation::from_bytes(invitation)?,
            },
            [b"W", round, sequence, wait] => {
                Self::Invited { round: decode_round(round)?, sequence: code(sequence)?, wait: time(wait)? }
            }
            [b"T"] => Self::Time,
            [b"B", generation, members] => {
                Self::Begin { generation: long(generation)?, members: numbers(members)? }
            }
            _ => return None,
        })
    }
}

/// What the server answers.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Answer {
    Done,
    Value(Vec<u8>),
    Values(Vec<Vec<u8>>),
    Entries(Vec<(String, Vec<u8>)>),
    /// The entries that are not there yet.
    Missing(Vec<usize>),
    NotYet,
    /// The rank's generation of the job has ended, and what was asked for is not there.
    Ended,
    Number(u64),
    Ranks(Vec<usize>),
    Heard(Heard),
    /// The request is understood, and not granted.
    Refused(String),
}

impl Answer {
    pub(crate) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Done => wire::pack(&[b"k"]),
            Self::Value(value) => wire::pack(&[b"v", value]),
            Self::Values(values) => flat(b"V", values.iter().map(Vec::as_slice)),
            Self::Entries(entries) => {
                flat(b"E", entries.iter().flat_map(|(key, value)| [key.as_bytes(), value]))
            }
            Self::Missing(ranks) => wire::pack(&[b"m", &shorts(ranks)]),
            Self::NotYet => wire::pack(&[b"t"]),
            Self::Ended => wire::pack(&[b"x"]),
            Self::Number(number) => wire::pack(&[b"n", &number.to_le_bytes()]),
            Self::Ranks(ranks) => wire::pack(&[b"r", &shorts(ranks)]),
            Self::Heard(Heard { version, others, circle }) => {
                let others: Vec<Vec<u8>> = others.iter().map(|note| note.to_bytes()).collect();
                let circle = circle.map(Note::to_bytes).unwrap_or_default();
                let version = version.to_le_bytes();
                let fields = [version.as_slice(), &circle].into_iter();
                flat(b"h", fields.chain(others.iter().map(Vec::as_slice)))
            }
            Self::Refused(why) => wire::pack(&[b"e", why.as_bytes()]),
        }
    }

    pub(crate) fn decode(message: &[u8]) -> Option<Self> {
        let fields = wire::unpack_all(message)?;
        Some(match fields.as_slice() {
            [b"k"] => Self::Done,
            [b"v", value] => Self::Value(value.to_vec()),
            [b"V", values @ ..] => Self::Values(values.iter().map(|value| value.to_vec()).collect()),
            [b"E", fields @ ..] if fields.len() % 2 == 0 => {
                let entry = |pair: &[&[u8]]| Some((text(pair[0])?.to_string(), pair[1].to_vec()));
                Self::Entries(fields.chunks_exact(2).map(entry).collect::<Option<_>>()?)
            }
            [b"m", ranks] => Self::Missing(numbers(ranks)?),
            [b"t"] => Self::NotYet,
            [b"x"] => Self::Ended,
            [b"n", number] => Self::Number(long(number)?),
            [b"r", ranks] => Self::Ranks(numbers(ranks)?),
            [b"h", version, circle, others @ ..] => {
                let circle = match circle {
                    [] => None,
                    note => Some(Note::from_bytes(note)?),
                };
                let others = others.iter().map(|note| Note::from_bytes(note)).collect::<Option<_>>()?;
                Self::Heard(Heard { version: long(version)?, others, circle })
            }
            [b"e", why] => Self::Refused(String::from_utf8_lossy(why).into_owned()),
            _ => return None,
        })
    }
}

/// What the server tells all ranks.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum News {
    /// A generation has ended, or the whole job.
    End { generation: Option<u64>, rank: Option<usize>, reason: String },
    /// A rank makes no more calls in a generation.
    Left { generation: u64, rank: usize },
    /// A rank has joined a round after an operation.
    Joined { token: u64, sequence: u32 },
    /// The server says goodbye.
    Closing,
}

impl News {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Self::End { generation, rank, reason } => {
                let generation = generation.unwrap_or(ALL).to_le_bytes();
                wire::pack(&[b"X", &generation, &rank_code(*rank), reason.as_bytes()])
            }
            Self::Left { generation, rank } => wire::pack(&[b"L", &generation.to_le_bytes(), &short(*rank)]),
            Self::Joined { token, sequence } => {
                wire::pack(&[b"J", &token.to_le_bytes(), &sequence.to_le_bytes()])
            }
            Self::Closing => wire::pack(&[b"C"]),
        }
    }

    pub(super) fn decode(message: &[u8]) -> Option<Self> {
        Some(match wire::unpack_all(message)?.as_slice() {
            [b"X", generation, rank, reason] => Self::End {
                generation: Some(long(generation)?).filter(|&generation| generation != ALL),
                rank: parse_rank(rank),
                reason: String::from_utf8_lossy(reason).into_owned(),
            },
            [b"L", generation, rank] => Self::Left { generation: long(generation)?, rank: number(rank)? },
            [b"J", token, sequence] => Self::Joined { token: long(token)?, sequence: code(sequence)? },
            [b"C"] => Self::Closing,
            _ => return None,
        })
    }
}

/// The last word of a rank.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Farewell {
    /// It gives up, and the generation of the job ends.
    GivesUp { generation: u64, reason: String },
    /// It has done its part.
    Goodbye,
}

impl Farewell {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Self::GivesUp { generation, reason } => {
                wire::pack(&[b"X", &generation.to_le_bytes(), reason.as_bytes()])
            }
            Self::Goodbye => wire::pack(&[b"L"]),
        }
    }

    pub(super) fn decode(message: &[u8]) -> Option<Self> {
        Some(match wire::unpack_all(message)?.as_slice() {
            [b"X", generation, reason] => Self::GivesUp {
                generation: long(generation)?,
                reason: String::from_utf8_lossy(reason).into_owned(),
            },
            [b"L"] => Self::Goodbye,
            _ => return None,
        })
    }
}

fn flat<'a>(kind: &'a [u8], fields: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    wire::pack(&std::iter::once(kind).chain(fields).collect::<Vec<_>>())
}

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

fn long(bytes: &[u8]) -> Option<u64> {
    bytes.try_into().ok().map(u64::from_le_bytes)
}

fn code(bytes: &[u8]) -> Option<u32> {
    bytes.try_into().ok().map(u32::from_le_bytes)
}

fn number(bytes: &[u8]) -> Option<usize> {
    code(bytes).map(|code| code as usize)
}

fn short(number: usize) -> [u8; 4] {
    (number as u32).to_le_bytes()
}

fn shorts(numbers: &[usize]) -> Vec<u8> {
    numbers.iter().flat_map(|&number| short(number)).collect()
}

fn numbers(bytes: &[u8]) -> Option<Vec<usize>> {
    let (numbers, []) = bytes.as_chunks::<4>() else { return None };
    Some(numbers.iter().map(|&bytes| u32::from_le_bytes(bytes) as usize).collect())
}

fn millis(time: Duration) -> [u8; 4] {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX).to_le_bytes()
}

fn time(bytes: &[u8]) -> Option<Duration> {
    code(bytes).map(|millis| Duration::from_millis(millis.into()))
}

fn encode_round(Round { token, size, rank }: Round) -> Vec<u8> {
    [&token.to_le_bytes()[..], &short(size), &short(rank)].concat()
}

fn decode_round(bytes: &[u8]) -> Option<Round> {
    let (token, rest) = bytes.split_first_chunk::<8>()?;
    let (size, rank) = rest.split_first_chunk::<4>()?;
    Some(Round { token: u64::from_le_bytes(*token), size: number(size)?, rank: number(rank)? })
}

fn rank_code(rank: Option<usize>) -> [u8; 4] {
    rank.map_or(NOBODY, |rank| rank as u32).to_le_bytes()
}

fn parse_rank(bytes: &[u8]) -> Option<usize> {
    code(bytes).filter(|&code| code != NOBODY).map(|code| code as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::member::call::{Call, Kind};
    use crate::numbers::element::DType;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(
            kind in "[A-Za-z]", fields in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..45), 0..5)
        ) {
            let mut all = vec![kind.as_bytes()];
            all.extend(fields.iter().map(Vec::as_slice));
            let message = wire::pack(&all);
            let _ = (Hello::decode(&message), Farewell::decode(&message), News::decode(&message));
            if let Some(request) = Request::decode(&message) {
                prop_assert_eq!(request.encode(), message.clone());
            }
            if let Some(answer) = Answer::decode(&message).filter(|answer| !matches!(answer, Answer::Refused(_))) {
                prop_assert_eq!(answer.encode(), message);
            }
        }
    }

    #[test]
    fn what_is_said_is_understood() {
        let call = Call { sequence: 7, ..Call::new(Kind::AllReduce, DType::F32, 3) };
        let (note, round) =
            (Note { rank: 3, call, waits_for: 4 }, Round { token: 1 << 40, size: 5, rank: 3 });
        let (group, sequence, wait) = (u64::MAX, 9, Duration::from_millis(1500));
        for request in [
            Request::Set { key: "a", value: b"b" },
            Request::List { prefix: "a/" },
            Request::Get { key: "a", wait },
            Request::Gather { prefix: "a/", from: 1, count: 9, wait },
            Request::Say { group, note, seen: 2 },
            Request::Unsay { group, rank: 3 },
            Request::ChainEnd { group, rank: 3, peer: 1 },
            Request::Join { round, sequence },
            Request::Joined { token: 3 },
            Request::Invite { round, sequence, invitation: Invitation::Call(call) },
            Request::Invite { round, sequence, invitation: Invitation::End { rank: 2 } },
            Request::Invited { round, sequence, wait },
            Request::Time,
            Request::Begin { generation: 1, members: vec![0, 7] },
        ] {
            assert_eq!(Request::decode(&request.encode()), Some(request.clone()));
        }
        let heard =
            |others: &[Note], circle| Answer::Heard(Heard { version: 3, others: others.to_vec(), circle });
        for answer in [
            Answer::Done,
            Answer::Value(vec![1]),
            Answer::Values(vec![vec![], vec![2]]),
            Answer::Entries(vec![("a".into(), vec![1])]),
            Answer::Missing(vec![3, 5]),
            Answer::NotYet,
            Answer::Ended,
            Answer::Number(u64::MAX),
            Answer::Ranks(vec![]),
            heard(&[], None),
            heard(&[note, note], Some(note)),
            Answer::Refused("no".into()),
        ] {
            assert_eq!(Answer::decode(&answer.encode()), Some(answer.clone()));
        }
        for news in [
            News::End { generation: None, rank: None, reason: "r".into() },
            News::End { generation: Some(7), rank: Some(3), reason: String::new() },
            News::Left { generation: 7, rank: 3 },
            News::Joined { token: 1, sequence: 2 },
            News::Closing,
        ] {
            assert_eq!(News::decode(&news.encode()), Some(news.clone()));
        }
        for farewell in [Farewell::GivesUp { generation: 1, reason: "r".into() }, Farewell::Goodbye] {
            assert_eq!(Farewell::decode(&farewell.encode()), Some(farewell.clone()));
        }
    }
}
