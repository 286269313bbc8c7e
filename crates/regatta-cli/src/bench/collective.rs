//! `regatta bench collective`: times operations, algorithms, transports and sizes, and checks the results.

use super::jobs::{self, Role};
use super::list::{Choice, bytes, check_sizes, choice, names};
use super::measure::{MemoryKind, Method, memory_bound, sample};
use super::op::Op;
use super::plot;
use super::row::{Row, merge_rounds};
use crate::error::Result;
use crate::out::{self, say, show};
use clap::Args;
use regatta_comm::{Algorithm, DType, Group, Options, TransportKind};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Args)]
pub struct CollectiveArgs {
    /// The operations, separated by commas, or `all`: all_reduce, reduce, reduce_scatter, all_gather, gather, scatter,
    /// broadcast, all_to_all, barrier, send_recv. Rank 0 is the root; even ranks send to the next odd one.
    #[arg(long, value_delimiter = ',', value_parser = choice::<Op>, default_value = "all_reduce")]
    op: Vec<Choice<Op>>,
    /// Numbers of ranks, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "2")]
    workers: Vec<usize>,
    /// `thread`, `shm`, `tcp` or `mpi`, separated by commas, each as a job of its own; default: the fastest that works.
    #[arg(long, value_delimiter = ',')]
    transport: Vec<TransportKind>,
    /// The algorithms, separated by commas, or `all` that support the operation; default: the tuning table's choice.
    #[arg(long, value_delimiter = ',', value_parser = choice::<Algorithm>)]
    algorithm: Vec<Choice<Algorithm>>,
    /// Bytes of data on the larger side of each rank, separated by commas; K, M and G multiply by 1024. Operations with
    /// a part for each rank round down to whole parts.
    #[arg(long, value_delimiter = ',', value_parser = bytes, default_value = "4,1K,16K,256K,4M,16M,64M")]
    sizes: Vec<usize>,
    /// Type of the numbers: f32, f16, bf16, f64 or i32.
    #[arg(long, value_parser = dtype, default_value = "f32")]
    dtype: DType,
    /// Which memory the data is in.
    #[arg(long, value_enum, default_value_t = MemoryKind::Private)]
    memory: MemoryKind,
    /// How often everything is repeated; medians over the rounds are shown.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Print one JSON object per line.
    #[arg(long)]
    json: bool,
    /// Draw bandwidths and times into this SVG file.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

fn dtype(text: &str) -> Result<DType, String> {
    let measured = [DType::F32, DType::F16, DType::BF16, DType::F64, DType::I32];
    let found = measured.into_iter().find(|dtype| dtype.to_string() == text);
    found.ok_or_else(|| format!("unknown type `{text}`; known are f32, f16, bf16, f64, i32"))
}

pub fn run(args: &CollectiveArgs) -> Result<ExitCode> {
    check_sizes(&args.sizes, args.dtype)?;
    match jobs::role()? {
        Role::Starter => starter(args),
        Role::Ours(world) => {
            jobs::rank(&world, &|group| measure(args, group, args.rounds == 1))?;
            out::finish()?;
            Ok(ExitCode::SUCCESS)
        }
        Role::Foreign(world) => {
            let mut options = Options::from_env()?;
            match args.transport[..] {
                [] => {}
                [transport] => options.transport = Some(transport),
                _ => return Err("a job that a launcher has started can have only one --transport".into()),
            }
            let group = Group::connect(&world, &options)?;
            let measure = |_| measure(args, &group, args.rounds == 1);
            let rounds = (0..args.rounds).map(measure).collect::<Result<Vec<_>>>()?;
            if group.rank() == 0 { finish(args, &rounds) } else { Ok(ExitCode::SUCCESS) }
        }
    }
}

/// Starts the jobs and shows their results.
fn starter(args: &CollectiveArgs) -> Result<ExitCode> {
    let transports: Vec<_> = match args.transport[..] {
        [] => vec![Options::from_env()?.transport],
        _ => args.transport.iter().copied().map(Some).collect(),
    };
    for transport in &transports {
        // The default is shm or tcp; tcp has no algorithms that shm lacks.
        cases(args, transport.unwrap_or(TransportKind::Shm))?;
    }
    let mut rounds = vec![];
    for round in 1..=args.rounds {
        let mut rows = vec![];
        for &transport in &transports {
            for &workers in &args.workers {
                if args.rounds > 1 {
                    let over = transport.map_or(String::new(), |transport| format!(" over {transport}"));
                    say!("round {round} of {}: {workers} ranks{over}", args.rounds);
                }
                let measure = |group: &Group| measure(args, group, args.rounds == 1);
                rows.extend(jobs::start(transport, workers, &[], &measure)?);
            }
        }
        rounds.push(rows);
    }
    finish(args, &rounds)
}

/// Shows the rows that have not been shown yet, and draws them.
fn finish(args: &CollectiveArgs, rounds: &[Vec<Row>]) -> Result<ExitCode> {
    let rows = merge_rounds(rounds);
    if args.rounds > 1 {
        let mut place = String::new();
        for row in &rows {
            // One heading for each job.
            if row.place() != place {
                place = row.place();
                heading(args, row);
            }
            show(args, row)?;
        }
    }
    if let Some(path) = &args.plot {
        let title = format!(
            "Collectives of {} on {} ({} cores)",
            args.dtype,
            regatta_comm::hostname(),
            crate::cores::available()
        );
        std::fs::write(path, plot::draw(&title, &rows))
            .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        say!("plot written to {}", path.display());
    }
    let wrong: Vec<&Row> = rows.iter().filter(|row| row.errors > 0).collect();
    for row in &wrong {
        say!("error: {} wrong numbers in {} of {} bytes ({})", row.errors, row.op, row.bytes, row.line());
    }
    out::finish()?;
    Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn heading(args: &CollectiveArgs, row: &Row) {
    if !args.json {
        show!("{}\n{}", row.place(), Row::heading());
    }
}

fn show(args: &CollectiveArgs, row: &Row) -> Result<()> {
    if args.json {
        show!("{}", serde_json::to_string(row)?);
    } else {
        show!("{}", row.cells());
    }
    Ok(())
}

/// Measures on one rank. If `live`, rank 0 shows each row at once.
fn measure(args: &CollectiveArgs, group: &Group, live: bool) -> Result<Vec<Row>> {
    let method = Method { dtype: args.dtype, memory: args.memory, together: false };
    let mut groups: Vec<(Algorithm, Group)> = vec![];
    let mut rows: Vec<Row> = vec![];
    for (op, asked) in cases(args, group.transport())? {
        let group = match asked {
            None => group,
            Some(algorithm) => {
                let known = groups.iter().position(|(known, _)| *known == algorithm);
                let index = known.map_or_else(
                    || {
                        groups.push((algorithm, group.with_algorithm(Some(algorithm))?));
                        Ok::<_, regatta_comm::Error>(groups.len() - 1)
                    },
                    Ok,
                )?;
                &groups[index].1
            }
        };
        let no_data = [0];
        let sizes = if op == Op::Barrier { &no_data[..] } else { &args.sizes };
        for &bytes in sizes {
            let bound = match (op, group.transport()) {
                (Op::AllReduce, TransportKind::Shm) => memory_bound(group, bytes)?,
                _ => None,
            };
            let sample = sample(method, op, group, bytes)?;
            let row = Row::new(group, (op, asked), (args.dtype, args.memory), &sample, bound);
            if live && group.rank() == 0 {
                if rows.is_empty() {
                    heading(args, &row);
                }
                show(args, &row)?;
            }
            rows.push(row);
            if live {
                // All ranks stop if the reader of rank 0's output has gone.
                let mut closed = [u8::from(out::closed())];
                group.broadcast(&mut closed, 0)?;
                if closed[0] != 0 {
                    return Ok(rows);
                }
            }
        }
    }
    Ok(rows)
}

fn cases(args: &CollectiveArgs, link: TransportKind) -> Result<Vec<(Op, Option<Algorithm>)>> {
    combine(&args.op, &args.algorithm, link)
}

/// The pairs of operation and algorithm to measure (`None` stands for the tuning table's choice).
///
/// # Errors
/// A named algorithm does not support a named operation over `link`, or does not support any operation.
fn combine(
    ops: &[Choice<Op>],
    algorithms: &[Choice<Algorithm>],
    link: TransportKind,
) -> Result<Vec<(Op, Option<Algorithm>)>> {
    let all_ops = names(ops);
    let ops = all_ops.clone().unwrap_or(Op::ALL.to_vec());
    if algorithms.is_empty() {
        return Ok(ops.into_iter().map(|op| (op, None)).collect());
    }
    let works = |op: Op, algorithm: Algorithm| algorithm.works_over(link, op.kind());
    let Some(algorithms) = names(algorithms) else {
        let supported = |op: Op| {
            let found: Vec<_> =
                Algorithm::ALL.iter().copied().filter(|&algorithm| works(op, algorithm)).map(Some).collect();
            // Messages between two ranks have no choice of algorithms.
            if found.is_empty() { vec![(op, None)] } else { found.into_iter().map(|a| (op, a)).collect() }
        };
        return Ok(ops.into_iter().flat_map(supported).collect());
    };
    let mut cases = vec![];
    for &op in &ops {
        for &algorithm in &algorithms {
            if works(op, algorithm) {
                cases.push((op, Some(algorithm)));
            } else if all_ops.is_some() {
                return Err(unsupported(op, algorithm, link).into());
            }
        }
    }
    for algorithm in algorithms {
        if cases.iter().all(|case| case.1 != Some(algorithm)) {
            return Err(format!("{algorithm} carries out no operation over {link}").into());
        }
    }
    Ok(cases)
}

fn unsupported(op: Op, algorithm: Algorithm, link: TransportKind) -> String {
    let others: Vec<&str> = Algorithm::ALL
        .iter()
        .copied()
        .filter(|other| other.works_over(link, op.kind()))
        .map(Algorithm::name)
        .collect();
    let advice = match &others[..] {
        [] => "leave --algorithm out".into(),
        [one] => format!("use {one}"),
        [first @ .., last] => format!("use {} or {last}", first.join(", ")),
    };
    format!("{algorithm} cannot carry out {op} over {link}: {advice}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_and_algorithms_are_combined() {
        let one = |op| [Choice::One(op)];
        let algorithms = |list: &[Algorithm]| list.iter().copied().map(Choice::One).collect::<Vec<_>>();
        let tcp = TransportKind::Tcp;
        assert_eq!(combine(&one(Op::Reduce), &[], tcp).unwrap(), [(Op::Reduce, None)]);
        let all = combine(&one(Op::Reduce), &[Choice::All], tcp).unwrap();
        assert_eq!(all, [(Op::Reduce, Some(Algorithm::Ring)), (Op::Reduce, Some(Algorithm::Tree))]);
        assert_eq!(combine(&one(Op::SendRecv), &[Choice::All], tcp).unwrap(), [(Op::SendRecv, None)]);
        let error = |ops: &[Choice<Op>], list: &[Algorithm]| {
            combine(ops, &algorithms(list), tcp).unwrap_err().to_string()
        };
        assert_eq!(
            error(&one(Op::Reduce), &[Algorithm::Ring, Algorithm::Direct]),
            "direct cannot carry out reduce over tcp: use ring or tree"
        );
        assert!(error(&one(Op::SendRecv), &[Algorithm::Ring]).contains("leave --algorithm out"));
        assert!(
            error(&[Choice::All], &[Algorithm::Native]).contains("native carries out no operation over tcp")
        );
        let linear = combine(&[Choice::All], &algorithms(&[Algorithm::Linear]), tcp).unwrap();
        assert_eq!(linear.iter().map(|case| case.0).collect::<Vec<_>>(), [Op::Gather, Op::Scatter]);
    }
}
