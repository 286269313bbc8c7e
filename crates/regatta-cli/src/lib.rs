//! The `regatta` program: it trains, plans, generates, launches, prepares data, measures and explains failures. [`App`]
//! is the same program for models and data of your own.

// All output goes through `out`: a closed pipe or a full disk must not end a run.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod app;
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
mod worker;

pub use app::App;

use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

// The README's program must compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;

/// Distributed training of deep-learning models, in Rust.
#[derive(Parser)]
#[command(name = "regatta", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train the model of a configuration on several workers.
    Train(train::TrainArgs),
    /// Show a plan without training.
    Plan(plan::PlanArgs),
    /// Stream text from a trained model.
    Generate(generate::GenerateArgs),
    /// Start a Regatta program on several local ranks.
    Launch(LaunchArgs),
    /// Prepare training data.
    Data(data::DataArgs),
    /// Inspect and verify checkpoints, exchange them with Hugging Face's transformers.
    Checkpoint(checkpoint::CheckpointArgs),
    /// Measure collectives and training steps, write tuning tables.
    Bench(bench::BenchArgs),
    /// Show the last operations of the ranks of a failed job.
    Trace(trace::TraceArgs),
    /// End the ranks of a launcher that died; the launcher starts this command.
    #[command(name = launcher::guard::COMMAND, hide = true)]
    Guard,
}

#[derive(Args)]
struct LaunchArgs {
    /// Number of ranks.
    #[arg(short = 'n', long = "workers")]
    workers: usize,
    /// `shm`, `tcp` or `mpi`, for which mpirun starts the ranks; default: the fastest that works.
    #[arg(long)]
    transport: Option<regatta_comm::TransportKind>,
    /// The algorithm for all operations that it supports; default: the tuning table's choice.
    #[arg(long)]
    algorithm: Option<regatta_comm::Algorithm>,
    /// Fail after waiting this long for another rank without progress; default: 30.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    deadline: Option<f64>,
    /// The program and its arguments, after `--`.
    #[arg(last = true, required = true)]
    program: Vec<OsString>,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=1e6).contains(seconds));
    seconds.ok_or_else(|| format!("{text:?} is not a number of seconds from 0.1 to 1000000"))
}

/// Runs the program on the arguments of this process.
pub fn main() -> ExitCode {
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
                if !signals::own_rank() || !launcher::report_failure(&error.to_string()) {
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
        threads: cores::threads_of_each(args.workers),
        transport: args.transport,
        environment,
        servers: 0,
        spared: 0..0,
        own: false,
    };
    launcher::launch(&job)?;
    Ok(ExitCode::SUCCESS)
}
