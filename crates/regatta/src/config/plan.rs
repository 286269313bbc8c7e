//! Derives the plan from a configuration, and checks whether the model supports it.

use super::limits;
use super::schema::Config;
use crate::autograd::{Backend, Precision};
use crate::models::ModelConfig;
use crate::params::Placement;
use regatta_plan::{
    Axis, Compress, CompressKind, Layout, Local, Mesh, Plan, PlanError, ScheduleKind, Servers, SyncMode,
};

/// Elements of the smallest part of a parameter that a server keeps.
const SERVED: usize = 16;

/// A number of the configuration as plans have it, which are compared.
fn millionths(number: f64) -> u32 {
    (number * 1e6).round() as u32
}

impl Config {
    /// The batch of a step: samples in all or per worker, as the user gave them, and micro-batches.
    pub fn batch(&self) -> regatta_plan::Batch {
        let accumulate = self.train.accumulate;
        match (self.train.batch, self.train.batch_per_worker) {
            (Some(samples), _) => regatta_plan::Batch::global(samples, accumulate),
            (None, samples) => regatta_plan::Batch::per_worker(samples.unwrap_or(1), accumulate),
        }
    }

    /// The plan for a job of `world` ranks, besides its parameter servers.
    ///
    /// # Errors
    /// The mesh has another size, the batch does not divide, or the schedule or the layout is invalid.
    pub fn plan(&self, world: usize) -> Result<Plan, PlanError> {
        let parallel = &self.parallel;
        let mesh = match &parallel.mesh {
            Some(mesh) => mesh.parse()?,
            // Without a mesh every rank is an island of its own.
            None if self.local.every > 0 => Mesh::new(&[(Axis::Replica, world)])?,
            None => Mesh::data(world),
        };
        mesh.check_world(world)?;
        let bytes = (parallel.bucket_mib * (1 << 20) as f64) as usize;
        let default_chunks = if parallel.schedule == ScheduleKind::Interleaved { 2 } else { 1 };
        let rules = parallel.layout.iter().map(|(dim, axis)| (dim.as_str(), axis.as_str()));
        let plan = Plan {
            layout: Layout::with(rules)?,
            zero: parallel.zero,
            prefetch: parallel.prefetch,
            offload: parallel.offload,
            schedule: parallel.schedule,
            chunks: parallel.chunks.unwrap_or(default_chunks),
            sequence: parallel.sequence && mesh.axis(Axis::Tensor) > 1,
            recompute: parallel.recompute,
            compress: self.compress(),
            local: self.local(),
            servers: self.servers(),
            ..Plan::new(mesh, self.batch(), bytes)?
        };
        plan.pipeline()?;
        Ok(plan)
    }

    /// How gradients are encoded.
    fn compress(&self) -> Compress {
        let compress = &self.compress;
        Compress {
            kind: compress.kind,
            millionths: millionths(compress.ratio).max(1),
            rank: compress.rank,
            momentum: millionths(compress.momentum),
            warm_up: compress.warmup as u64,
            pipeline: compress.pipeline,
        }
    }

    /// When islands come together.
    fn local(&self) -> Local {
        let local = &self.local;
        Local {
            every: local.every as u64,
            outer: local.outer,
            start: local.start as u64,
            lr: millionths(local.lr),
            momentum: millionths(local.momentum),
            fragments: local.fragments as u64,
            overlap: local.overlap as u64,
            mixing: millionths(local.mixing),
            // Where it is off, plans with other numbers of steps are the same.
            steps: if local.every > 0 { self.train.steps as u64 } else { 0 },
        }
    }

    /// The parameter servers.
    fn servers(&self) -> Servers {
        let sync = &self.sync;
        match (sync.mode, sync.staleness as u64) {
            // Whoever may not be ahead waits for all.
            (SyncMode::Ssp, 0) => Servers { count: sync.servers, ..Servers::default() },
            (SyncMode::Ssp, staleness) => Servers { count: sync.servers, mode: SyncMode::Ssp, staleness },
            (mode, _) => Servers { count: sync.servers, mode, staleness: 0 },
        }
    }

