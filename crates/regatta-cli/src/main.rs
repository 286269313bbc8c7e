//! The `regatta` program: trains, plans, generates, launches, prepares data, measures, explains failures.

// Whatever is said goes through `out`: a closed pipe or a full disk must not end a run.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod available;
mod bench;
mod checkpoint;
mod cores;
mod data;
mod error;
mod flags;
mod generate;
mod launcher;
mod out;
mod plan;
mod preparing;
mod progress;
mod signals;
mod trace;
mod train;

use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Distributed training of deep-learning models, in Rust.
#[derive(Parser)]
#[command(name = "regatta", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a model as a configuration says, on several workers.
    Train(train::TrainArgs),
    /// Look at a plan on paper: nothing is trained.
    Plan(plan::PlanArgs),
    /// Stream text from a trained model.
    Generate(generate::GenerateArgs),
    /// Start a Regatta program on several local ranks.
    Launch(LaunchArgs),
    /// Prepare training data.
    Data(data::DataArgs),
    /// Look into checkpoints, verify them, exchange them with Hugging Face's transformers.
    Checkpoint(checkpoint::CheckpointArgs),
    /// Measure.
    Bench(bench::BenchArgs),
    /// Show what the ranks of a job that failed did last.
    Trace(trace::TraceArgs),
    /// Ends the ranks of a launcher that is gone; the launcher starts it.
    #[command(name = launcher::guard::COMMAND, hide = true)]
    Guard,
}

#[derive(Args)]
struct LaunchArgs {
    /// Number of ranks.
    #[arg(short = 'n', long = "workers")]
    workers: usize,
    /// `shm` or `tcp`; left out: the fastest that works.
    #[arg(long)]
    transport: Option<regatta_comm::TransportKind>,
    /// The algorithm for all operations that it offers; left out: what the tuning table says.
    #[arg(long)]
    algorithm: Option<regatta_comm::Algorithm>,
    /// A wait for another rank without progress for this long is an error; left out: 30.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    deadline: Option<f64>,
    /// The program and its arguments, after `--`.
    #[arg(last = true, required = true)]
    program: Vec<OsString>,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=1e6).contains(seconds));
    seconds.ok_or_else(|| format!("{text:?} is no number of seconds from 0.1 to 1000000"))
}

fn main() -> ExitCode {
    let started = Instant::now();
    if signals::own_rank() {
        signals::write_from_background();
    }
    let outcome = match Cli::parse().command {
        Command::Train(args) => train::run(args, started),
        Command::Plan(args) => plan::run(&args),
        Command::Generate(args) => generate::run(args),
        Command::Launch(args) => launch(args),
        Command::Data(args) => data::run(args),
        Command::Checkpoint(args) => checkpoint::run(args),
        Command::Bench(args) => bench::run(args, started),
        Command::Trace(args) => trace::run(&args),
        Command::Guard => return launcher::guard::run(),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => match error.downcast_ref::<error::Exit>() {
            Some(error::Exit { message: None, code }) => ExitCode::from(*code),
            Some(error::Exit { message: Some(message), code }) => {
                out::say!("error: {message}");
                ExitCode::from(*code)
            }
            None => {
                if !signals::own_rank() || !launcher::tell(&error.to_string()) {
                    out::say!("error: {error}");
                }
                ExitCode::FAILURE
            }
        },
    }
}

fn launch(args: LaunchArgs) -> error::Result<ExitCode> {
    let (program, arguments) = args.program.split_first().ok_or("no program to launch")?;
    let mut environment: Vec<(OsString, OsString)> = vec![];
    let algorithm = args.algorithm.map(|algorithm| algorithm.to_string());
    environment.extend(algorithm.map(|algorithm| ("REGATTA_ALGORITHM".into(), algorithm.into())));
    let deadline = args.deadline.map(|seconds| seconds.to_string());
    environment.extend(deadline.map(|seconds| ("REGATTA_DEADLINE_S".into(), seconds.into())));
    let job = launcher::Job {
        program: PathBuf::from(program),
        arguments: arguments.to_vec(),
        workers: args.workers,
        threads: cores::of_each(args.workers),
        transport: args.transport,
        environment,
        own: false,
    };
    launcher::launch(&job)?;
    Ok(ExitCode::SUCCESS)
}
