//! `regatta bench step`: measures the operations of a training step.

use crate::error::Result;
use crate::flags::PlanFlags;
use crate::out::{self, show};
use crate::train::{TrainArgs, train_as};
use clap::Args;
use regatta::config::Override;
use regatta::train::{Profile, Row, Summary};
use regatta_comm::{TransportKind, rendezvous::World};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Times training steps operation by operation.
#[derive(Args)]
pub struct StepArgs {
    #[command(flatten)]
    plan: PlanFlags,
    /// Optimizer steps; the medians ignore the first five.
    #[arg(long, default_value_t = 25)]
    steps: usize,
    /// Write a timeline of all ranks into this file, for the trace viewers of Chrome and Perfetto.
    #[arg(long)]
    trace: Option<PathBuf>,
    /// `thread` (ranks in one process), `shm`, `tcp` or `mpi` (ranks of mpirun); default: the fastest that works.
    #[arg(long)]
    transport: Option<TransportKind>,
    /// Print the profiles of all ranks as JSON instead of rank 0's as a table.
    #[arg(long)]
    json: bool,
}

pub fn run(args: StepArgs, started: Instant) -> Result<ExitCode> {
    let steps = format!("train.steps={}", args.steps);
    let overrides = [
        "train.profile=true",
        "train.eval_every=0",
        // As little as possible after the last step, which is not timed.
        "train.eval_batches=1",
        "train.checkpoint_every=0",
        "train.checkpoint_minutes=0",
        "train.check_every=0",
        "sample.tokens=0",
    ];
    let mut changes = vec![Override::flag("--steps", steps)];
    changes.extend(overrides.map(Override::program));
    let transport = args.transport.map(|transport| format!("parallel.transport={transport}"));
    changes.extend(transport.map(|transport| Override::flag("--transport", transport)));
    let mut loaded = args.plan.load(changes)?;
    if let Some(trace) = &args.trace {
        loaded.config.train.trace = Some(trace.clone());
    }
    // Ranks that our launcher starts get the folder from it.
    let folder = std::env::temp_dir().join(format!("regatta-bench-step-{}", std::process::id()));
    let train = TrainArgs {
        plan: args.plan,
        trace: args.trace,
        steps: Some(args.steps),
        out: Some(folder.clone()),
        resume: None,
        from: None,
        other_data: false,
        transport: args.transport,
        algorithm: None,
    };
    let rank = World::from_env()?;
    let outcome = train_as(&train, loaded, started, false);
    if rank.is_some() {
        return outcome;
    }
    let summary = std::fs::read(folder.join("summary.json"));
    let _ = std::fs::remove_dir_all(&folder);
    let code = outcome?;
    if code != ExitCode::SUCCESS {
        return Ok(code);
    }
    let summary: Summary = serde_json::from_slice(&summary?)?;
    if args.json {
        show!("{}", serde_json::to_string_pretty(&summary.profile)?);
    } else {
        out::write(format_args!("{}", table(&summary)));
    }
    out::finish()?;
    Ok(ExitCode::SUCCESS)
}

/// Rank 0's profile, and a summary of the run.
fn table(summary: &Summary) -> String {
    let mut text = String::new();
    let Some(profile) = summary.profile.first() else { return text };
    let rows = profile.rows.iter().map(|row| cells(row, profile)).collect::<Vec<_>>();
    let head = ["operation", "phase", "calls", "ms", "share", "GFLOP/s", "of peak", "GB/s", "of peak"];
    let mut widths = head.map(str::len);
    for row in &rows {
        widths.iter_mut().zip(row).for_each(|(width, cell)| *width = (*width).max(cell.len()));
    }
    let mut line = |cells: [&str; 9]| {
        let cell = |(column, (cell, width)): (usize, (&str, &usize))| match column {
            // Words are aligned to the left, numbers to the right.
            0 | 1 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        };
        let cells: Vec<String> = cells.into_iter().zip(&widths).enumerate().map(cell).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    };
    line(head);
    rows.iter().for_each(|row| line(row.each_ref().map(String::as_str)));
    let product = profile.rows.iter().filter(|row| is_product(row)).map(|row| row.ms).sum::<f64>();
    let peak = summary.mfu.map_or(String::new(), |mfu| {
        format!(
            ": {:.1} % of the cores' peak (rank 0's: {:.0} GFLOP/s, copying {:.1} GB/s)",
            100.0 * mfu,
            profile.peak_flops_per_s * 1e-9,
            profile.peak_bytes_per_s * 1e-9
        )
    });
    let _ = writeln!(
        text,
        "\n{} rank(s) with {} thread(s) each over {}; rank 0: {:.1} ms a step, of which {:.1} % in layers of matrix \
         products;\n{:.1} GFLOP of the model a step over all ranks{peak}",
        summary.world,
        summary.threads,
        summary.transport,
        profile.step_ms,
        100.0 * product / profile.step_ms.max(1e-9),
        summary.model_flops * 1e-9,
    );
    text
}

/// Whether an operation consists mostly of matrix products.
fn is_product(row: &Row) -> bool {
    matches!(row.name.as_str(), "linear" | "attention" | "convolution")
}

fn cells(row: &Row, profile: &Profile) -> [String; 9] {
    let per_second = |amount: f64| if row.ms > 0.0 { amount / (row.ms * 1e-3) } else { 0.0 };
    let rate = |amount: f64| match amount {
        0.0 => String::new(),
        amount => format!("{:.1}", per_second(amount) * 1e-9),
    };
    let share = |amount: f64, peak: f64| match amount {
        0.0 => String::new(),
        amount => format!("{:.0} %", 100.0 * per_second(amount) / peak),
    };
    [
        row.name.clone(),
        row.phase.clone(),
        format!("{:.0}", row.calls),
        format!("{:.2}", row.ms),
        format!("{:.1} %", 100.0 * row.ms / profile.step_ms.max(1e-9)),
        rate(row.flops),
        share(row.flops, profile.peak_flops_per_s),
        rate(row.bytes),
        share(row.bytes, profile.peak_bytes_per_s),
    ]
}
