//! The training loop, which is the same for every plan.

mod callback;
mod evaluate;
mod fit;
mod folder;
mod job;
mod link;
mod losses;
mod metrics;
mod profile;
mod requests;
mod resume;
mod run;
mod saving;
mod serve;
mod statistics;
mod summary;
mod trace;
mod trainer;
mod volume;

pub use crate::parallel::{Carried, Purpose};
pub use callback::{Callback, EarlyStopping, Flow, LearningRate, Silent, StepReport};
pub use evaluate::Score;
pub use fit::{Change, Misfit};
pub use folder::{claim_folder, holds_run};
pub use job::{Job, Resume};
pub use link::{Faster, LinkUse};
pub use losses::read_losses;
pub use profile::{Profile, Row};
pub use requests::Requests;
pub use run::train;
pub use serve::serve;
pub use summary::{Communication, Memory, Pipeline, Summary, peak_rss_bytes};
pub use trainer::Trainer;
pub use volume::{Collective, HeldParam, Outline, total};
