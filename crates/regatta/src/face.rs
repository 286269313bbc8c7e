//! The small face for a loop of your own, after Horovod (Sergeev & Del Balso 2018, section 4): any Burn module,
//! any Burn optimizer, six changed lines.
//!
//! ```no_run
//! # use burn::{nn::{Linear, LinearConfig}, optim::{AdamWConfig, GradientsParams}, prelude::*};
//! # fn main() -> regatta::Result<()> {
//! regatta::init()?;
//! let device = Device::flex().autodiff();
//! let model = LinearConfig::new(8, 1).init(&device);
//! let model = regatta::broadcast_parameters(model, 0)?;
//! let (mut optimizer, mut model) = regatta::DistributedOptimizer::new(AdamWConfig::new().init(), model)?;
//! for step in 0..10 {
//!     let x = Tensor::<2>::ones([4, 8], &device) * (regatta::rank() + step) as f32;
//!     let grads = GradientsParams::from_grads(model.forward(x).mean().backward(), &model);
//!     model = optimizer.step(1e-3, model, grads)?; // gradients averaged over the ranks during backward
//! }
//! # Ok(()) }
//! ```

use crate::autograd::{device, to_vec};
use crate::error::{Error, Result};
use crate::parallel::{Buckets, CommTime, GradientSync, Keep, param_specs};
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::{Tensor, TensorData};
use regatta_comm::{Group, Options, ReduceOp};
use std::sync::{Arc, OnceLock};

static WORLD: OnceLock<Group> = OnceLock::new();

/// Gradient buckets of at most this many bytes, as in PyTorch.
const BUCKET_BYTES: usize = 25 << 20;

/// Joins the job that this process was started in: by `regatta launch`, `torchrun`, `mpirun` or `srun`. Alone,
/// it is a job of one. The transport can be set by `REGATTA_TRANSPORT`, the deadline by `REGATTA_DEADLINE_S`.
///
/// # Errors
/// An environment that contradicts itself, or peers that cannot be reached in time.
pub fn init() -> Result<Group> {
    if let Some(group) = WORLD.get() {
        return Ok(group.clone());
    }
    let group = Group::from_env(&Options::from_env()?)?;
    Ok(WORLD.get_or_init(|| group).clone())
}

fn world() -> Result<&'static Group> {
    WORLD.get().ok_or_else(|| Error::Usage("call regatta::init() first".into()))
}

/// This process's rank, 0 to `size() - 1`; 0 before [`init`].
pub fn rank() -> usize {
    WORLD.get().map_or(0, Group::rank)
}

/// Ranks in the job; 1 before [`init`].
pub fn size() -> usize {
    WORLD.get().map_or(1, Group::size)
}

/// This process's rank among those on its host; 0 before [`init`].
pub fn local_rank() -> usize {
    WORLD.get().map_or(0, Group::local_rank)
}

/// Gives `model` the parameters of rank `root`, frozen ones included. Call it once, before training.
///
/// # Errors
/// Before [`init`], a parameter that is not f32, or a failure of communication.
pub fn broadcast_parameters<M: Module>(model: M, root: usize) -> Result<M> {
    let mut mapper = BroadcastParameters { group: world()?, root, error: None };
    let model = model.map(&mut mapper);
    mapper.error.map_or(Ok(model), Err)
}

struct BroadcastParameters<'a> {
    group: &'a Group,
    root: usize,
    error: Option<Error>,
}

impl ModuleMapper for BroadcastParameters<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.error.is_some() {
            return param;
        }
        let (id, tensor, mapper) = param.consume();
        let tensor = match broadcast(self.group, tensor.clone(), self.root) {
            Ok(fresh) => fresh,
            Err(error) => {
                self.error = Some(error);
                tensor
            }
        };
        Param::from_mapped_value(id, tensor, mapper)
    }
}

