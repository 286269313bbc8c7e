//! Visits the parameters of a Burn module together with their paths. Burn tells a visitor only which fields it enters and
//! leaves.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Bool, Int, Tensor};

/// Visits parameters. `path` has the fields that lead to the parameter, as in `layers.0.up.weight`.
pub(crate) trait ParamVisitor {
    /// Visits a parameter of floating-point numbers.
    fn float<const D: usize>(&mut self, path: String, param: &Param<Tensor<D>>);

    /// Visits a parameter of integers.
    fn int<const D: usize>(&mut self, _path: String, _param: &Param<Tensor<D, Int>>) {}

    /// Visits a parameter of truth values.
    fn bool<const D: usize>(&mut self, _path: String, _param: &Param<Tensor<D, Bool>>) {}
}

/// Shows all parameters of `model` to `visitor`, in the order in which the module lists them, and returns the visitor.
pub(crate) fn visit_params<M: Module, V: ParamVisitor>(model: &M, visitor: V) -> V {
    let mut walk = Walk { path: vec![], visitor };
    model.visit(&mut walk);
    walk.visitor
}

struct Walk<V> {
    path: Vec<String>,
    visitor: V,
}

impl<V: ParamVisitor> ModuleVisitor for Walk<V> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.visitor.float(self.path.join("."), param);
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.visitor.int(self.path.join("."), param);
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.visitor.bool(self.path.join("."), param);
    }
}
