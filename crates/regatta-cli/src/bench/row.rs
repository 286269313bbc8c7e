//! A measurement as a row of a table or a line of JSON.

use super::measure::{MemoryKind, Sample, median};
use super::op::Op;
use regatta_comm::{Algorithm, DType, Group};
use serde::{Deserialize, Serialize};

/// One operation at one size. Times are medians over the rounds, except for the minimum.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub op: Op,
    pub transport: String,
    /// `-` if there is no choice.
    pub algorithm: String,
    /// Whether the user chose the algorithm, and not the tuning table.
    pub asked: bool,
    pub memory: MemoryKind,
    pub dtype: String,
    pub world: usize,
    /// Bytes of the larger side of a rank.
    pub bytes: usize,
    pub elements: usize,
    /// On rank 0.
    pub median_us: f64,
    /// On rank 0.
    pub min_us: f64,
    /// Median on the slowest rank.
    pub slowest_us: f64,
    pub algbw_gbs: f64,
    pub busbw_gbs: f64,
    /// The time that the memory's bandwidth allows.
    pub bound_us: Option<f64>,
    /// That time divided by the median: 1 is the optimum.
    pub of_bound: Option<f64>,
    /// Wrong numbers in the results of all ranks.
    pub errors: u64,
}

impl Row {
    /// The row of a sample; `bound` is the time that the memory's bandwidth allows, in seconds.
    pub fn new(
        group: &Group,
        (op, asked): (Op, Option<Algorithm>),
        (dtype, memory): (DType, MemoryKind),
        sample: &Sample,
        bound: Option<f64>,
    ) -> Self {
        let bytes = sample.elements * dtype.bytes();
        let algorithm = match op {
            Op::SendRecv => "-".to_string(),
            _ => group.algorithm(op.kind(), bytes).to_string(),
        };
        let mut row = Self {
            op,
            transport: group.transport().to_string(),
            algorithm,
            asked: asked.is_some(),
            memory,
            dtype: dtype.to_string(),
            world: group.size(),
            bytes,
            elements: sample.elements,
            median_us: sample.median * 1e6,
            min_us: sample.minimum * 1e6,
            slowest_us: sample.slowest * 1e6,
            algbw_gbs: 0.0,
            busbw_gbs: 0.0,
            bound_us: bound.map(|seconds| seconds * 1e6),
            of_bound: None,
            errors: sample.errors,
        };
        row.derive();
        row
    }

    /// Sets the values that follow from the times.
    fn derive(&mut self) {
        // A clock that did not move between two readings gives no bandwidth.
        let per_us = if self.median_us > 0.0 { self.bytes as f64 / self.median_us } else { 0.0 };
        self.algbw_gbs = per_us / 1e3;
        self.busbw_gbs = self.algbw_gbs * self.op.bus_factor(self.world);
        self.of_bound = self.bound_us.filter(|_| self.median_us > 0.0).map(|bound| bound / self.median_us);
    }

    /// The values that identify a row in every round.
    fn key(&self) -> (Op, &str, &str, bool, usize, usize) {
        (self.op, &self.transport, &self.algorithm, self.asked, self.world, self.bytes)
    }

    /// The algorithm as the user chose it.
    pub fn by(&self) -> &str {
        if self.asked || self.op == Op::SendRecv { &self.algorithm } else { "as tuned" }
    }

    /// The name of the series to which this row belongs: it has a row for each size.
    pub fn line(&self) -> String {
        let by = if self.by() == "-" { "one way" } else { self.by() };
        format!("{by}, {}, {} ranks", self.transport, self.world)
    }

    /// The heading over rows.
    pub fn heading() -> String {
        format!(
            "{:>12} {:>12} {:>5} {:>14} {:>16} {:>12} {:>12} {:>10} {:>10} {:>8} {:>7}",
            "bytes",
            "elements",
            "type",
            "op",
            "algorithm",
            "median us",
            "minimum us",
            "algbw GB/s",
            "busbw GB/s",
            "of bound",
            "errors"
        )
    }

    /// The transport, ranks and memory that the row was measured with.
    pub fn place(&self) -> String {
        let memory = if self.memory == MemoryKind::Private { "private" } else { "registered" };
        format!("# {}, {} ranks, {memory} memory", self.transport, self.world)
    }

    /// The row as text below [`heading`](Self::heading).
    pub fn cells(&self) -> String {
        let share = self.of_bound.map_or(String::new(), |share| format!("{:.0} %", 100.0 * share));
        format!(
            "{:>12} {:>12} {:>5} {:>14} {:>16} {:>12.2} {:>12.2} {:>10.3} {:>10.3} {share:>8} {:>7}",
            self.bytes,
            self.elements,
            self.dtype,
            self.op.name(),
            self.algorithm,
            self.median_us,
            self.min_us,
            self.algbw_gbs,
            self.busbw_gbs,
            self.errors
        )
    }
}

/// Merges equal rows of all rounds into one, in the order of the first round.
pub fn merge_rounds(rounds: &[Vec<Row>]) -> Vec<Row> {
    let mut merged: Vec<Vec<&Row>> = vec![];
    for row in rounds.iter().flatten() {
        match merged.iter_mut().find(|rows| rows[0].key() == row.key()) {
            Some(rows) => rows.push(row),
            None => merged.push(vec![row]),
        }
    }
    let merge = |rows: Vec<&Row>| {
        let middle = |of: fn(&Row) -> f64| median(&mut rows.iter().map(|row| of(row)).collect::<Vec<_>>());
        let mut bounds: Vec<f64> = rows.iter().filter_map(|row| row.bound_us).collect();
        let mut row = Row {
            median_us: middle(|row| row.median_us),
            min_us: rows.iter().map(|row| row.min_us).fold(f64::INFINITY, f64::min),
            slowest_us: middle(|row| row.slowest_us),
            bound_us: (!bounds.is_empty()).then(|| median(&mut bounds)),
            errors: rows.iter().map(|row| row.errors).sum(),
            ..rows[0].clone()
        };
        row.derive();
        row
    };
    merged.into_iter().map(merge).collect()
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A row for tests.
    pub fn row(op: Op, algorithm: &str, bytes: usize, us: f64) -> Row {
        let mut row = Row {
            op,
            transport: "shm".into(),
            algorithm: algorithm.into(),
            asked: true,
            memory: MemoryKind::Private,
            dtype: "f32".into(),
            world: 4,
            bytes,
            elements: bytes / 4,
            median_us: us,
            min_us: us,
            slowest_us: us,
            algbw_gbs: 0.0,
            busbw_gbs: 0.0,
            bound_us: None,
            of_bound: None,
            errors: 0,
        };
        row.derive();
        row
    }

    #[test]
    fn rounds_become_medians() {
        let round = |us: f64| {
            let all_reduce = Row { bound_us: Some(5.0), errors: 1, ..row(Op::AllReduce, "ring", 4000, us) };
            vec![all_reduce, row(Op::Barrier, "dissemination", 0, us)]
        };
        let merged = merge_rounds(&[round(30.0), round(10.0), round(20.0)]);
        assert_eq!(merged.len(), 2);
        let first = &merged[0];
        assert_eq!((first.median_us, first.min_us, first.errors), (20.0, 10.0, 3));
        assert_eq!((first.bound_us, first.of_bound), (Some(5.0), Some(0.25)));
        assert!((first.algbw_gbs - 0.2).abs() < 1e-12 && (first.busbw_gbs - 0.3).abs() < 1e-12);
        assert_eq!((merged[1].op, merged[1].busbw_gbs), (Op::Barrier, 0.0));
        assert_eq!(first.cells().len(), Row::heading().len());
    }
}
