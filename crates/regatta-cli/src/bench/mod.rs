//! `regatta bench`: measures collectives, and which algorithm is the fastest where.

mod collective;
mod jobs;
mod list;
mod measure;
mod op;
mod plot;
mod row;
mod tune;

use crate::error::Result;
use clap::{Args, Subcommand};
use std::process::ExitCode;

#[derive(Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Time collective operations for several sizes, and check their results.
    Collective(collective::CollectiveArgs),
    /// Measure which algorithm is the fastest where, and write a tuning table.
    Tune(tune::TuneArgs),
}

pub fn run(args: BenchArgs) -> Result<ExitCode> {
    match args.what {
        What::Collective(args) => collective::run(&args),
        What::Tune(args) => tune::run(&args),
    }
}
