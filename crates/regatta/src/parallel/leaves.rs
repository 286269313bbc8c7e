//! The parameters as backward knows them: from a graph's gradients to those of a block's parameters.

use super::copies::{Copies, Take};
use super::units::Units;
use crate::autograd::{Wanted, node_of};
use burn::backend::autodiff::NodeId;
use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Gradients, Tensor};
use std::collections::HashMap;
use std::sync::Arc;

/// The leaves of a model's graphs.
pub(crate) struct Leaves {
    take: Vec<Option<Take>>,
    nodes: HashMap<u64, usize>,
    by_block: HashMap<usize, Vec<usize>>,
}

impl Leaves {
    /// Of `model`, whose parameters lie in `units`, or whose layers see `copies` of them.
    pub(crate) fn of<M: Module>(model: &M, units: &Units, copies: Option<&Copies>) -> Self {
        let mut by_block: HashMap<usize, Vec<usize>> = HashMap::new();
        for (param, made) in units.params.iter().enumerate() {
            made.blocks.iter().for_each(|&block| by_block.entry(block).or_default().push(param));
        }
        if let Some(copies) = copies {
            return Self { take: copies.takes().collect(), nodes: HashMap::new(), by_block };
        }
        let index = units.params.iter().enumerate().map(|(i, made)| (made.spec.path.clone(), i)).collect();
        let take = units.params.iter().map(|_| None).collect();
        let mut find = Find { index, path: vec![], leaves: Self { take, nodes: HashMap::new(), by_block } };
        model.visit(&mut find);
        find.leaves
    }

    /// Takes the gradients of a block's parameters out of `found`.
    pub(crate) fn gradients<'a>(
        &'a self,
        block: usize,
        found: &'a mut Gradients,
    ) -> impl Iterator<Item = (usize, Wanted)> + 'a {
        let params = self.by_block.get(&block).map_or(&[][..], Vec::as_slice);
        params.iter().filter_map(|&param| Some((param, self.take[param].as_ref()?(found)?)))
    }

    /// The parameter that is this node.
    pub(crate) fn find(&self, node: NodeId) -> Option<usize> {
        self.nodes.get(&node.value).copied()
    }
}

struct Find {
    index: HashMap<String, usize>,
    path: Vec<String>,
    leaves: Leaves,
}

impl ModuleVisitor for Find {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(&index) = self.index.get(&self.path.join(".")) else { return };
        let tensor = param.val();
        if let Some(node) = node_of(&tensor) {
            self.leaves.nodes.insert(node.value, index);
        }
        self.leaves.take[index] = Some(Arc::new(move |found| tensor.grad_remove(found).map(Wanted::of)));
    }
}
