//! An API like Horovod's (Sergeev & Del Balso 2018, section 4) for your own training loop, with any Burn module and
//! any Burn optimizer. Six lines of the loop change.
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

mod agreement;
mod broadcast;
mod buckets;
mod gradients;
mod sync;

use crate::autograd::detached;
use crate::error::{Error, Result};
use crate::parallel::CommTime;
use buckets::{Buckets, param_specs};
use burn::module::Module;
use burn::optim::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::{DType, Tensor, TensorData};
use regatta_comm::{Element, Group, Options, ReduceOp};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use sync::GradientSync;

static WORLD: OnceLock<Group> = OnceLock::new();
/// Locked while the job is joined, so that it is joined only once if several threads call [`init`].
static JOINING: Mutex<()> = Mutex::new(());

/// Largest gradient bucket in bytes, as in PyTorch.
const BUCKET_BYTES: usize = 25 << 20;

/// Joins the job in which `regatta launch`, `torchrun`, `mpirun` or `srun` started this process, and returns the group
/// of all ranks. A process that was started alone is a job of one rank. `REGATTA_TRANSPORT` sets the transport, and
/// `REGATTA_DEADLINE_S` the deadline in seconds. Later calls return the same group.
///
/// # Errors
/// The environment variables contradict each other, or a peer cannot be reached in time.
pub fn init() -> Result<Group> {
    let _guard = JOINING.lock().unwrap_or_else(PoisonError::into_inner);
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

/// Number of ranks in the job; 1 before [`init`].
pub fn size() -> usize {
    WORLD.get().map_or(1, Group::size)
}

/// This process's rank among those on its host; 0 before [`init`].
pub fn local_rank() -> usize {
    WORLD.get().map_or(0, Group::local_rank)
}

/// Returns `model` with the parameters of rank `root`, bit for bit, including frozen ones, integers and booleans. All
/// ranks call it once, before training.
///
/// # Errors
/// [`init`] was not called, the models have different shapes, or communication fails.
pub fn broadcast_parameters<M: Module>(model: M, root: usize) -> Result<M> {
    broadcast::broadcast_over(world()?, model, root)
}

/// The mean of `tensor` over all ranks, on its device and of its type, without gradients. 16-bit floats are summed as
/// f32. All ranks call it with a tensor of the same shape.
///
/// # Errors
/// [`init`] was not called, the tensor is quantized, or communication fails.
pub fn all_reduce<const D: usize>(tensor: Tensor<D>) -> Result<Tensor<D>> {
    let (shape, device, dtype) = (tensor.dims(), tensor.device(), tensor.dtype());
    let data = detached(tensor).try_into_data();
    let data = data.map_err(|error| Error::Numeric(format!("the device failed: {error}")))?;
    let mean = match dtype {
        DType::F64 => TensorData::new(mean::<f64>(data)?, shape),
        DType::F32 | DType::F16 | DType::BF16 => {
            TensorData::new(mean::<f32>(data.convert_dtype(DType::F32))?, shape).convert_dtype(dtype)
        }
        _ => {
            return Err(Error::Usage(format!(
                "all_reduce takes a tensor of f32, f64, f16 or bf16, not {dtype:?}"
            )));
        }
    };
    Ok(Tensor::from_data(mean, (&device, dtype)))
}

fn mean<T: Element + burn::tensor::Element>(data: TensorData) -> Result<Vec<T>> {
    let values = data.try_into_vec::<T>();
    let mut values = values.map_err(|error| Error::Numeric(format!("a tensor cannot be read: {error:?}")))?;
    world()?.all_reduce(&mut values, ReduceOp::Mean)?;
    Ok(values)
}

/// Wraps a Burn optimizer so that every step applies gradients averaged over all ranks.
///
/// Gradients of f32 parameters on the host are averaged during backward. All others (on a GPU or another of Burn's
/// backends, of 16-bit floats, under gradient checkpointing) are averaged in [`step`](Self::step), through host
/// memory, and the average is copied to the parameter's device.
///
/// A parameter with a gradient on only some ranks gets the mean over all ranks, in which the others count as zero. A
/// parameter without a gradient on any rank is not updated; [`without_gradient`](Self::without_gradient) lists them.
///
/// ```no_run
/// # use burn::{nn::LinearConfig, optim::SgdConfig, prelude::*};
/// # fn main() -> regatta::Result<()> {
/// regatta::init()?;
/// let model = LinearConfig::new(8, 1).init(&Device::flex().autodiff());
/// let (optimizer, model) = regatta::DistributedOptimizer::new(SgdConfig::new().init(), model)?;
/// // Two backward passes per step: call `accumulate` after the first, `step` after the second.
/// let mut optimizer = optimizer.with_backward_passes_per_step(2);
/// # let _ = (&mut optimizer, model);
/// # Ok(()) }
/// ```
pub struct DistributedOptimizer {
    inner: ModuleOptimizer,
    sync: GradientSync,
    passes: usize,
    /// Number of calls of [`accumulate`](Self::accumulate) in this step.
    accumulated: usize,
    /// Whether no step has been taken yet.
    first: bool,
    missing: Vec<String>,
    last: CommTime,
}

impl DistributedOptimizer {
    /// Wraps `inner` and hooks the parameters of `model`, whose type and values do not change. All ranks call it with
    /// the same model.
    ///
    /// # Errors
    /// [`init`] was not called, the model has no trainable parameters or one of f64, or the models have different
    /// shapes.
    pub fn new<M: Module>(inner: ModuleOptimizer, model: M) -> Result<(Self, M)> {
        Self::over(world()?.clone(), inner, model)
    }

    /// As [`new`](Self::new), but averages over the ranks of `group`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn over<M: Module>(group: Group, inner: ModuleOptimizer, model: M) -> Result<(Self, M)> {
        let specs = param_specs(&model)?;
        if specs.is_empty() {
            return Err(Error::Usage(
                "the model has no trainable parameter: create it on a device with `.autodiff()`, and do not freeze all of it"
                    .into(),
            ));
        }
        agreement::same_shapes(&group, &specs)?;
        let layout = Arc::new(Buckets::new(specs, BUCKET_BYTES));
        let sync = GradientSync::new(group, layout)?;
        let model = sync.attach(model);
        let (missing, last) = (vec![], CommTime::default());
        Ok((Self { inner, sync, passes: 1, accumulated: 0, first: true, missing, last }, model))
    }

    /// Sums the gradients of `passes` backward passes before they are communicated. [`step`](Self::step) is called
    /// once after the last of them and applies their mean. If a parameter is not f32 on the host, call
    /// [`accumulate`](Self::accumulate) after each pass except the last. All ranks set the same number.
    pub fn with_backward_passes_per_step(mut self, passes: usize) -> Self {
        self.passes = passes.max(1);
        self.sync.set_passes(self.passes);
        self
    }

    /// Adds the gradients of a backward pass that is not the last of a step. Gradients of f32 parameters on the host
    /// were added during backward, so for them it does nothing; a loop that calls it works on every device.
    ///
    /// # Errors
    /// A parameter with a gradient was not trainable when this optimizer was created, or a device fails.
    pub fn accumulate<M: Module>(&mut self, model: &M, grads: &GradientsParams) -> Result<()> {
        self.accumulated += 1;
        gradients::supply(&self.sync, model, grads).map(drop)
    }

    /// Waits for the averaged gradients and updates the parameters with learning rate `lr`. `grads` are the gradients
    /// of the (last) backward pass; the averages replace them. Every parameter that has a gradient on any rank is
    /// updated; to exclude one, freeze it.
    ///
    /// The first step also checks that all ranks began with the same parameters.
    ///
    /// # Errors
    /// A gradient was not averaged (the error names the parameter), there is no gradient at all, the ranks began with
    /// different parameters, or communication fails because a rank died or stalled.
    pub fn step<M: Module>(
        &mut self,
        lr: impl Into<ModuleLearningRate>,
        model: M,
        grads: GradientsParams,
    ) -> Result<M> {
        let supplied = gradients::supply(&self.sync, &model, &grads)?;
        let accumulated = std::mem::take(&mut self.accumulated);
        if let Some(index) = supplied
            && accumulated + 1 != self.passes
        {
            return Err(Error::Usage(format!(
                "{} is not f32 on the host, so its gradient is not seen during backward, and a step has {} backward passes: \
                 call accumulate() with the gradients of each except the last; it was called {accumulated} times",
                self.sync.layout().specs[index].path,
                self.passes
            )));
        }
        self.last = self.sync.finish()?;
        if std::mem::take(&mut self.first) {
            agreement::same_passes(self.sync.group(), self.passes)?;
            agreement::same_start(self.sync.group(), self.sync.layout(), &model)?;
        }
        let (grads, missing) = gradients::replace(&self.sync, &model, grads, 1.0 / self.passes as f32);
        self.missing = missing;
        self.sync.reset();
        if self.missing.len() == self.sync.layout().specs.len() {
            return Err(Error::Usage(
                "no parameter has a gradient on any rank: are these the gradients of the model that was given to \
                 DistributedOptimizer?"
                    .into(),
            ));
        }
        Ok(self.inner.step(lr, model, grads))
    }

    /// The paths of the trainable parameters that had no gradient on any rank in the last step and were not updated.
    /// The same on all ranks.
    pub fn without_gradient(&self) -> &[String] {
        &self.missing
    }

    /// The time that communication took in the last step.
    pub fn comm_time(&self) -> CommTime {
        self.last
    }

    /// The wrapped optimizer, for example to save its state.
    pub fn inner(&self) -> &ModuleOptimizer {
        &self.inner
    }

    /// The wrapped optimizer, for example to load its state.
    pub fn inner_mut(&mut self) -> &mut ModuleOptimizer {
        &mut self.inner
    }
}
