//! Synchronous data parallelism: gradients are gathered into buckets during backward and averaged over the
//! ranks while backward goes on (Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data
//! Parallel Training", section 3.2).
//!
//! A hook on every parameter copies its gradient into the bucket as soon as backward has completed it. A full
//! bucket is handed to the group's communication thread. Buckets start in the same order on every rank,
//! whatever the order in which they fill, so the ranks never wait for different operations.
//!
//! Hooks see parameters of f32 on the host. Every other gradient (on another backend, of 16-bit numbers, under gradient
//! checkpointing, of a model that was never hooked) is handed over after backward ([`GradientSync::supply`]) and takes the
//! same way from there.

use super::buckets::Buckets;
use super::gradients::CommTime;
use crate::autograd::{Gradient, GradientHook, Ladder, can_hook, hook_at};
use crate::error::{Error, Result};
use burn::module::{Module, Param, Reparameterization, Reparameterizer};
use burn::tensor::Tensor;
use regatta_comm::{Buffer, Group, Pending, ReduceOp};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The gradients of one model on one rank, averaged over the ranks of a group.
#[derive(Clone)]
pub struct GradientSync {
    shared: Arc<Shared>,
}

struct Shared {
    group: Group,
    layout: Arc<Buckets>,
    state: Mutex<State>,
}

struct State {
    ladder: Ladder,
    /// Whether the last event was in a backward pass, so that the next use of a parameter begins a forward.
    in_backward: bool,
    /// Backward passes whose gradients are added up before they are communicated.
    passes: usize,
    params: Vec<Progress>,
    buckets: Vec<Bucket>,
    /// Buckets before this one have been handed to the communication thread.
    next: usize,
    exposed: Duration,
    error: Option<String>,
}

/// How far the gradient of one parameter is in this step.
#[derive(Default, Clone)]
struct Progress {
    /// Uses in forward that backward has not answered yet.
    open: usize,
    /// Backward passes that have completed it.
    passes: usize,
    /// Whether there is a gradient of this step.
    written: bool,
    /// Whether it came from a hook.
    hooked: bool,
}

enum Slot {
    /// In our hands: being filled, or averaged and ready to read.
    Here(Buffer<f32>),
    /// Being averaged.
    Flying(Pending<Buffer<f32>>),
    /// Lost to a communication error.
    Lost,
}

struct Bucket {
    slot: Slot,
    params: Vec<usize>,
    /// Parameters that are not complete yet.
    missing: usize,
}

impl GradientSync {
    /// Buckets for the parameters of `layout`, in memory that the transport of `group` reduces in place.
    ///
    /// # Errors
    /// When the transport has no memory for them.
    pub fn new(group: Group, layout: Arc<Buckets>) -> Result<Self> {
        let buckets = (0..layout.bucket_lens.len()).map(|index| {
            let params: Vec<usize> = layout.in_bucket(index).collect();
            // One more element a parameter: whether any rank had a gradient for it.
            let buffer = group.buffer(layout.bucket_lens[index] + params.len())?;
            Ok(Bucket { slot: Slot::Here(buffer), missing: params.len(), params })
        });
        let state = State {
            ladder: Ladder::new(),
            in_backward: true,
            passes: 1,
            params: vec![Progress::default(); layout.specs.len()],
            buckets: buckets.collect::<Result<_>>()?,
            next: 0,
            exposed: Duration::ZERO,
            error: None,
        };
        Ok(Self { shared: Arc::new(Shared { group, layout, state: Mutex::new(state) }) })
    }

    /// Hooks every parameter of `model` that can be. The model's type, its parameter paths and its numbers stay as they are.
    pub fn attach<M: Module>(&self, model: M) -> M {
        model.apply_reparameterization(Attach { sync: self })
    }

    /// The group over which gradients are averaged.
    pub fn group(&self) -> &Group {
        &self.shared.group
    }

    /// Where each parameter's gradient lies.
    pub fn layout(&self) -> &Arc<Buckets> {
        &self.shared.layout
    }

    /// How many backward passes make a step; nothing is communicated before the last of them.
    pub fn set_passes(&self, passes: usize) {
        self.shared.lock().passes = passes.max(1);
    }

    /// Whether a hook has seen a gradient of the parameter at `index` in this step.
    pub fn is_hooked(&self, index: usize) -> bool {
        self.shared.lock().params[index].hooked
    }

    /// The gradient of the parameter at `index` from one backward pass, where no hook sees it.
    pub fn supply(&self, index: usize, values: &[f32]) {
        let mut state = self.shared.lock();
        let state = &mut *state;
        if self.shared.add(state, index, Some(values)) {
            self.shared.complete(state, index);
        }
    }

    /// Waits until every bucket is averaged. Buckets that backward left incomplete (parameters without a
    /// gradient) are completed with zeros first.
    ///
    /// # Errors
    /// The first error of communication on this rank.
    pub fn finish(&self) -> Result<CommTime> {
        let mut state = self.shared.lock();
        while state.next < state.buckets.len() {
            self.shared.launch(&mut state);
        }
        let waiting = Instant::now();
        let mut time = CommTime::default();
        for bucket in &mut state.buckets {
            bucket.slot = match std::mem::replace(&mut bucket.slot, Slot::Lost) {
                Slot::Flying(pending) => {
                    let (buffer, timing) = pending.wait_timed()?;
                    time.busy += timing.finished - timing.started;
                    Slot::Here(buffer)
                }
                slot => slot,
            };
        }
        time.exposed = waiting.elapsed() + std::mem::take(&mut state.exposed);
        match state.error.take() {
            Some(problem) => Err(Error::Usage(problem)),
            None => Ok(time),
        }
    }

