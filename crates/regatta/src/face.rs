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

mod agreement;
mod broadcast;
mod exchange;

use crate::autograd::detached;
use crate::error::{Error, Result};
use crate::parallel::{Buckets, CommTime, GradientSync, param_specs};
use burn::module::Module;
use burn::optim::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::{DType, Tensor, TensorData};
use regatta_comm::{Element, Group, Options, ReduceOp};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

static WORLD: OnceLock<Group> = OnceLock::new();
/// Held while the job is joined: it is joined once, whatever the number of threads that call [`init`].
static JOINING: Mutex<()> = Mutex::new(());

/// Gradient buckets of at most this many bytes, as in PyTorch.
const BUCKET_BYTES: usize = 25 << 20;

/// Joins the job that this process was started in: by `regatta launch`, `torchrun`, `mpirun` or `srun`. Alone,
/// it is a job of one. The transport can be set by `REGATTA_TRANSPORT`, the deadline by `REGATTA_DEADLINE_S`.
///
/// # Errors
/// An environment that contradicts itself, or peers that cannot be reached in time.
pub fn init() -> Result<Group> {
    let _one_at_a_time = JOINING.lock().unwrap_or_else(PoisonError::into_inner);
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

/// Gives `model` the parameters of rank `root`, bit for bit: frozen ones, integers and booleans included. Call it once,
/// before training.
///
/// # Errors
/// Before [`init`], models of different shapes, or a failure of communication.
pub fn broadcast_parameters<M: Module>(model: M, root: usize) -> Result<M> {
    broadcast::broadcast_over(world()?, model, root)
}

/// The mean of `tensor` over all ranks, on its device and in its type, not differentiated. 16-bit numbers are summed as
/// f32.
///
/// # Errors
/// Before [`init`], a tensor of quantized numbers, or a failure of communication.
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
/// Parameters of f32 on the host are averaged while backward goes on. All others - on a GPU or another of Burn's
/// backends, of 16-bit numbers, under gradient checkpointing - are averaged in [`step`](Self::step), through host memory, and
/// their average is put on the parameter's own device.
///
/// A parameter that has a gradient on some ranks only gets the mean over all ranks, the others counting as zero. One without
/// a gradient on any rank is left as it is; [`without_gradient`](Self::without_gradient) tells which.
pub struct DistributedOptimizer {
    inner: ModuleOptimizer,
    sync: GradientSync,
    passes: usize,
    /// Backward passes of this step that [`accumulate`](Self::accumulate) was given.
    handed: usize,
    /// Whether no step has been taken yet.
    first: bool,
    missing: Vec<String>,
    last: CommTime,
}

impl DistributedOptimizer {
    /// Wraps `inner` and hooks the parameters of `model`, whose type and numbers stay as they are. All ranks call it with
    /// the same model.
    ///
    /// # Errors
    /// Before [`init`], a model without trainable parameters or with one of f64, models of different shapes.
    pub fn new<M: Module>(inner: ModuleOptimizer, model: M) -> Result<(Self, M)> {
        Self::over(world()?.clone(), inner, model)
    }

    /// As [`new`](Self::new), averaging over the ranks of `group` alone.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn over<M: Module>(group: Group, inner: ModuleOptimizer, model: M) -> Result<(Self, M)> {
        let specs = param_specs(&model)?;
        if specs.is_empty() {
            return Err(Error::Usage(
                "the model has no trainable parameter: make it on a device with `.autodiff()`, and do not freeze all of it"
                    .into(),
            ));
        }
        agreement::same_shapes(&group, &specs)?;
        let layout = Arc::new(Buckets::new(specs, BUCKET_BYTES));
        let sync = GradientSync::new(group, layout)?;
        let model = sync.attach(model);
        let (missing, last) = (vec![], CommTime::default());
        Ok((Self { inner, sync, passes: 1, handed: 0, first: true, missing, last }, model))
    }

    /// Adds the gradients of `passes` backward passes up before they are communicated; [`step`](Self::step)
    /// is then called once after so many, and applies their mean. Where parameters are not f32 on the host, each pass but
    /// the last is handed to [`accumulate`](Self::accumulate). All ranks set the same number.
    pub fn with_backward_passes_per_step(mut self, passes: usize) -> Self {
        self.passes = passes.max(1);
        self.sync.set_passes(self.passes);
        self
    }

    /// Adds the gradients of one backward pass that is not the last of a step. Those of f32 parameters on the host have been
    /// added during backward, so there it does nothing; a loop that calls it runs on every device.
    ///
    /// # Errors
    /// A gradient of a parameter that was not trainable when this optimizer was made, or a device that fails.
    pub fn accumulate<M: Module>(&mut self, model: &M, grads: &GradientsParams) -> Result<()> {
        self.handed += 1;
        exchange::supply(&self.sync, model, grads).map(drop)
    }

    /// Waits for the averaged gradients and takes a step with them. `grads` are the gradients of the (last) backward pass;
    /// their numbers are replaced by the averages. Every parameter that has a gradient on any rank is updated; to keep one
    /// as it is, freeze it.
    ///
    /// The first step also checks that all ranks began with the same parameters.
    ///
    /// # Errors
    /// A parameter whose gradient was not averaged, which is named; no gradient at all; ranks that began with different
    /// parameters; a failure of communication: a rank that died or stalled.
    pub fn step<M: Module>(
        &mut self,
        lr: impl Into<ModuleLearningRate>,
        model: M,
        grads: GradientsParams,
    ) -> Result<M> {
        let supplied = exchange::supply(&self.sync, &model, &grads)?;
        let handed = std::mem::take(&mut self.handed);
        if let Some(index) = supplied
            && handed + 1 != self.passes
        {
            return Err(Error::Usage(format!(
                "{} is not f32 on the host, so that its gradient is not seen during backward, and a step is of {} backward \
                 passes: hand the gradients of each but the last to accumulate(), which was called {handed} times",
                self.sync.layout().specs[index].path,
                self.passes
            )));
        }
        self.last = self.sync.finish()?;
        if std::mem::take(&mut self.first) {
            agreement::same_passes(self.sync.group(), self.passes)?;
            agreement::same_start(self.sync.group(), self.sync.layout(), &model)?;
        }
        let (grads, missing) = exchange::replace(&self.sync, &model, grads, 1.0 / self.passes as f32);
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

    /// The trainable parameters that had no gradient on any rank in the last step, and were left as they are. The same on
    /// all ranks.
    pub fn without_gradient(&self) -> &[String] {
        &self.missing
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
