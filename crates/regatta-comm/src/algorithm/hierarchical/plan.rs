//! Which rank carries which numbers between hosts, and in which pieces.

use crate::algorithm::direct::{Move, Spans};
use crate::algorithm::parts::Parts;
use crate::algorithm::schedule::part;
use crate::member::context::Context;
use std::ops::Range;

/// Bytes of a piece, over all ranks of a host, with few hosts: a piece has a strip for each host.
const PIECE: usize = 4 << 20;
/// Least bytes of a strip.
const STRIP: usize = 256 << 10;

/// Each host has as many couriers as the smallest one has ranks. Of the numbers that belong to a host each of its couriers
/// has a shard, which all hosts' couriers in the same place exchange.
pub(super) struct Plan {
    /// By host, and by place in the host.
    shards: Vec<Vec<Spans>>,
    /// Every rank of this host has its own part as a shard.
    pub owned: bool,
    pub pieces: usize,
    /// This rank's host, and its place there.
    pub host: usize,
    pub place: usize,
    /// Ranks of this host.
    pub here: usize,
    /// Where the parts of this host's ranks begin and end, one after the other.
    parts: Vec<Range<usize>>,
}

impl Plan {
    fn new(context: &Context, shards: Vec<Vec<Spans>>, pieces: usize) -> Self {
        let at = |host: &Vec<usize>| host.iter().position(|&rank| rank == context.rank);
        let own =
            context.hosts.iter().enumerate().find_map(|(index, host)| Some((index, at(host)?, host.len())));
        let (host, place, here) = own.unwrap_or_default();
        Self { shards, owned: false, pieces, host, place, here, parts: vec![] }
    }

    /// Of `len` numbers that belong to all hosts. A host's are a segment of each courier's shard, as in a ring.
    pub(super) fn whole(context: &Context, len: usize, pieces: impl FnOnce(usize) -> usize) -> Self {
        let (hosts, count) = (context.hosts.len(), couriers(context));
        let segment = |host, place| {
            let shard = part(len, count, place);
            let segment = part(shard.len(), hosts, host);
            Spans::of(shard.start + segment.start..shard.start + segment.end)
        };
        let of_host = |host| (0..count).map(|place| segment(host, place)).collect();
        Self::new(context, (0..hosts).map(of_host).collect(), pieces(count))
    }

    /// Of `parts` that belong to the ranks. Where hosts have equally many ranks and these have about as much each, a rank
    /// carries its own part; else the couriers of a host share what it has, and its ranks have to exchange it.
    pub(super) fn parted(context: &Context, parts: &Parts, width: usize) -> Self {
        let (hosts, count) = (&context.hosts, couriers(context));
        let total = parts.total();
        let alike = parts.longest() * context.size <= total + total / 4;
        let owned = alike && hosts.iter().all(|host| host.len() == count);
        let of_host = |host: &Vec<usize>| {
            let all = Spans::from_iter(host.iter().map(|&rank| parts.get(rank)));
            let shard = |place: usize| match owned {
                true => Spans::of(parts.get(host[place])),
                false => all.cut(part(all.len(), count, place)),
            };
            (0..count).map(shard).collect()
        };
        let plan =
            Self::new(context, hosts.iter().map(of_host).collect(), pieces(hosts.len(), total * width));
        let mut end = 0;
        let next = |&rank: &usize| {
            end += parts.get(rank).len();
            end - parts.get(rank).len()..end
        };
        let parts = context.host_of(context.rank).iter().map(next).collect();
        Self { owned, parts, ..plan }
    }

    /// The couriers in this rank's place; none where it is no courier.
    pub(super) fn ranks(&self, context: &Context) -> Vec<usize> {
        match self.place < self.shards[0].len() {
            true => context.hosts.iter().map(|host| host[self.place]).collect(),
            false => vec![],
        }
    }

    /// A piece of the shard that the courier in `place` of `host` has.
    pub(super) fn strip(&self, host: usize, place: usize, index: usize) -> Spans {
        let Some(shard) = self.shards[host].get(place) else { return Spans::default() };
        if self.pieces == 1 { shard.clone() } else { shard.cut(part(shard.len(), self.pieces, index)) }
    }

    /// Piece `index` of what each courier of this host exchanges: a strip for each host, by which pieces change nothing in
    /// the order in which a ring combines.
    pub(super) fn piece(&self, index: usize) -> Vec<Spans> {
        let of_place = |place| {
            let strips = (0..self.shards.len()).map(|host| self.strip(host, place, index));
            strips.fold(Spans::default(), |all, strip| all.then(&strip))
        };
        (0..self.here).map(of_place).collect()
    }

    /// Hosts.
    pub(super) fn hosts(&self) -> usize {
        self.shards.len()
    }

    /// Where the hosts' strips lie in this rank's piece `index`.
    pub(super) fn segments(&self, index: usize) -> Parts {
        let len = |host| self.strip(host, self.place, index).len();
        Parts::of(&(0..self.shards.len()).map(len).collect::<Vec<_>>())
    }

    /// This host's segment, and what it has there.
    pub(super) fn own(&self, index: usize) -> (Range<usize>, Spans) {
        (self.segments(index).get(self.host), self.strip(self.host, self.place, index))
    }

    /// Numbers of this rank's shard of its host's.
    pub(super) fn shard(&self) -> usize {
        self.shards[self.host].get(self.place).map_or(0, Spans::len)
    }

    /// Numbers of all shards in this rank's place.
    pub(super) fn carried(&self) -> usize {
        self.shards.iter().filter_map(|shards| shards.get(self.place)).map(Spans::len).sum()
    }

    /// Where the shards of this host's couriers begin and end.
    fn shares(&self) -> impl Iterator<Item = Range<usize>> {
        let (count, total) = (self.shards[self.host].len(), self.parts.last().map_or(0, |part| part.end));
        let share = move |place| if place < count { part(total, count, place) } else { total..total };
        (0..self.here).map(share)
    }

    /// The longest shard of a courier of this host.
    pub(super) fn longest(&self) -> usize {
        self.shards[self.host].iter().map(Spans::len).max().unwrap_or(0)
    }

    /// What this courier needs of the part that each rank of its host has: `parts` of the whole.
    pub(super) fn collected(&self, starts: impl Iterator<Item = usize>) -> Vec<Vec<Move>> {
        let Some(share) = self.shares().nth(self.place) else { return vec![] };
        let needed = |(own, start): (&Range<usize>, usize)| {
            moves(own, &share, |found| start + found.start - own.start)
        };
        self.parts.iter().zip(starts).map(needed).collect()
    }

    /// What this rank needs of the shard that each courier of its host has.
    pub(super) fn delivered(&self) -> Vec<Vec<Move>> {
        let own = &self.parts[self.place];
        self.shares().map(|share| moves(&share, own, |found| found.start - own.start)).collect()
    }
}

/// What who needs `wanted` gets from who has `has`.
fn moves(has: &Range<usize>, wanted: &Range<usize>, to: impl Fn(&Range<usize>) -> usize) -> Vec<Move> {
    let found = has.start.max(wanted.start)..has.end.min(wanted.end);
    if found.is_empty() {
        return vec![];
    }
    let to = to(&found);
    vec![Move { from: found.start - has.start, to: to..to + found.len() }]
}

/// Couriers of each host.
fn couriers(context: &Context) -> usize {
    context.hosts.iter().map(Vec::len).min().unwrap_or(1)
}

/// In how many pieces so many bytes go.
pub(super) fn pieces(hosts: usize, bytes: usize) -> usize {
    bytes.div_ceil(PIECE.max(hosts * STRIP)).max(1)
}
