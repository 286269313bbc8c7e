//! Synchronous data parallelism: gradients are copied into buckets during backward and averaged over the ranks while
//! backward continues (Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training",
//! section 3.2).
//!
//! A hook on every parameter copies its gradient into the bucket as soon as backward has completed it. A full bucket
//! is submitted to the group's communication thread. Buckets are submitted in the same order on every rank, even if
//! they fill in another order, so the ranks never wait for different operations.
//!
//! Hooks see f32 parameters on the host. All other gradients (on another backend, of 16-bit floats, under gradient
//! checkpointing, of a model that was not hooked) are added after backward ([`GradientSync::supply`]) and averaged in
//! the same way.

use super::buckets::Buckets;
use crate::autograd::{AnchorChain, Gradient, GradientHook, can_hook, hook_at};
use crate::error::{Error, Result};
use crate::parallel::exchange::{CommTime, GradientExchange, MeanExchange};
use burn::module::{Module, Param, Reparameterization, Reparameterizer};
use burn::tensor::Tensor;
use regatta_comm::{Buffer, Group};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

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
    anchors: AnchorChain,
    /// Whether the last event was in a backward pass, so that the next use of a parameter begins a forward pass.
    in_backward: bool,
    /// Number of backward passes whose gradients are summed before they are communicated.
    passes: usize,
    params: Vec<Progress>,
    buckets: Vec<Bucket>,
    /// The first bucket that was not yet submitted to the communication thread.
    next: usize,
    exchange: MeanExchange,
    error: Option<String>,
}

/// The progress of one parameter's gradient in this step.
#[derive(Default, Clone)]
struct Progress {
    /// Number of uses in forward that backward has not reached yet.
    open: usize,
    /// Number of backward passes that have completed it.
    passes: usize,
    /// Whether the bucket has a gradient of this step.
    written: bool,
    /// Whether the gradient came from a hook.
    hooked: bool,
}

struct Bucket {
    /// The buffer that is being filled; none from the submission until it is filled again.
    filling: Option<Buffer<f32>>,
    params: Vec<usize>,
    /// Number of parameters whose gradients are not complete yet.
    missing: usize,
}

impl GradientSync {
    /// Creates buckets for the parameters of `layout`, in memory that the transport of `group` reduces in place.
    ///
    /// # Errors
    /// The transport has no memory for them.
    pub fn new(group: Group, layout: Arc<Buckets>) -> Result<Self> {
        let params: Vec<Vec<usize>> =
            (0..layout.bucket_lens.len()).map(|index| layout.in_bucket(index).collect()).collect();
        // One more element per parameter: a flag whether any rank had a gradient for it.
        let lens = layout.bucket_lens.iter().zip(&params).map(|(len, params)| len + params.len()).collect();
        let mut exchange = MeanExchange::new(group.clone(), lens);
        let bucket = |(index, params): (usize, Vec<usize>)| {
            Ok(Bucket { filling: Some(exchange.buffer(index)?), missing: params.len(), params })
        };
        let state = State {
            anchors: AnchorChain::new(),
            in_backward: true,
            passes: 1,
            params: vec![Progress::default(); layout.specs.len()],
            buckets: params.into_iter().enumerate().map(bucket).collect::<Result<_>>()?,
            next: 0,
            exchange,
            error: None,
        };
        Ok(Self { shared: Arc::new(Shared { group, layout, state: Mutex::new(state) }) })
    }

    /// Hooks every parameter of `model` for which that is possible. The model's type, parameter paths and values do
    /// not change.
    pub fn attach<M: Module>(&self, model: M) -> M {
        model.apply_reparameterization(Attach { sync: self })
    }

    /// The group over which gradients are averaged.
    pub fn group(&self) -> &Group {
        &self.shared.group
    }

    /// The place of each parameter's gradient.
    pub fn layout(&self) -> &Arc<Buckets> {
        &self.shared.layout
    }

    /// Sets the number of backward passes in a step; nothing is communicated before the last of them.
    pub fn set_passes(&self, passes: usize) {
        self.shared.lock().passes = passes.max(1);
    }

    /// Whether a hook has seen a gradient of the parameter at `index` in this step.
    pub fn is_hooked(&self, index: usize) -> bool {
        self.shared.lock().params[index].hooked
    }

    /// Adds the gradient of the parameter at `index` from one backward pass, which no hook has seen.
    pub fn supply(&self, index: usize, values: &[f32]) {
        let mut state = self.shared.lock();
        let state = &mut *state;
        if self.shared.add(state, index, Some(values)) {
            self.shared.complete(state, index);
        }
    }

