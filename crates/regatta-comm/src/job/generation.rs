//! The generations of a job: how a rank goes on to another one, with other members.
//!
//! What belongs to the process stays: the store, the connections to the living. What belongs to the generation is new:
//! the news of its end, its members and their hosts, its groups.
//!
//! Each member publishes where it is dialled and which of its connections no other generation can use, and reads what all
//! have published. Connections that one of the two ranks cannot use, and those to a process that is another now, are
//! forgotten by both. When all have done so, the generation begins: two round trips to the store, however many ranks.

use crate::algorithm::select::Table;
use crate::error::{Error, Result};
use crate::job::options::Options;
use crate::job::shared_memory::HostMemory;
use crate::job::start::{Reached, gave_up, join_timer, tell};
use crate::job::{Job, Processes, Ways};
use crate::member::health::gone_on;
use crate::member::timer::Timer;
use crate::rendezvous::store::StoreClient;
use crate::rendezvous::{World, wire};
use crate::transport::TransportKind;
use crate::transport::tcp::{self, Connections, Contact, Listening};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Where the store keeps what each member says of itself.
const MEMBERS: &str = "member/";
/// Where it keeps that a member is ready.
const READY: &str = "ready/";

/// How a member goes to a generation.
struct Own<'a> {
    rank: usize,
    host: &'a [u8],
    /// None where it is new.
    before: Option<Before<'a>>,
    members: &'a [usize],
    timer: Timer,
}

/// What a member knows of the job that has been in it before.
struct Before<'a> {
    name: &'a str,
    tuning: &'a Table,
    /// What the ranks of its host shared.
    memory: &'a Arc<HostMemory>,
}

/// What a member says of itself.
#[derive(Debug, Default, PartialEq)]
struct About {
    /// From where it reaches the store.
    ip: String,
    contact: Option<Contact>,
    host: Vec<u8>,
    /// Ranks to which it has connections that cannot be used.
    broken: Vec<usize>,
    /// Tells the memory that it shared from others; 0 where it shared none.
    memory: u64,
    name: String,
    tuning: String,
}

impl About {
    fn encode(&self) -> Vec<u8> {
        let contact = self.contact.map(|contact| contact.to_string()).unwrap_or_default();
        let broken: Vec<u8> = self.broken.iter().flat_map(|&rank| (rank as u32).to_le_bytes()).collect();
        let Self { ip, host, memory, name, tuning, .. } = self;
        let memory = memory.to_le_bytes();
        let (ip, contact, name, tuning) =
            (ip.as_bytes(), contact.as_bytes(), name.as_bytes(), tuning.as_bytes());
        wire::pack(&[ip, contact, host, &broken, &memory, name, tuning])
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let [ip, contact, host, broken, memory, name, tuning] = wire::unpack::<7>(bytes)?;
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
        let (broken, []) = broken.as_chunks::<4>() else { return None };
        Some(Self {
            ip: text(ip)?,
            contact: Contact::parse(&text(contact)?),
            host: host.to_vec(),
            broken: broken.iter().map(|&rank| u32::from_le_bytes(rank) as usize).collect(),
            memory: u64::from_le_bytes(memory.try_into().ok()?),
            name: text(name)?,
            tuning: text(tuning)?,
        })
    }
}

/// Whether a list can be that of a generation's members, as `rank` names it.
fn check(rank: usize, generation: u64, members: &[usize], options: &Options) -> Result<()> {
    let twice = members.iter().enumerate().find(|(index, member)| members[..*index].contains(member));
    let problem = if let Some((_, twice)) = twice {
        format!("rank {twice} is in the list of members twice")
    } else if !members.contains(&rank) {
        format!("rank {rank} is not in its own list of members, {members:?}")
    } else if members.iter().any(|&member| member >= World::MOST_RANKS) {
        format!("a rank of a job is less than {}", World::MOST_RANKS)
    } else if generation == 0 {
        "a job begins with generation 0; later ones have larger numbers".into()
    } else if options.transport == Some(TransportKind::Mpi) {
        "over MPI a job has one generation: an MPI library ends with its first lost process".into()
    } else {
        return Ok(());
    };
    Err(Error::Usage(format!("generation {generation}: {problem}")))
}

