//! Gradient hooks: the identity forward, user code on the gradient in backward, at a chosen depth of the tape.
//!
//! Burn runs the backward pass by descending depth in the graph, not by time. A hook straight on a parameter
//! has depth one and would fire after everything else. A second parent that is not differentiated but lies
//! deep, taken from a [`Ladder`], gives the hook a depth just below the operation that uses the parameter, so
//! it fires right after the parameter's gradient is complete.

use burn::backend::autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::NoCheckpointing},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, Flex, flex::FlexTensor, tensor::FloatTensor};
use burn::tensor::{DType, Tensor};
use std::fmt;
use std::sync::Arc;

type Tracked = FloatTensor<Autodiff<Flex>>;

/// A gradient as a hook sees it: host memory in any layout.
pub(crate) struct Gradient<'a>(&'a FlexTensor);

impl Gradient<'_> {
    /// Calls `f` with the gradient's elements in row-major order; copies only where the layout is another.
    pub(crate) fn with<R>(&self, f: impl FnOnce(Option<&[f32]>) -> R) -> R {
        match self.0.as_slice::<f32>() {
            Some(slice) => f(Some(slice)),
            None => f(self.0.to_contiguous().as_slice::<f32>()),
        }
    }
}

/// What a hook does with the gradient of the tensor that it is attached to.
pub(crate) trait GradientHook: Send + Sync + 'static {
    /// Called once per use of the tensor, during backward. The gradient goes on to the tensor itself.
    ///
    /// Runs under the graph's lock: no operation on tensors of the same graph inside.
    fn call(&self, gradient: Gradient<'_>);
}

#[derive(Clone)]
struct State(Arc<dyn GradientHook>);

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GradientHook")
    }
}

#[derive(Debug)]
struct HookBackward;

impl Backward<Flex, 2> for HookBackward {
    type State = State;

    fn backward(self, ops: Ops<State, 2>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let gradient = gradients.consume::<Flex>(&ops.node);
        ops.state.0.call(Gradient(&gradient));
        if let Some(parent) = &ops.parents[0] {
            gradients.register::<Flex>(parent.id, gradient);
        }
    }
}

/// Whether [`hook_at`] has an effect on `tensor`: it is recorded, of f32, on the host, and nothing of its graph is computed
/// a second time (gradient checkpointing).
pub(crate) fn can_hook<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.dtype() == DType::F32 && tensor.clone().try_into_primitive::<Autodiff<Flex>>().is_ok()
}

/// The longest ladder. A forward pass that makes more nodes is hooked lower: its gradients are sent later, and are the same.
const MOST_RUNGS: usize = 1 << 16;

/// Identity of `tensor`, with `hook` called on its gradient at the depth of `anchor` plus one. Where that cannot be
/// ([`can_hook`]), the tensor itself.
pub(crate) fn hook_at<const D: usize>(
    tensor: Tensor<D>,
    anchor: Anchor,
    hook: Arc<dyn GradientHook>,
) -> Tensor<D> {
    if !tensor.is_autodiff() {
        return tensor;
    }
    let tracked: Tracked = match tensor.clone().try_into_primitive::<Autodiff<Flex>>() {
        Ok(tracked) => tracked,
        // Moved to another backend since: its gradient is taken from Burn's after backward.
        Err(_) => return tensor,
    };
    drop(tensor);
    let guard = anchor.0.node();
    let (primitive, node) = tracked.into_parts();
    let prepared = Backward::<Flex, 2>::prepare::<NoCheckpointing>(HookBackward, [node, guard]);
    let hooked = match prepared.compute_bound().stateful() {
        OpsKind::Tracked(op) => op.finish(State(hook), primitive),
        OpsKind::UnTracked(op) => op.finish(primitive),
    };
    Tensor::from_primitive::<Autodiff<Flex>>(hooked)
}

#[derive(Debug)]
struct Rung;

impl Backward<Flex, 1> for Rung {
    type State = ();
    fn backward(self, _: Ops<(), 1>, _: &mut Gradients, _: &mut Checkpointer) {}
}

/// A node that is not differentiated and lies at a known depth.
pub(crate) struct Anchor(Tracked);

/// A chain of such nodes, one at every depth, grown as needed and kept from step to step.
pub(crate) struct Ladder {
    rungs: Vec<Tracked>,
    /// The newest node when the current forward began; every node since is at most that many levels deep.
    start: u64,
}

impl Ladder {
    pub(crate) fn new() -> Self {
        let leaf = Tensor::<1>::zeros([1], &super::train_device());
        let leaf = leaf.try_into_primitive::<Autodiff<Flex>>();
        Self { rungs: leaf.into_iter().collect(), start: NodeId::new().value }
    }

    /// Marks the beginning of a forward pass.
    pub(crate) fn restart(&mut self) {
        self.start = NodeId::new().value;
    }

    /// An anchor at least as deep as every node made since [`restart`](Self::restart).
    pub(crate) fn deepest(&mut self) -> Option<Anchor> {
        let before = NodeId::new().value;
        let depth = usize::try_from(before - self.start).map_or(MOST_RUNGS, |depth| depth.min(MOST_RUNGS));
        while self.rungs.len() <= depth {
            let (primitive, node) = self.rungs.last()?.clone().into_parts();
            let prepared = Backward::<Flex, 1>::prepare::<NoCheckpointing>(Rung, [node]).compute_bound();
            self.rungs.push(match prepared.stateful() {
                OpsKind::Tracked(op) => op.finish((), primitive),
                OpsKind::UnTracked(op) => op.finish(primitive),
            });
        }
        // The rungs just made are no part of the model's forward: do not count them.
        self.start += NodeId::new().value - before;
        self.rungs.get(depth).cloned().map(Anchor)
    }
}