    /// Waits until every bucket is averaged. Parameters without a gradient count as zero.
    ///
    /// # Errors
    /// The first error of communication on this rank.
    pub fn finish(&self) -> Result<CommTime> {
        let mut state = self.shared.lock();
        while state.next < state.buckets.len() {
            self.shared.submit(&mut state);
        }
        let waiting = Instant::now();
        state.exchange.finish()?;
        let mut time = state.exchange.take_time();
        time.exposed = waiting.elapsed();
        match state.error.take() {
            Some(problem) => Err(Error::Usage(problem)),
            None => Ok(time),
        }
    }

    /// The averaged gradient of the parameter at `index`; none if no rank had one.
    pub fn gradient(&self, index: usize) -> Option<Vec<f32>> {
        let state = self.shared.lock();
        let place = &self.shared.layout.places[index];
        let bucket = &state.buckets[place.bucket];
        let buffer = state.exchange.all(place.bucket)?;
        let flags = &buffer[self.shared.layout.bucket_lens[place.bucket]..];
        let position = bucket.params.iter().position(|&param| param == index)?;
        (flags[position] > 0.0).then(|| buffer[place.range.clone()].to_vec())
    }

    /// Begins the next step. The averages may be overwritten.
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

    /// Called when a parameter is used in forward: hooks it just above the deepest node so far.
    fn used<const D: usize>(self: &Arc<Self>, index: usize, base: Tensor<D>) -> Tensor<D> {
        let mut state = self.lock();
        if std::mem::take(&mut state.in_backward) {
            state.anchors.restart();
        }
        state.params[index].open += 1;
        let anchor = state.anchors.deepest();
        drop(state);
        match anchor {
            Some(anchor) => hook_at(base, anchor, Arc::new(ParamHook { shared: self.clone(), index })),
            None => base,
        }
    }

    /// Called when backward has reached one use of a parameter.
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

    /// Adds `values` to the parameter's gradient in its bucket. Returns false, and records the error, if that fails.
    fn add(&self, state: &mut State, index: usize, values: Option<&[f32]>) -> bool {
        let (place, path) = (&self.layout.places[index], &self.layout.specs[index].path);
        if place.bucket < state.next {
            state.error.get_or_insert_with(|| {
                format!(
                    "parameter {path} got a gradient after its bucket had been sent: more backward passes ran than \
                     one step was set up for; call step() after each, or set with_backward_passes_per_step"
                )
            });
            return false;
        }
        let Some(values) = values.filter(|values| values.len() == place.range.len()) else {
            state
                .error
                .get_or_insert_with(|| format!("the gradient of {path} is not f32 or has another shape"));
            return false;
        };
        let again = std::mem::replace(&mut state.params[index].written, true);
        match self.filling(state, place.bucket) {
            Ok(buffer) => {
                let target = &mut buffer[place.range.clone()];
                if again {
                    target.iter_mut().zip(values).for_each(|(sum, x)| *sum += x);
                } else {
                    target.copy_from_slice(values);
                }
                true
            }
            Err(error) => {
                state.error.get_or_insert_with(|| error.to_string());
                false
            }
        }
    }

    /// Called when one backward pass has completed the parameter's gradient: submits the buckets that are complete.
    fn complete(&self, state: &mut State, index: usize) {
        let progress = &mut state.params[index];
        progress.passes += 1;
        if progress.passes != state.passes {
            return;
        }
        state.buckets[self.layout.places[index].bucket].missing -= 1;
        while state.buckets.get(state.next).is_some_and(|bucket| bucket.missing == 0) {
            self.submit(state);
        }
    }

    /// Submits the next bucket to the communication thread.
    fn submit(&self, state: &mut State) {
        let index = state.next;
        state.next += 1;
        let flags = self.layout.bucket_lens[index];
        let pushed = self.filling(state, index).map(drop).and_then(|()| {
            let bucket = &mut state.buckets[index];
            let Some(mut buffer) = bucket.filling.take() else { return Ok(()) };
            for (position, &param) in bucket.params.iter().enumerate() {
                let written = state.params[param].written;
                buffer[flags + position] = f32::from(u8::from(written));
                if !written {
                    buffer[self.layout.places[param].range.clone()].fill(0.0);
                }
            }
            state.exchange.push(index, buffer)
        });
        if let Err(error) = pushed {
            state.error.get_or_insert_with(|| error.to_string());
        }
    }

    /// The buffer of a bucket that is to be filled.
    fn filling<'a>(&self, state: &'a mut State, bucket: usize) -> Result<&'a mut Buffer<f32>> {
        let State { buckets, exchange, .. } = state;
        match &mut buckets[bucket].filling {
            Some(buffer) => Ok(buffer),
            empty => Ok(empty.insert(exchange.buffer(bucket)?)),
        }
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