impl Job {
    /// This rank's part in a later generation, which has these members, ranks of the job. All of them call it with the same
    /// list. The earlier generations are over for it, also where this fails.
    pub(crate) fn begin(&self, generation: u64, members: &[usize], options: &Options) -> Result<Self> {
        check(self.rank, generation, members, options)?;
        if generation <= self.generation {
            let now = self.generation;
            return Err(Error::Usage(format!("generation {generation}: this group is of generation {now}")));
        }
        let timer = join_timer(options);
        match &*self.ways {
            Ways::Solo => {
                let solo = Self { generation, ..Self::solo() };
                self.health.end(None, &gone_on(generation));
                Ok(solo)
            }
            Ways::Threads { hub, .. } => {
                let health = hub.begin(self.rank, self.generation, generation, members, &timer)?;
                Ok(Self {
                    rank: self.rank,
                    size: members.len(),
                    generation,
                    health,
                    processes: None,
                    tuning: self.tuning.clone(),
                    name: self.name.clone(),
                    hosts: vec![vec![]; members.iter().max().map_or(0, |last| last + 1)],
                    ways: self.ways.clone(),
                    shared_memory: AtomicBool::new(true),
                })
            }
            Ways::Processes { .. } => {
                let Processes { store, memory } = self.processes()?;
                let store = store.begin(generation, members)?;
                let own = Own {
                    rank: self.rank,
                    host: self.hosts.get(self.rank).map_or(&[], Vec::as_slice),
                    before: Some(Before { name: &self.name, tuning: &self.tuning, memory }),
                    members,
                    timer,
                };
                meet(&self.ways, &store, &own)
            }
        }
    }

    /// As [`begin`](Self::begin), in a process that comes to a job that has begun.
    pub(crate) fn come(
        world: &World,
        options: &Options,
        generation: u64,
        members: &[usize],
        reached: Reached,
    ) -> Result<Self> {
        check(world.rank, generation, members, options)?;
        let Reached { store, server, security } = reached;
        store.keep_time(options.deadline);
        // It knows the others when it has met them.
        let connections = Connections::new(tcp::Settings {
            rank: world.rank,
            contacts: vec![],
            listening: Listening::new(store.local_ip()),
            security,
            health: store.health().clone(),
            streams: options.tcp_streams,
            join: options.join,
        });
        let ways = Arc::new(Ways::processes(connections, options, store.clone(), server));
        let store = store.begin(generation, members)?;
        let (rank, host, timer) = (world.rank, world.host.as_bytes(), join_timer(options));
        meet(&ways, &store, &Own { rank, host, before: None, members, timer })
    }
}

/// Waits for the other members; where that fails, all of them hear of it.
fn meet(ways: &Arc<Ways>, store: &Arc<StoreClient>, own: &Own<'_>) -> Result<Job> {
    let Ways::Processes { connections, server, .. } = &**ways else {
        return Err(Error::Internal("only processes meet at a store".into()));
    };
    let met = exchange(ways, connections, store, own);
    met.inspect_err(|error| {
        if !matches!(error, Error::Aborted { .. }) {
            tell(own.rank, store, server.as_ref(), &gave_up(own.rank, &error.to_string()));
        }
    })
}