/// A new leaf with the values of `root`, on the same device and with the same requirement of gradients.
fn broadcast<const D: usize>(group: &Group, tensor: Tensor<D>, root: usize) -> Result<Tensor<D>> {
    let (shape, device, tracked) = (tensor.dims(), tensor.device(), tensor.is_require_grad());
    let mut values = floats(tensor)?;
    group.broadcast(&mut values, root)?;
    let fresh = Tensor::from_data(TensorData::new(values, shape), &device);
    Ok(if tracked { fresh.require_grad() } else { fresh })
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    let dtype = tensor.dtype();
    to_vec(tensor)
        .ok_or_else(|| Error::Usage(format!("a tensor of {dtype:?} where Regatta takes f32: cast it")))
}

/// The mean of `tensor` over all ranks, not differentiated.
///
/// # Errors
/// Before [`init`], a tensor that is not f32, or a failure of communication.
pub fn all_reduce<const D: usize>(tensor: Tensor<D>) -> Result<Tensor<D>> {
    let (shape, device) = (tensor.dims(), tensor.device());
    let mut values = floats(tensor)?;
    world()?.all_reduce(&mut values, ReduceOp::Mean)?;
    Ok(Tensor::from_data(TensorData::new(values, shape), &device))
}

/// Wraps a Burn optimizer so that every step applies gradients averaged over all ranks. The averaging runs
/// while backward goes on.
pub struct DistributedOptimizer {
    inner: ModuleOptimizer,
    sync: GradientSync,
    passes: usize,
    last: CommTime,
}

impl DistributedOptimizer {
    /// Wraps `inner` and hooks the parameters of `model`, whose type and numbers stay as they are. Every rank
    /// must pass the same model.
    ///
    /// # Errors
    /// Before [`init`], or a trainable parameter that is not f32.
    pub fn new<M: Module>(inner: ModuleOptimizer, model: M) -> Result<(Self, M)> {
        Self::over(world()?.clone(), inner, model)
    }

    /// As [`new`](Self::new), averaging over the ranks of `group` alone.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn over<M: Module>(group: Group, inner: ModuleOptimizer, model: M) -> Result<(Self, M)> {
        let layout = Arc::new(Buckets::new(param_specs(&model)?, BUCKET_BYTES));
        let sync = GradientSync::new(group, layout, Keep::Both)?;
        let model = sync.attach(model);
        Ok((Self { inner, sync, passes: 1, last: CommTime::default() }, model))
    }

    /// Adds the gradients of `passes` backward passes up before they are communicated; [`step`](Self::step)
    /// is then called once after so many, and applies their mean.
    pub fn with_backward_passes_per_step(mut self, passes: usize) -> Self {
        self.passes = passes.max(1);
        self.sync.set_passes(self.passes);
        self
    }

    /// Waits for the averaged gradients and takes a step with them. `grads` says which parameters to update; its
    /// numbers are replaced by the averages.
    ///
    /// # Errors
    /// A failure of communication: a rank that died or stalled.
    pub fn step<M: Module>(
        &mut self,
        lr: impl Into<ModuleLearningRate>,
        model: M,
        grads: GradientsParams,
    ) -> Result<M> {
        self.last = self.sync.finish()?;
        let mut replace = Replace { sync: &self.sync, grads, path: vec![], scale: 1.0 / self.passes as f32 };
        model.visit(&mut replace);
        let grads = replace.grads;
        self.sync.reset();
        Ok(self.inner.step(lr, model, grads))
    }

    /// What communication took in the last step.
    pub fn comm_time(&self) -> CommTime {
        self.last
    }

    /// The wrapped optimizer, as to save its state.
    pub fn inner(&self) -> &ModuleOptimizer {
        &self.inner
    }

    /// The wrapped optimizer, as to load its state.
    pub fn inner_mut(&mut self) -> &mut ModuleOptimizer {
        &mut self.inner
    }
}

struct Replace<'a> {
    sync: &'a GradientSync,
    grads: GradientsParams,
    path: Vec<String>,
    scale: f32,
}

impl ModuleVisitor for Replace<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(index) = self.sync.layout().find(&self.path.join(".")) else { return };
        let Some(mut values) = self.sync.gradient(index) else { return };
        if self.scale != 1.0 {
            values.iter_mut().for_each(|x| *x *= self.scale);
        }
        let shape = param.base().dims();
        self.grads.register(param.id, Tensor::<D>::from_data(TensorData::new(values, shape), &device()));
    }
}
