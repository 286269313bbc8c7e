//! `regatta trace`: what the ranks of a job that failed did last, put together from their flight recorders.

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
    /// The folder with the files `rank-R-group-G.jsonl` of a job, or one that holds such folders: then the newest.
    folder: PathBuf,
    /// Operations of each group to show.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    last: u32,
    /// One JSON object a line, for each operation of a group.
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
