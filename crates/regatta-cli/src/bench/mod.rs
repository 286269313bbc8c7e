//! `regatta bench`: measures collectives and training steps, and writes tuning tables.

mod collective;
mod jobs;
mod list;
mod measure;
mod op;
mod plot;
mod row;
mod step;
mod tune;

use crate::error::Result;
use clap::{Args, Subcommand};
use std::process::ExitCode;
use std::time::Instant;

#[derive(Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Time collective operations for several sizes, and check their results.
    Collective(collective::CollectiveArgs),
    /// Time training steps, operation by operation.
    Step(step::StepArgs),
    /// Measure which algorithm is the fastest for what, and write a tuning table.
    Tune(tune::TuneArgs),
}

pub fn run(args: BenchArgs, started: Instant) -> Result<ExitCode> {
    match args.what {
        What::Collective(args) => collective::run(&args),
        What::Step(args) => step::run(args, started),
        What::Tune(args) => tune::run(&args),
    }
}