fn exchange(
    ways: &Arc<Ways>,
    connections: &Arc<Connections>,
    store: &Arc<StoreClient>,
    own: &Own<'_>,
) -> Result<Job> {
    let (generation, health) = (store.generation(), store.health());
    let Own { before, members, timer, .. } = own;
    let index = members.iter().position(|&member| member == own.rank).unwrap_or(0);
    connections.begin(generation, health);
    let about = About {
        ip: store.local_ip().to_string(),
        contact: connections.own(),
        host: own.host.to_vec(),
        broken: connections.broken(),
        memory: before.as_ref().map(|before| before.memory.nonce()).unwrap_or_default(),
        name: before.as_ref().map(|before| before.name.to_string()).unwrap_or_default(),
        tuning: before.as_ref().map(|before| before.tuning.to_string()).unwrap_or_default(),
    };
    store.set(&format!("{MEMBERS}{index}"), &about.encode())?;
    let all = store.gather(MEMBERS, members, timer)?;
    let all: Option<Vec<About>> = all.iter().map(|bytes| About::decode(bytes)).collect();
    let all =
        all.ok_or_else(|| Error::Rendezvous("a member is of another version of this program".into()))?;
    let mut hosts = vec![vec![]; members.iter().max().map_or(0, |last| last + 1)];
    for (&rank, member) in members.iter().zip(&all) {
        hosts[rank].clone_from(&member.host);
        if rank != own.rank {
            let broken = about.broken.contains(&rank) || member.broken.contains(&own.rank);
            connections.renew(rank, member.contact, broken);
        }
    }
    // Those of this host keep the memory that they share where none of them is new.
    let here = |(_, member): &(usize, &About)| member.host == about.host;
    let here: Vec<(usize, &About)> = members.iter().copied().zip(&all).filter(here).collect();
    let keep = about.memory != 0 && here.iter().all(|(_, member)| member.memory == about.memory);
    let memory = match before.as_ref().filter(|_| keep) {
        Some(before) => before.memory.clone(),
        None => Arc::new(HostMemory::new(own.rank, here.iter().map(|(rank, _)| *rank).collect())),
    };
    let ips: Vec<_> =
        members.iter().zip(&all).map(|(&rank, member)| (rank, member.ip.parse().ok())).collect();
    store.learn_hosts(&ips);
    // Whoever dialled a rank before that has forgotten the old connection would be turned away.
    store.set(&format!("{READY}{index}"), b"")?;
    store.gather(READY, members, timer)?;
    // What the first says that has been in the job before holds for all.
    let lead = all.iter().find(|member| !member.name.is_empty());
    let (name, tuning) = match lead {
        Some(lead) => (lead.name.clone(), Table::parse(&lead.tuning)?),
        None => (format!("generation-{generation}"), Table::default()),
    };
    Ok(Job {
        rank: own.rank,
        size: members.len(),
        generation,
        health: health.clone(),
        processes: Some(Processes { store: store.clone(), memory }),
        tuning: Arc::new(tuning),
        name,
        hosts,
        ways: ways.clone(),
        shared_memory: AtomicBool::new(true),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_member_says_comes_back() {
        let contact = Contact::parse("127.0.0.1:5/0123456789abcdef0123456789abcdef");
        assert!(contact.is_some());
        let about = About {
            ip: "::1".into(),
            contact,
            host: b"h\xff".to_vec(),
            broken: vec![0, 70_000],
            memory: 1 << 63,
            name: "n".into(),
            tuning: "t\n".into(),
        };
        assert_eq!(About::decode(&about.encode()), Some(about));
        assert_eq!(About::decode(&About::default().encode()), Some(About::default()));
        assert_eq!(About::decode(b""), None);
    }

    #[test]
    fn a_list_that_no_generation_can_have_is_refused() {
        let options = Options::default();
        let problem = |rank, generation, members: &[usize]| {
            check(rank, generation, members, &options).unwrap_err().to_string()
        };
        assert!(problem(1, 2, &[0, 1, 0]).contains("rank 0 is in the list of members twice"));
        assert!(problem(1, 2, &[0, 2]).contains("rank 1 is not in its own list"));
        assert!(problem(0, 0, &[0]).contains("larger numbers"));
        assert!(problem(0, 1, &[0, usize::MAX]).contains("a rank of a job is less than"));
        check(7, 1, &[9, 7], &options).unwrap();
    }
}
