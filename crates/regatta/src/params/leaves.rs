//! The parameters as leaves of graphs: finds the gradients of a block's parameters in those of a graph.

use super::device_copies::TakeGradient;
use super::units::Units;
use super::walk::{ParamVisitor, visit_params};
use crate::autograd::{Fetchable, node_of};
use burn::backend::autodiff::NodeId;
use burn::module::{Module, Param};
use burn::tensor::{Gradients, Tensor};
use std::collections::HashMap;
use std::sync::Arc;

/// The leaves of a model's graphs.
pub(crate) struct Leaves {
    /// By parameter: takes its gradient out of a graph's.
    take: Vec<Option<TakeGradient>>,
    /// The parameter of each node.
    nodes: HashMap<u64, usize>,
    /// The parameters of each block.
    by_block: HashMap<usize, Vec<usize>>,
}

impl Leaves {
    /// The leaves of `model`, whose parameters are in `units`. If layers use copies of the parameters, `takes` takes the
    /// copies' gradients.
    pub(crate) fn of<M: Module>(model: &M, units: &Units, takes: Option<Vec<Option<TakeGradient>>>) -> Self {
        let mut by_block: HashMap<usize, Vec<usize>> = HashMap::new();
        for (index, param) in units.params.iter().enumerate() {
            param.blocks.iter().for_each(|&block| by_block.entry(block).or_default().push(index));
        }
        if let Some(take) = takes {
            return Self { take, nodes: HashMap::new(), by_block };
        }
        let index = units.params.iter().enumerate().map(|(i, param)| (param.spec.path.clone(), i)).collect();
        let take = units.params.iter().map(|_| None).collect();
        visit_params(model, LeafVisitor { index, leaves: Self { take, nodes: HashMap::new(), by_block } })
            .leaves
    }

    /// Takes the gradients of a block's parameters, by index, out of `gradients`.
    pub(crate) fn gradients<'a>(
        &'a self,
        block: usize,
        gradients: &'a mut Gradients,
    ) -> impl Iterator<Item = (usize, Fetchable)> + 'a {
        let params = self.by_block.get(&block).map_or(&[][..], Vec::as_slice);
        params.iter().filter_map(|&param| Some((param, self.take[param].as_ref()?(gradients)?)))
    }

    /// The index of the parameter with this node.
    pub(crate) fn find(&self, node: NodeId) -> Option<usize> {
        self.nodes.get(&node.value).copied()
    }
}

/// Collects the leaves of a module's parameters.
struct LeafVisitor {
    index: HashMap<String, usize>,
    leaves: Leaves,
}

impl ParamVisitor for LeafVisitor {
    fn float<const D: usize>(&mut self, path: String, param: &Param<Tensor<D>>) {
        let Some(&index) = self.index.get(&path) else { return };
        let tensor = param.val();
        if let Some(node) = node_of(&tensor) {
            self.leaves.nodes.insert(node.value, index);
        }
        self.leaves.take[index] = Some(Arc::new(move |found| tensor.grad_remove(found).map(Fetchable::of)));
    }
}
