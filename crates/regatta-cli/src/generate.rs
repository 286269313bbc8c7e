//! `regatta generate`: streams text from a checkpoint.

use crate::error::Result;
use clap::Args;
use regatta::Generator;
use regatta::checkpoint::Which;
use regatta::train::SampleConfig;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Args)]
pub struct GenerateArgs {
    /// The folder of a training run.
    run: PathBuf,
    /// Text to go on from.
    #[arg(long, default_value = "")]
    prompt: String,
    /// Tokens to generate.
    #[arg(long, default_value_t = 200)]
    tokens: usize,
    /// Below 1 bolder, above 1 wilder; 0: always the likeliest token.
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Choose among this many likeliest tokens; 0: among all.
    #[arg(long, default_value_t = 50)]
    top_k: usize,
    /// The same seed gives the same text.
    #[arg(long, default_value_t = 1337)]
    seed: u64,
    /// The newest checkpoint instead of the one with the lowest validation loss.
    #[arg(long)]
    last: bool,
}

pub fn run(args: GenerateArgs) -> Result<ExitCode> {
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return Err(format!("--temperature {}: must be 0 or more", args.temperature).into());
    }
    let which = if args.last { Which::Last } else { Which::Best };
    let mut generator = Generator::load(&args.run, which)?;
    let options =
        SampleConfig { prompt: None, tokens: args.tokens, temperature: args.temperature, top_k: args.top_k };
    let mut out = std::io::stdout().lock();
    write!(out, "{}", args.prompt)?;
    let mut closed = false;
    generator.stream(&args.prompt, &options, args.seed, |piece| {
        // A reader that has seen enough closes the pipe; that is no error.
        closed = write!(out, "{piece}").and_then(|()| out.flush()).is_err();
        !closed
    })?;
    if !closed {
        writeln!(out)?;
    }
    Ok(ExitCode::SUCCESS)
}