    /// Checks that the model supports `plan`; `vocab` is the number of tokens or classes. Nothing is run.
    ///
    /// # Errors
    /// There are too many samples, more stages than blocks, a layout that a parameter does not allow (the error names
    /// it), or a model or a sequence that cannot be split.
    pub fn check_plan(&self, plan: &Plan, vocab: usize) -> Result<(), PlanError> {
        let model = |error: crate::error::Error| PlanError::Model(error.to_string());
        // The fields of a plan are public, so they may be other ones than its constructor would take.
        let batch = regatta_plan::Batch::per_worker(plan.batch_per_worker, plan.accumulate);
        Plan::new(plan.mesh.clone(), batch, plan.bucket_bytes)?;
        limits::check_step(self, plan, vocab)?;
        if plan.local.every > 0 && plan.mesh.axis(Axis::Replica) == 1 && plan.world() > 1 {
            return Err(PlanError::Local(format!(
                "islands are the ranks along replica, and the mesh {} has one: use --mesh replica={},..., or local.every = 0",
                plan.mesh,
                plan.mesh.workers().max(2)
            )));
        }
        if plan.compress.kind != CompressKind::None && plan.sharded().is_some() {
            return Err(PlanError::Compress(format!(
                "under parallel.zero = {} gradients go to the one rank that keeps them, as they are; use parallel.zero = 0, or \
                 compress.kind = \"none\"",
                plan.zero
            )));
        }
        if plan.servers.count > 0
            && let Some(axis) =
                Axis::ALL.iter().find(|axis| **axis != Axis::Data && plan.mesh.axis(**axis) > 1)
        {
            return Err(PlanError::Servers(format!(
                "every worker pushes the gradients of the whole model to the parameter servers, and the mesh {} splits it \
                 or its workers along {axis}: use only data, or sync.servers = 0",
                plan.mesh
            )));
        }
        let tensor = plan.mesh.axis(Axis::Tensor);
        let placement =
            Placement { mesh: plan.mesh.clone(), layout: plan.layout.clone(), ..Placement::whole() };
        let params = self.model.describe(vocab, placement).map_err(model)?;
        if tensor > 1 && !ModelConfig::splits(&params) {
            return Err(PlanError::Layout(
                "this model has no layers that can be split over the axis tensor; use data and pipe".into(),
            ));
        }
        let train = &self.train;
        if tensor > 1 && (train.device.backend != Backend::Cpu || train.precision != Precision::F32) {
            return Err(PlanError::Layout(format!(
                "layers can be split over the axis tensor only on the cpu in f32; use data and pipe with train.device = \
                 \"{}\" and train.precision = \"{}\"",
                train.device,
                train.precision.name()
            )));
        }
        if let Some(why) = self.model.host_only().filter(|_| train.device.backend != Backend::Cpu) {
            return Err(PlanError::Layout(format!(
                "{why}: a model of kind {} does not support train.device = \"{}\"",
                self.model.kind(),
                train.device
            )));
        }
        let most = params.iter().map(|param| param.len().div_ceil(SERVED)).max().unwrap_or(0);
        if plan.servers.count > most {
            return Err(PlanError::Servers(format!(
                "{} parameter servers are more than the parts that the model has for them: use at most {most}",
                plan.servers.count
            )));
        }
        for param in &params {
            plan.layout.check(&plan.mesh, &param.spec)?;
        }
        if plan.sequence {
            let times = self.model.samples().times();
            if let Some(time) = times.iter().find(|time| !time.is_multiple_of(tensor)) {
                return Err(PlanError::Layout(format!(
                    "parallel.sequence: {time} tokens cannot be divided evenly over the {tensor} ranks of the axis tensor"
                )));
            }
            let whole =
                ["heads", "mlp", "vocab"].into_iter().find(|dim| plan.layout.axis(&plan.mesh, dim).is_none());
            if let Some(dim) = whole {
                return Err(PlanError::Layout(format!(
                    "parallel.sequence: the dimension {dim} must be split over tensor too"
                )));
            }
        }
        let costs: Vec<f64> = self.model.costs(vocab).iter().map(|cost| cost.flops).collect();
        plan.cut(&costs).map(drop)
    }
}
