//! Gradient hooks: identity in forward, a callback with the gradient in backward, at a chosen depth of the graph.
//!
//! Burn runs the backward pass by descending depth in the graph, not by time. A hook directly on a parameter
//! has depth one and would run after everything else. So a hook also gets a second parent, an anchor from an
//! [`AnchorChain`], which is deep in the graph and receives no gradient. It gives the hook a depth just below the
//! operation that uses the parameter, so that the hook runs as soon as the parameter's gradient is complete.

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

/// The gradient that a hook receives: host memory in any layout.
pub(crate) struct Gradient<'a>(&'a FlexTensor);

impl Gradient<'_> {
    /// Calls `f` with the gradient's elements in row-major order, or with none if they are not f32; copies them only if
    /// they have another layout.
    pub(crate) fn with<R>(&self, f: impl FnOnce(Option<&[f32]>) -> R) -> R {
        match self.0.as_slice::<f32>() {
            Some(slice) => f(Some(slice)),
            None => f(self.0.to_contiguous().as_slice::<f32>()),
        }
    }
}

/// A callback for the gradient of the tensor that it is attached to.
pub(crate) trait GradientHook: Send + Sync + 'static {
    /// Called during backward, once for each use of the tensor. The tensor then receives the gradient as without a hook.
    ///
    /// The call holds the graph's lock, so it must not operate on tensors of the same graph.
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

/// Whether [`hook_at`] has an effect on `tensor`: the tensor is recorded, is f32, is on the host, and its graph recomputes
/// nothing (gradient checkpointing).
pub(crate) fn can_hook<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.dtype() == DType::F32 && tensor.clone().try_into_primitive::<Autodiff<Flex>>().is_ok()
}

/// Most anchors in a chain. If a forward pass creates more nodes, later hooks get the deepest anchor: they run later, with
/// the same gradients.
const MAX_ANCHORS: usize = 1 << 16;

/// Identity of `tensor` that calls `hook` with its gradient, at the depth of `anchor` plus one. Returns the tensor itself
/// if it cannot be hooked ([`can_hook`]).
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
        // The tensor has moved to another backend: its gradient is taken from Burn's gradients after backward.
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
struct AnchorBackward;

impl Backward<Flex, 1> for AnchorBackward {
    type State = ();
    fn backward(self, _: Ops<(), 1>, _: &mut Gradients, _: &mut Checkpointer) {}
}

/// A node at a known depth that receives no gradient.
pub(crate) struct Anchor(Tracked);

/// A chain of anchors, one at every depth. It grows as needed and is kept from step to step.
pub(crate) struct AnchorChain {
    anchors: Vec<Tracked>,
    /// The newest node when the current forward pass began. The depth of the graph is at most the number of nodes since.
    start: u64,
}

impl AnchorChain {
    pub(crate) fn new() -> Self {
        let leaf = Tensor::<1>::zeros([1], &super::train_device());
        let leaf = leaf.try_into_primitive::<Autodiff<Flex>>();
        Self { anchors: leaf.into_iter().collect(), start: NodeId::new().value }
    }

    /// Marks the beginning of a forward pass.
    pub(crate) fn restart(&mut self) {
        self.start = NodeId::new().value;
    }

    /// An anchor at least as deep as every node that was created since [`restart`](Self::restart).
    pub(crate) fn deepest(&mut self) -> Option<Anchor> {
        let before = NodeId::new().value;
        let depth = usize::try_from(before - self.start).map_or(MAX_ANCHORS, |depth| depth.min(MAX_ANCHORS));
        while self.anchors.len() <= depth {
            let (primitive, node) = self.anchors.last()?.clone().into_parts();
            let prepared =
                Backward::<Flex, 1>::prepare::<NoCheckpointing>(AnchorBackward, [node]).compute_bound();
            self.anchors.push(match prepared.stateful() {
                OpsKind::Tracked(op) => op.finish((), primitive),
                OpsKind::UnTracked(op) => op.finish(primitive),
            });
        }
        // The new anchors are not part of the model's forward pass, so they are not counted.
        self.start += NodeId::new().value - before;
        self.anchors.get(depth).cloned().map(Anchor)
    }
}
