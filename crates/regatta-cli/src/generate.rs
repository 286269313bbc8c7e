//! `regatta generate`: streams text from a checkpoint.

use crate::cores;
use crate::error::Result;
use crate::launcher;
use crate::out::{self, say};
use clap::Args;
use regatta::Generator;
use regatta::checkpoint::Which;
use regatta::config::SampleConfig;
use regatta::plan::Mesh;
use regatta_comm::rendezvous::World;
use regatta_comm::{Group, Options};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Args)]
pub struct GenerateArgs {
    /// The folder of a training run.
    run: PathBuf,
    /// Text to continue.
    #[arg(long, default_value = "")]
    prompt: String,
    /// Tokens to generate.
    #[arg(long, default_value_t = 200)]
    tokens: usize,
    /// Values below 1 prefer likely tokens, values above 1 give unlikely ones a chance; 0 always takes the likeliest.
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Choose among this many likeliest tokens; 0 stands for all.
    #[arg(long, default_value_t = 50)]
    top_k: usize,
    /// The same seed gives the same text.
    #[arg(long, default_value_t = 1337)]
    seed: u64,
    /// Spread the model over local processes along the axes tensor and pipe, as in tensor=2,pipe=2.
    #[arg(long)]
    mesh: Option<Mesh>,
    /// The newest checkpoint instead of the one with the lowest validation loss.
    #[arg(long)]
    last: bool,
    /// The checkpoint: best, last, or step-N; default: best.
    #[arg(long, value_name = "CHECKPOINT", conflicts_with = "last")]
    from: Option<Which>,
}

impl GenerateArgs {
    fn which(&self) -> Which {
        self.from.unwrap_or(if self.last { Which::Last } else { Which::Best })
    }

    /// The mesh over which the model is spread. `world` is the number of ranks of the job, if one has been started.
    fn mesh(&self, world: Option<usize>) -> Result<Mesh> {
        let Some(mesh) = &self.mesh else {
            return match world {
                None | Some(1) => Ok(Mesh::data(1)),
                Some(world) => Err(format!(
                    "the job has {world} ranks: say how to spread the model over them, as in --mesh tensor={world}"
                )
                .into()),
            };
        };
        if mesh.workers() > 1 {
            let problem = "ranks along data and replica would all write the same text; spread the model over \
                           tensor and pipe, as in --mesh tensor=2,pipe=2";
            return Err(format!("--mesh {mesh}: {problem}").into());
        }
        if let Some(world) = world {
            mesh.check_world(world)?;
        }
        Ok(mesh.clone())
    }
}

pub fn run(args: GenerateArgs) -> Result<ExitCode> {
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return Err(format!("--temperature {}: must be 0 or more", args.temperature).into());
    }
    let world = World::from_env()?;
    let mesh = args.mesh(world.as_ref().map(|world| world.size))?;
    // Before anything starts and before the ranks meet: a mesh that does not suit the model is then reported only once.
    Generator::check(&args.run, args.which(), &mesh)?;
    match world {
        Some(world) => {
            let group = Group::connect(&world, &Options::from_env()?)?;
            let threads = cores::threads(world.local_size);
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).use_current_thread().build()?;
            let outcome = pool.install(|| on_rank(&args, &group, mesh));
            outcome.inspect_err(|error| group.abort(&error.to_string()))?;
            Ok(ExitCode::SUCCESS)
        }
        None if mesh.size() > 1 => {
            launcher::launch(&launcher::Job {
                program: std::env::current_exe()?,
                arguments: std::env::args_os().skip(1).collect(),
                workers: mesh.size(),
                threads: cores::threads_of_each(mesh.size()),
                transport: None,
                environment: vec![],
                servers: 0,
                spared: 0..0,
                own: true,
            })?;
            Ok(ExitCode::SUCCESS)
        }
        None => on_rank(&args, &Group::solo(), mesh).map(|()| ExitCode::SUCCESS),
    }
}

/// Generates together with the other ranks of `group`; rank 0 writes the text.
fn on_rank(args: &GenerateArgs, group: &Group, mesh: Mesh) -> Result<()> {
    let mut generator = Generator::load_on(&args.run, args.which(), group, mesh)?;
    let options =
        SampleConfig { prompt: None, tokens: args.tokens, temperature: args.temperature, top_k: args.top_k };
    if group.rank() == 0 {
        generator.warnings().iter().for_each(|warning| say!("warning: {warning}"));
        out::write(format_args!("{}", args.prompt));
    }
    // Only rank 0 receives text. A reader may close the pipe early, which is no error.
    generator.stream(&args.prompt, &options, args.seed, |piece| out::write(format_args!("{piece}")))?;
    if group.rank() == 0 {
        out::write(format_args!("\n"));
    }
    out::finish()
}
