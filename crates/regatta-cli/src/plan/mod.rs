//! `regatta plan`: shows what every rank would hold, do and communicate, before anything runs.

mod show;
mod table;

use crate::error::Result;
use crate::flags::{PlanFlags, check, plan, workers};
use crate::out;
use clap::{Args, Subcommand};
use regatta::datasets::Datasets;
use std::process::ExitCode;
use std::time::Duration;

#[derive(Args)]
pub struct PlanArgs {
    #[command(subcommand)]
    command: PlanCommand,
}

#[derive(Subcommand)]
enum PlanCommand {
    /// Print the stages, every parameter's slice on each rank, and everything that a training step communicates.
    Show(ShowArgs),
}

#[derive(Args)]
struct ShowArgs {
    #[command(flatten)]
    plan: PlanFlags,
    /// Show only this rank; default: all ranks.
    #[arg(long)]
    rank: Option<usize>,
    /// How long a step takes where nothing waits for communication, as a run tells it, in milliseconds: also says over which
    /// links another encoding would be faster.
    #[arg(long, value_name = "MS")]
    step_ms: Option<f64>,
}

pub fn run(args: &PlanArgs) -> Result<ExitCode> {
    let PlanCommand::Show(args) = &args.command;
    let loaded = args.plan.load([])?;
    let config = &loaded.config;
    let plan = plan(config, workers(config)?)?;
    let ranks = match args.rank {
        None => 0..plan.world(),
        Some(rank) if rank < plan.world() => rank..rank + 1,
        Some(rank) => {
            let last = plan.world() - 1;
            return Err(
                format!("--rank: there is no rank {rank}; mesh {} has ranks 0 to {last}", plan.mesh).into()
            );
        }
    };
    let vocab = Datasets::vocab_of(config)?;
    check(config, &plan, vocab)?;
    for warning in loaded.warnings(&plan) {
        out::say!("warning: {warning}");
    }
    let compute = match args.step_ms {
        Some(ms) if ms.is_finite() && ms > 0.0 && ms < 1e9 => Some(Duration::from_secs_f64(ms / 1e3)),
        None => None,
        Some(ms) => {
            return Err(format!("--step-ms: {ms} is no duration of a step: give a number above 0").into());
        }
    };
    // Written rank by rank: the text of a large mesh is long.
    out::write(format_args!("{}", show::head(config, &plan, vocab, compute)?));
    for rank in ranks {
        out::write(format_args!("{}", show::rank(config, &plan, vocab, rank)?));
        if out::closed() {
            break;
        }
    }
    out::finish()?;
    Ok(ExitCode::SUCCESS)
}