    /// The averaged gradient of the parameter at `index` in the layout, or nothing where no rank had one.
    pub fn gradient(&self, index: usize) -> Option<Vec<f32>> {
        let state = self.shared.lock();
        let place = &self.shared.layout.places[index];
        let bucket = &state.buckets[place.bucket];
        let Slot::Here(buffer) = &bucket.slot else { return None };
        let flags = &buffer[self.shared.layout.bucket_lens[place.bucket]..];
        let position = bucket.params.iter().position(|&param| param == index)?;
        (flags[position] > 0.0).then(|| buffer[place.range.clone()].to_vec())
    }

    /// Begins the next step: the buckets' numbers are no longer needed.
    pub fn reset(&self) {
        let mut state = self.shared.lock();
        state.next = 0;
        state.in_backward = true;
        state.params.fill(Progress::default());
        for bucket in &mut state.buckets {
            bucket.missing = bucket.params.len();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A parameter is used in forward: hooks it just above the deepest node so far.
    fn used<const D: usize>(self: &Arc<Self>, index: usize, base: Tensor<D>) -> Tensor<D> {
        let mut state = self.lock();
        if std::mem::take(&mut state.in_backward) {
            state.ladder.restart();
        }
        state.params[index].open += 1;
        let anchor = state.ladder.deepest();
        drop(state);
        match anchor {
            Some(anchor) => hook_at(base, anchor, Arc::new(ParamHook { shared: self.clone(), index })),
            None => base,
        }
    }

    /// Backward has come to one use of a parameter.
    fn arrived(&self, index: usize, gradient: Gradient<'_>) {
        let mut state = self.lock();
        let state = &mut *state;
        state.in_backward = true;
        state.params[index].hooked = true;
        if !gradient.with(|values| self.add(state, index, values)) {
            return;
        }
        let progress = &mut state.params[index];
        progress.open = progress.open.saturating_sub(1);
        if progress.open == 0 {
            self.complete(state, index);
        }
    }

    /// Adds to what the parameter's bucket holds of this step. Whether it could.
    fn add(&self, state: &mut State, index: usize, values: Option<&[f32]>) -> bool {
        let (place, path) = (&self.layout.places[index], &self.layout.specs[index].path);
        let Slot::Here(buffer) = &mut state.buckets[place.bucket].slot else {
            state.error.get_or_insert_with(|| {
                format!(
                    "parameter {path} got a gradient after its bucket had been sent: more backward passes ran than \
                     one step was set up for; call step() after each, or set with_backward_passes_per_step"
                )
            });
            return false;
        };
        let target = &mut buffer[place.range.clone()];
        let Some(values) = values.filter(|values| values.len() == target.len()) else {
            state.error.get_or_insert_with(|| format!("the gradient of {path} is not f32 of its shape"));
            return false;
        };
        if std::mem::replace(&mut state.params[index].written, true) {
            target.iter_mut().zip(values).for_each(|(sum, x)| *sum += x);
        } else {
            target.copy_from_slice(values);
        }
        true
    }

    /// One backward pass has completed the parameter's gradient: sends the buckets whose turn it is.
    fn complete(&self, state: &mut State, index: usize) {
        let progress = &mut state.params[index];
        progress.passes += 1;
        if progress.passes != state.passes {
            return;
        }
        state.buckets[self.layout.places[index].bucket].missing -= 1;
        while state.buckets.get(state.next).is_some_and(|bucket| bucket.missing == 0) {
            self.launch(state);
        }
    }

    /// Hands the next bucket to the communication thread.
    fn launch(&self, state: &mut State) {
        let index = state.next;
        state.next += 1;
        let bucket = &mut state.buckets[index];
        let Slot::Here(mut buffer) = std::mem::replace(&mut bucket.slot, Slot::Lost) else { return };
        let flags = self.layout.bucket_lens[index];
        for (position, &param) in bucket.params.iter().enumerate() {
            let written = state.params[param].written;
            buffer[flags + position] = f32::from(u8::from(written));
            if !written {
                buffer[self.layout.places[param].range.clone()].fill(0.0);
            }
        }
        bucket.slot = if self.group.size() == 1 {
            Slot::Here(buffer)
        } else {
            Slot::Flying(self.group.all_reduce_async(buffer, ReduceOp::Mean))
        };
    }
}

struct ParamHook {
    shared: Arc<Shared>,
    index: usize,
}

impl GradientHook for ParamHook {
    fn call(&self, gradient: Gradient<'_>) {
        self.shared.arrived(self.index, gradient);
    }
}

struct Attach<'a> {
    sync: &'a GradientSync,
}

impl Reparameterizer for Attach<'_> {
    type Reparam = Hooked;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Hooked>) {
        let index = self.sync.shared.layout.find(path).filter(|_| can_hook(&param.base()));
        let hooked = index.map(|index| Hooked { sync: self.sync.clone(), index });
        (param, hooked)
    }
}

/// Attached to a parameter: every use of its value in a differentiated forward gets a hook.
#[derive(Module, Debug)]
struct Hooked {
    #[module(skip)]
    sync: GradientSync,
    #[module(skip)]
    index: usize,
}

impl Reparameterization for Hooked {
    const NAME: &'static str = "gradient_sync";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        if base.is_autodiff() { self.sync.shared.used(self.index, base) } else { base }
    }
}

impl std::fmt::Debug for GradientSync {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let layout = &self.shared.layout;
        write!(f, "GradientSync({} parameters in {} buckets)", layout.specs.len(), layout.bucket_lens.len())
    }
}
