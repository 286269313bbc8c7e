//! The description of one rank's part of a training run.

use super::requests::Requests;
use crate::checkpoint::Which;
use crate::config::Config;
use crate::servers::ServerLink;
use regatta_comm::Group;
use regatta_plan::Plan;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// The description of one rank's part of a training run.
pub struct Job {
    /// The configuration: model, data, number of steps and so on.
    pub config: Config,
    /// How the work is distributed over ranks.
    pub plan: Plan,
    /// The group of all workers; where each trains at its own speed, a group of this rank alone.
    pub group: Group,
    /// The way to the parameter servers, if the plan has some.
    pub servers: Option<ServerLink>,
    /// The run's folder.
    pub out: PathBuf,
    /// How to resume from one of its checkpoints; none: begin, in a folder without an earlier run.
    pub resume: Option<Resume>,
    /// Requests from outside (by signals), which are handled at the end of each step.
    pub requests: Arc<Requests>,
    /// When the program was started.
    pub started: Instant,
    /// Number of threads with which this rank computes.
    pub threads: usize,
}

impl Job {
    /// Whether this rank writes checkpoints, metrics and messages.
    pub fn leads(&self) -> bool {
        self.group.rank() == 0 && self.servers.as_ref().is_none_or(|link| link.worker() == 0)
    }

    /// Whether workers train each at its own speed.
    pub(crate) fn is_free(&self) -> bool {
        self.plan.servers.is_free()
    }

    /// The group of all ranks, servers included.
    pub fn world(&self) -> Group {
        self.servers.as_ref().map_or_else(|| self.group.clone(), ServerLink::world)
    }

    /// Ends the job on all ranks because of `reason`.
    pub fn abort(&self, reason: &str) {
        self.world().abort(reason);
    }
}

/// How a run resumes from a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resume {
    /// From which one. If the newest is damaged, an older one replaces it; nothing replaces the others.
    pub from: Which,
    /// Whether to begin a new run if there is no checkpoint.
    pub or_begin: bool,
    /// Whether to resume even if the data or the tokenizer differ from those of the checkpoint.
    pub other_data: bool,
}
