//! Which algorithm carries out an operation: by operation, link, number of ranks and size, from a table.
//!
//! The table that ships was measured; `regatta bench tune` measures another on the machine at hand. A line is
//! `operation link ranks bytes algorithm`: up to so many bytes of data (`-`: any number), use this. The lines of the
//! number of ranks that is nearest (as a ratio) count, in their order; far from all lines the algorithms'
//! [costs](super::costs) count. A line with `halving_doubling` for any number of
//! bytes holds for other numbers of ranks than its own only where they are powers of two: elsewhere some ranks send up to
//! twice the bytes. `#` begins a comment.

use super::Algorithm;
use super::backend::{Offer, Wanted};
use super::costs;
use crate::error::{Error, Result};
use crate::member::call::Kind;
use crate::transport::TransportKind;
use std::fmt;

/// Most ranks for which the nearest line counts, however far it is.
const NEAR: usize = 64;

const DEFAULT: &str = include_str!("default.tuning");

#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    kind: Kind,
    link: TransportKind,
    ranks: usize,
    bytes: Option<usize>,
    algorithm: Algorithm,
}

/// Which algorithm is used where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    rows: Vec<Row>,
}

impl Default for Table {
    /// The table that ships.
    fn default() -> Self {
        Self::parse(DEFAULT).unwrap_or(Self { rows: vec![] })
    }
}

impl Table {
    /// Reads a table.
    ///
    /// # Errors
    /// A line that is none, with its number.
    pub fn parse(text: &str) -> Result<Self> {
        let mut rows = vec![];
        for (number, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default();
            let words: Vec<&str> = line.split_whitespace().collect();
            if !words.is_empty() {
                rows.push(Row::parse(&words).map_err(|problem| {
                    Error::Usage(format!("line {} of the tuning table: {problem}", number + 1))
                })?);
            }
        }
        Ok(Self { rows })
    }

    /// Whether it says anything about `link`.
    pub(crate) fn covers(&self, link: TransportKind) -> bool {
        self.rows.iter().any(|row| row.link == link)
    }

    /// The algorithm for what is wanted, with `bytes` of data on each rank; none where nothing can carry it out.
    pub(crate) fn choose(&self, wanted: &Wanted, ranks: usize, bytes: usize) -> Option<Algorithm> {
        let line = self.line(wanted, ranks, bytes).or_else(|| fallback(wanted))?;
        match self.reaches(wanted, ranks) {
            true => Some(line),
            false => Some(costs::cheapest(line, wanted, ranks, bytes)),
        }
    }

    /// The rows for what is wanted.
    fn rows(&self, wanted: &Wanted) -> impl Iterator<Item = &Row> {
        let kind = wanted.kind;
        // Memory that threads or processes share is the same to an algorithm.
        let link = if wanted.link == TransportKind::Thread { TransportKind::Shm } else { wanted.link };
        self.rows.iter().filter(move |row| row.kind == kind && row.link == link)
    }

    /// Whether so many ranks are at most half as many again as in some row, and no less than two thirds of another's.
    fn reaches(&self, wanted: &Wanted, ranks: usize) -> bool {
        let (mut least, mut most) = (0, 0);
        for row in self.rows(wanted) {
            (least, most) = (if most == 0 { row.ranks } else { row.ranks.min(least) }, row.ranks.max(most));
        }
        ranks <= NEAR.max(most.saturating_add(most / 2)) && least <= ranks.saturating_add(ranks / 2)
    }

    /// The algorithm of the line that counts.
    fn line(&self, wanted: &Wanted, ranks: usize, bytes: usize) -> Option<Algorithm> {
        let distance = |row: &Row| {
            let (low, high) = (row.ranks.min(ranks).max(1), row.ranks.max(ranks));
            (high as u64).saturating_mul(1 << 16) / low as u64
        };
        let nearest = self.rows(wanted).map(distance).min();
        let fits = |row: &&Row| {
            Some(distance(row)) == nearest
                && row.bytes.is_none_or(|most| bytes <= most)
                && (row.ranks == ranks || ranks.is_power_of_two() || !row.wants_powers_of_two())
        };
        let row = self.rows(wanted).find(fits).map(|row| row.algorithm);
        row.filter(|algorithm| algorithm.suits(wanted))
    }
}

impl fmt::Display for Table {
    /// As it is read.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Row { kind, link, ranks, bytes, algorithm } in &self.rows {
            let bytes = bytes.map_or("-".into(), |bytes| bytes.to_string());
            writeln!(f, "{} {link} {ranks} {bytes} {algorithm}", kind.name())?;
        }
        Ok(())
    }
}

impl Row {
    /// Whether it costs too much where ranks have to fold before the algorithm begins.
    fn wants_powers_of_two(&self) -> bool {
        self.algorithm == Algorithm::HalvingDoubling && self.bytes.is_none()
    }

