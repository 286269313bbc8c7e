//! `regatta bench tune`: measures which algorithm is the fastest for each operation, transport, number of ranks and
//! size, and writes the table by which groups choose.

use super::jobs::{self, Role};
use super::list::{Choice, bytes, choice, names};
use super::measure::{MemoryKind, Method, sample};
use super::op::Op;
use super::row::{Row, merge_rounds};
use crate::error::Result;
use crate::out::{self, say, show};
use clap::Args;
use regatta_comm::{Algorithm, DType, Group, Table, TransportKind, hostname};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

/// The variable that names the table by which groups choose.
const TUNING: &str = "REGATTA_TUNING";
const SECONDS_PER_DAY: u64 = 86_400;
/// Another algorithm gets a row only if it takes less than this share of the time: smaller differences are noise.
const CLEARLY_FASTER: f64 = 0.95;

#[derive(Args)]
pub struct TuneArgs {
    /// The operations, separated by commas, or `all`.
    #[arg(long, value_delimiter = ',', value_parser = choice::<Op>, default_value = "all")]
    op: Vec<Choice<Op>>,
    /// Numbers of ranks, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "2,4")]
    workers: Vec<usize>,
    /// `shm`, `tcp` or `mpi`, separated by commas. Threads use the rows of shm.
    #[arg(long, value_delimiter = ',', default_value = "shm,tcp")]
    transport: Vec<TransportKind>,
    /// Bytes of data on the larger side of each rank, separated by commas; K, M and G multiply by 1024.
    #[arg(long, value_delimiter = ',', value_parser = bytes, default_value = "1K,4K,16K,64K,256K,1M,4M,16M")]
    sizes: Vec<usize>,
    /// How often each algorithm is measured, in turn with the others; the medians count.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The file to write; default: the file that REGATTA_TUNING names, or tuning.txt.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub fn run(args: &TuneArgs) -> Result<ExitCode> {
    match jobs::role()? {
        Role::Starter => starter(args),
        Role::Ours(world) => {
            jobs::rank(&world, &|group| measure(args, group))?;
            Ok(ExitCode::SUCCESS)
        }
        Role::Foreign(_) => {
            Err("`regatta bench tune` starts its own ranks: run it without a launcher".into())
        }
    }
}

fn starter(args: &TuneArgs) -> Result<ExitCode> {
    if let Some(transport) = args
        .transport
        .iter()
        .find(|kind| !matches!(kind, TransportKind::Shm | TransportKind::Tcp | TransportKind::Mpi))
    {
        return Err(format!("the tuning table has no rows for {transport}: use shm, tcp or mpi").into());
    }
    if args.workers.iter().any(|&workers| workers < 2) {
        return Err("a single rank does not communicate: give 2 or more --workers".into());
    }
    let variable = std::env::var_os(TUNING).filter(|path| !path.is_empty()).map(PathBuf::from);
    let out = args.out.clone().or_else(|| variable.clone()).unwrap_or_else(|| "tuning.txt".into());
    // Before minutes of measurement, to find errors early. Jobs read the file that the variable names when they start.
    for path in [Some(&out), variable.as_ref()].into_iter().flatten().filter(|path| !path.exists()) {
        write(path, &format!("# The built-in table: nothing has been measured yet.\n{}", Table::default()))?;
    }
    let mut rows = vec![];
    for &transport in &args.transport {
        for &workers in &args.workers {
            say!("{workers} ranks over {transport}");
            rows.extend(jobs::start(Some(transport), workers, &[], &|group| measure(args, group))?);
        }
    }
    let text = table(&rows, &hostname(), crate::cores::available());
    Table::parse(&text)?;
    write(&out, &text)?;
    out::write(format_args!("{text}"));
    show!("Written to {0}. Use it with {TUNING}={0}; all ranks use the table of rank 0.", out.display());
    Ok(ExitCode::SUCCESS)
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(|error| format!("cannot write {}: {error}", path.display()).into())
}

/// Measures on one rank, with every possible algorithm in turn.
fn measure(args: &TuneArgs, group: &Group) -> Result<Vec<Row>> {
    let dtype = DType::F32;
    // An operation takes until the last rank is done.
    let method = Method { dtype, memory: MemoryKind::Private, together: true };
    let link = group.transport();
    let mut groups: Vec<(Algorithm, Group)> = vec![];
    for &algorithm in Algorithm::ALL {
        if Op::ALL.iter().any(|op| algorithm.works_over(link, op.kind())) {
            groups.push((algorithm, group.with_algorithm(Some(algorithm))?));
        }
    }
    let mut rounds = vec![];
    for op in names(&args.op).unwrap_or(Op::ALL.to_vec()) {
        let possible: Vec<_> =
            groups.iter().filter(|(algorithm, _)| algorithm.works_over(link, op.kind())).collect();
        if possible.len() < 2 {
            continue;
        }
        let no_data = [0];
        let sizes = if op == Op::Barrier { &no_data[..] } else { &args.sizes };
        for &bytes in sizes {
            for _ in 0..args.rounds {
                for (algorithm, group) in &possible {
                    let sample = sample(method, op, group, bytes / dtype.bytes() * dtype.bytes())?;
                    let row = Row::new(group, (op, Some(*algorithm)), (dtype, method.memory), &sample, None);
                    if row.errors > 0 {
                        return Err(format!(
                            "{} wrong numbers in {op} of {bytes} bytes ({})",
                            row.errors,
                            row.line()
                        )
                        .into());
                    }
                    rounds.push(vec![row]);
                }
            }
        }
    }
    Ok(merge_rounds(&rounds))
}

