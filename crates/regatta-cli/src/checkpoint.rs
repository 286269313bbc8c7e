//! `regatta checkpoint`: shows what is in a checkpoint, verifies it, and exchanges models with `transformers`.

use crate::error::Result;
use crate::out::{self, say};
use clap::{Args, Subcommand};
use regatta::checkpoint::huggingface::{export, import};
use regatta::checkpoint::{Checkpoint, Which, inspect, verify};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Args)]
pub struct CheckpointArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show what is in a checkpoint.
    Inspect {
        /// The folder of a run (its newest checkpoint) or of one checkpoint, or an object store's URL of either.
        target: PathBuf,
        /// Of a run, take the checkpoint with the lowest validation loss.
        #[arg(long)]
        best: bool,
    },
    /// Read every byte and compare checksums; exit with 1 if anything is damaged.
    Verify {
        /// The folder of a run (all its checkpoints) or of one checkpoint, or an object store's URL of either.
        target: PathBuf,
    },
    /// Write a gpt as transformers' GPT2LMHeadModel: model.safetensors, config.json, the tokenizer.
    Export {
        /// The folder of a run or of one checkpoint, or an object store's URL of either.
        run: PathBuf,
        /// The folder to write; it must hold no model yet.
        #[arg(long)]
        out: PathBuf,
        /// Take the checkpoint with the lowest validation loss instead of the newest.
        #[arg(long)]
        best: bool,
    },
    /// Make a run from a GPT-2 that transformers saved.
    Import {
        /// The folder with config.json and model.safetensors.
        folder: PathBuf,
        /// The run's folder to write; it must hold no checkpoint yet.
        #[arg(long)]
        out: PathBuf,
    },
}

pub fn run(args: CheckpointArgs) -> Result<ExitCode> {
    let which = |best| if best { Which::Best } else { Which::Last };
    match args.command {
        Command::Inspect { target, best } => {
            let summary = inspect(&target, which(best))?;
            warn(&summary.warnings);
            print(&summary.to_string())
        }
        Command::Verify { target } => check(&target),
        Command::Export { run, out, best } => {
            let checkpoint = Checkpoint::locate(&run, which(best))?;
            warn(checkpoint.warnings());
            let exported = export(&checkpoint, tokenizer_of(&run, &checkpoint).as_deref(), &out)?;
            warn(&exported.warnings);
            let tokenizer = if exported.tokenizer { " with its tokenizer" } else { "" };
            print(&format!(
                "{}: {} parameters of step {}{tokenizer}\n",
                out.display(),
                exported.parameters,
                checkpoint.state().step
            ))
        }
        Command::Import { folder, out } => {
            let imported = import(&folder, &out)?;
            warn(&imported.warnings);
            let tokenizer = if imported.tokenizer { " with its tokenizer" } else { "" };
            let model = &imported.model;
            print(&format!(
                "{}: a gpt of {} parameters{tokenizer}, layers {}, heads {}, embed {}, context {}\n",
                out.display(),
                imported.parameters,
                model.layers,
                model.heads,
                model.embed,
                model.context
            ))
        }
    }
}

fn check(target: &Path) -> Result<ExitCode> {
    let report = verify(target)?;
    for note in &report.notes {
        say!("note: {note}");
    }
    for problem in &report.problems {
        say!("damaged: {problem}");
    }
    let intact = report.problems.is_empty();
    print(&format!(
        "{} checkpoint(s), {} file(s), {} bytes: {}\n",
        report.checkpoints.len(),
        report.files,
        report.bytes,
        if intact { "intact".into() } else { format!("{} problem(s)", report.problems.len()) }
    ))?;
    Ok(if intact { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn warn(warnings: &[String]) {
    for warning in warnings {
        say!("warning: {warning}");
    }
}

fn print(text: &str) -> Result<ExitCode> {
    out::write(format_args!("{text}"));
    out::finish()?;
    Ok(ExitCode::SUCCESS)
}

/// The tokenizer of the checkpoint's run, if there is one: it is in the folder that contains `checkpoints`.
fn tokenizer_of(run: &Path, checkpoint: &Checkpoint) -> Option<PathBuf> {
    if run.to_str().is_some_and(|text| text.contains("://")) {
        return None;
    }
    let path = checkpoint.path();
    path.parent().and_then(Path::parent).map(|run| run.join("tokenizer.json")).filter(|file| file.exists())
}