    fn parse(words: &[&str]) -> Result<Self, String> {
        let [kind, link, ranks, bytes, algorithm] = *words else {
            return Err("it is not `operation link ranks bytes algorithm`".into());
        };
        let found = Kind::ALL.iter().copied().find(|known| known.name() == kind);
        let kind = found.ok_or_else(|| format!("unknown operation `{kind}`"))?;
        let number = |text: &str| text.parse::<usize>().map_err(|_| format!("`{text}` is no number"));
        let algorithm: Algorithm = algorithm.parse().map_err(|error: Error| error.to_string())?;
        if !algorithm.offers(kind) {
            return Err(format!("{algorithm} does not offer {}", kind.name()));
        }
        Ok(Self {
            kind,
            link: link.parse().map_err(|error: Error| error.to_string())?,
            ranks: number(ranks)?,
            bytes: if bytes == "-" { None } else { Some(number(bytes)?) },
            algorithm,
        })
    }
}

/// The algorithm that suits what is wanted best, where nobody says which; none where nothing can carry it out.
pub(crate) fn fallback(wanted: &Wanted) -> Option<Algorithm> {
    let mut best = (Offer::No, None);
    for &algorithm in Algorithm::ALL {
        let offer = algorithm.offer(wanted);
        if offer > best.0 {
            best = (offer, Some(algorithm));
        }
        if offer == Offer::Best {
            break;
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_that_ships_is_sound() {
        let table = Table::parse(DEFAULT).unwrap();
        assert!(!table.rows.is_empty());
        assert_eq!(Table::parse(&table.to_string()), Ok(table));
        for &kind in Kind::ALL.iter().filter(|kind| !matches!(kind, Kind::Send | Kind::Join)) {
            for &link in TransportKind::ALL {
                for ranks in [2, 3, 7, 1000] {
                    for bytes in [0, 1 << 14, 1 << 30] {
                        let wanted = Wanted::plain(kind, link);
                        let chosen = Table::default().choose(&wanted, ranks, bytes).unwrap();
                        assert!(chosen.suits(&wanted), "{kind:?} {link} {ranks} {chosen}");
                    }
                }
            }
        }
    }

    #[test]
    fn up_to_64_ranks_the_lines_of_the_table_that_ships_count() {
        let table = Table::default();
        for &kind in Kind::ALL {
            let wanted = Wanted::plain(kind, TransportKind::Tcp);
            for ranks in 3..=64 {
                for bytes in (0..34).flat_map(|bits| [1 << bits, 3 << bits]) {
                    let line = table.line(&wanted, ranks, bytes).or_else(|| fallback(&wanted));
                    assert_eq!(table.choose(&wanted, ranks, bytes), line, "{kind:?} {ranks} {bytes}");
                }
            }
            // Two ranks have lines of their own for all_reduce only; reductions of two have one order.
            let choose = |bytes| table.choose(&wanted, 2, bytes);
            let moved = (0..34).filter(|bits| {
                choose(1 << bits) != table.line(&wanted, 2, 1 << bits).or_else(|| fallback(&wanted))
            });
            assert!(moved.count() == 0 || kind == Kind::AllToAll, "{kind:?}");
        }
    }

    #[test]
    fn the_nearest_number_of_ranks_counts() {
        let table = Table::parse(
            "all_reduce tcp 2 100 doubling # a comment\n\nall_reduce tcp 2 - ring\nall_reduce tcp 16 - tree\n",
        );
        let table = table.unwrap();
        let wanted = Wanted::plain(Kind::AllReduce, TransportKind::Tcp);
        let choose = |ranks, bytes| table.choose(&wanted, ranks, bytes).unwrap();
        assert_eq!(
            [choose(2, 100), choose(2, 101), choose(3, 4)],
            [Algorithm::Doubling, Algorithm::Ring, Algorithm::Doubling]
        );
        assert_eq!([choose(12, 4), choose(64, 4)], [Algorithm::Tree; 2]);
        // Far from all lines costs count.
        assert_eq!([choose(65, 4), choose(1 << 62, 4)], [Algorithm::Doubling; 2]);
        let table = Table::parse("all_reduce tcp 6 - halving_doubling\nall_reduce tcp 6 - tree\n").unwrap();
        let choose = |ranks| table.choose(&wanted, ranks, 1 << 30).unwrap();
        assert_eq!([4, 6, 8].map(choose), [Algorithm::HalvingDoubling; 3]);
        assert_eq!([5, 7].map(choose), [Algorithm::Tree; 2]);
        // Nor does a line for twice as many count.
        assert_eq!(choose(3), Algorithm::Ring);
        for bad in
            ["all_reduce tcp 2 ring", "fly tcp 2 - ring", "barrier tcp 2 - ring", "all_reduce tcp x - ring"]
        {
            assert!(Table::parse(bad).unwrap_err().to_string().contains("line 1"), "{bad}");
        }
    }
}
