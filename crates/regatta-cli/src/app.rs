//! The program for models and data of your own.

use regatta::config::Config;
use regatta::datasets::{self, Datasets};
use regatta::models::{self, ModelSpec};
use std::process::ExitCode;

/// Makes a binary the whole `regatta` program with additional models and data: with every command and flag, local
/// workers and all launchers.
///
/// ```no_run
/// use regatta::models::GptConfig;
/// use std::process::ExitCode;
///
/// fn main() -> ExitCode {
///     // A model of your own implements `ModelSpec`; a configuration names it in `model.kind`.
///     regatta_cli::App::new().model::<GptConfig>().main()
/// }
/// ```
#[derive(Debug, Default)]
pub struct App(());

impl App {
    /// The program with Regatta's own models and data.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a model. A configuration chooses it by `model.kind`.
    #[must_use]
    pub fn model<S: ModelSpec>(self) -> Self {
        models::register::<S>();
        self
    }

    /// Adds data. A configuration chooses it by `data.kind = "own"`. `open` is called on every rank, and may be called
    /// again; it must give the same samples everywhere.
    #[must_use]
    pub fn data(self, open: impl Fn(&Config) -> regatta::Result<Datasets> + Send + Sync + 'static) -> Self {
        datasets::register(open);
        self
    }

    /// Runs the program on the arguments of this process.
    pub fn main(self) -> ExitCode {
        crate::main()
    }
}