/// The table as text: rows for what was measured, and the built-in rows for the rest.
fn table(rows: &[Row], host: &str, cores: usize) -> String {
    let mut text = format!(
        "# Measured by `regatta bench tune` on {host} ({cores} cores), {}.\n# operation link ranks bytes algorithm\n",
        today()
    );
    let mut done: Vec<(Op, &str, usize)> = vec![];
    for row in rows {
        let key = (row.op, row.transport.as_str(), row.world);
        if done.contains(&key) {
            continue;
        }
        done.push(key);
        let of_key = |row: &&Row| (row.op, row.transport.as_str(), row.world) == key;
        let times: Vec<(usize, &str, f64)> = rows
            .iter()
            .filter(of_key)
            .map(|row| (row.bytes, row.algorithm.as_str(), row.slowest_us))
            .collect();
        for (most, algorithm) in merge(&times) {
            let most = most.map_or("-".into(), |bytes| bytes.to_string());
            text.push_str(&format!("{} {} {} {most} {algorithm}\n", row.op, row.transport, row.world));
        }
    }
    let built_in = Table::default().to_string();
    let measured = |line: &&str| {
        let mut words = line.split(' ');
        let (op, link) = (words.next(), words.next());
        done.iter().any(|key| Some(key.0.name()) == op && Some(key.1) == link)
    };
    for line in built_in.lines().filter(|line| !measured(line)) {
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// Makes rows of times (bytes, algorithm, microseconds): up to how many bytes which algorithm is the fastest; `None`
/// stands for no limit. An algorithm replaces that of the next smaller size only if it is clearly faster.
fn merge<'a>(times: &[(usize, &'a str, f64)]) -> Vec<(Option<usize>, &'a str)> {
    let mut sizes: Vec<usize> = times.iter().map(|time| time.0).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let mut rows: Vec<(Option<usize>, &str)> = vec![];
    let mut below = 0;
    for bytes in sizes {
        let of_size = || times.iter().filter(|time| time.0 == bytes);
        let Some(best) = of_size().min_by(|a, b| a.2.total_cmp(&b.2)) else { continue };
        match rows.last_mut() {
            None => rows.push((None, best.1)),
            Some((most, current)) => {
                let now = of_size().find(|time| time.1 == *current).map_or(f64::INFINITY, |time| time.2);
                if best.2 < CLEARLY_FASTER * now {
                    // Sizes between the two were not measured: change half-way on a logarithmic scale.
                    *most = Some((below as f64 * bytes as f64).sqrt() as usize);
                    rows.push((None, best.1));
                }
            }
        }
        below = bytes;
    }
    rows
}

/// Today's date in UTC (Hinnant, "chrono-compatible low-level date algorithms", civil_from_days).
fn today() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    date((since.as_secs() / SECONDS_PER_DAY) as i64)
}

fn date(days_since_1970: i64) -> String {
    let days = days_since_1970 + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year + 400 * era + i64::from(month <= 2);
    format!("{year}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::super::row::tests::row;
    use super::*;

    #[test]
    fn adjacent_sizes_become_rows() {
        let sizes = [1 << 10, 1 << 12, 1 << 14, 1 << 16];
        let times = |doubling: [f64; 4], ring: [f64; 4]| {
            let of =
                |name, list: [f64; 4]| sizes.into_iter().zip(list).map(move |(bytes, us)| (bytes, name, us));
            of("doubling", doubling).chain(of("ring", ring)).collect::<Vec<_>>()
        };
        let merged = merge(&times([1.0, 2.0, 9.0, 40.0], [3.0, 4.0, 5.0, 10.0]));
        assert_eq!(merged, [(Some(1 << 13), "doubling"), (None, "ring")]);
        // 4 % is noise, 6 % is not.
        assert_eq!(merge(&times([1.0, 1.0, 1.0, 1.0], [2.0, 0.96, 0.96, 0.96])), [(None, "doubling")]);
        let merged = merge(&times([1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 0.94]));
        assert_eq!(merged, [(Some(1 << 15), "doubling"), (None, "ring")]);
        // Noise at one size does not change what follows it.
        let merged = merge(&times([1.0, 1.0, 1.0, 1.0], [2.0, 0.5, 2.0, 2.0]));
        assert_eq!(merged, [(Some(1 << 11), "doubling"), (Some(1 << 13), "ring"), (None, "doubling")]);
        assert_eq!(merge(&[]), []);
        assert_eq!(merge(&[(0, "direct", 2.0), (0, "dissemination", 1.0)]), [(None, "dissemination")]);
    }

    #[test]
    fn the_table_is_read_again() {
        let rows = [
            row(Op::AllReduce, "ring", 1 << 10, 9.0),
            row(Op::AllReduce, "tree", 1 << 10, 5.0),
            row(Op::AllReduce, "ring", 1 << 12, 10.0),
            row(Op::AllReduce, "tree", 1 << 12, 20.0),
            row(Op::Barrier, "direct", 0, 1.0),
        ];
        let text = table(&rows, "here", 2);
        assert!(text.starts_with("# Measured by `regatta bench tune` on here (2 cores), 2"), "{text}");
        let expected = "all_reduce shm 4 2048 tree\nall_reduce shm 4 - ring\nbarrier shm 4 - direct\n";
        assert!(text.contains(expected), "{text}");
        // Built-in rows for transports that were not measured stay.
        assert!(text.contains("all_reduce mixed 4 - hierarchical"), "{text}");
        Table::parse(&text).unwrap();
    }

    #[test]
    fn days_become_dates() {
        assert_eq!(
            [date(0), date(59), date(11_016), date(20_777)],
            ["1970-01-01", "1970-03-01", "2000-02-29", "2026-11-20"]
        );
    }
}
