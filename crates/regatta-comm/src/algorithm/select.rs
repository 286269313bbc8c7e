//! Which algorithm carries out an operation: by operation, link, number of ranks and size, from a table.
//!
//! The table that ships was measured; `regatta bench tune` measures another on the machine at hand. A line is
//! `operation link ranks bytes algorithm`: up to so many bytes of data (`-`: any number), use this. The lines of the
//! number of ranks that is nearest (as a ratio) count, in their order. A line with `halving_doubling` for any number of
//! bytes holds for other numbers of ranks than its own only where they are powers of two: elsewhere some ranks send up to
//! twice the bytes. `#` begins a comment.

use super::Algorithm;
use super::backend::{Offer, Wanted};
use crate::error::{Error, Result};
use crate::member::call::Kind;
use crate::transport::TransportKind;
use std::fmt;

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
        let kind = wanted.kind;
        // Memory that threads or processes share is the same to an algorithm.
        let link = if wanted.link == TransportKind::Thread { TransportKind::Shm } else { wanted.link };
        let rows = || self.rows.iter().filter(|row| row.kind == kind && row.link == link);
        let distance = |row: &Row| {
            let (low, high) = (row.ranks.min(ranks).max(1), row.ranks.max(ranks));
            (high as u64).saturating_mul(1 << 16) / low as u64
        };
        let nearest = rows().map(distance).min();
        let fits = |row: &&Row| {
            Some(distance(row)) == nearest
                && row.bytes.is_none_or(|most| bytes <= most)
                && (row.ranks == ranks || ranks.is_power_of_two() || !row.wants_powers_of_two())
        };
        let row = rows().find(fits).map(|row| row.algorithm);
        row.filter(|algorithm| algorithm.suits(wanted)).or_else(|| fallback(wanted))
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
        assert_eq!([choose(12, 4), choose(100, 4), choose(1 << 62, 4)], [Algorithm::Tree; 3]);
        let table = Table::parse("all_reduce tcp 6 - halving_doubling\nall_reduce tcp 6 - tree\n").unwrap();
        let choose = |ranks| table.choose(&wanted, ranks, 1 << 30).unwrap();
        assert_eq!([4, 6, 8].map(choose), [Algorithm::HalvingDoubling; 3]);
        assert_eq!([3, 5, 7].map(choose), [Algorithm::Tree; 3]);
        for bad in
            ["all_reduce tcp 2 ring", "fly tcp 2 - ring", "barrier tcp 2 - ring", "all_reduce tcp x - ring"]
        {
            assert!(Table::parse(bad).unwrap_err().to_string().contains("line 1"), "{bad}");
        }
    }
}
