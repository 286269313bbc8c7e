//! `regatta trace`: shows the last operations of the ranks of a failed job, from their flight recorders.

mod merge;
mod read;
mod show;

use crate::error::Result;
use crate::out::{self, say, show};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Args)]
pub struct TraceArgs {
    /// The folder with a job's files `rank-R-group-G.jsonl`, or a folder of such folders, of which the newest is read.
    folder: PathBuf,
    /// Show this many operations of each group.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    last: u32,
    /// Print one JSON object per line for each operation of a group.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &TraceArgs) -> Result<ExitCode> {
    let job = read::Job::read(&args.folder)?;
    for problem in &job.problems {
        say!("warning: {problem}");
    }
    let groups = merge::groups(&job.files);
    if args.json {
        for group in &groups {
            for row in group.last(args.last as usize) {
                show!("{}", serde_json::to_string(&show::Line::new(group, row))?);
            }
        }
    } else {
        out::write(format_args!("{}", show::report(&job, &groups, args.last as usize)));
    }
    out::finish()?;
    Ok(ExitCode::SUCCESS)
}
