//! Copies of parameters on a device, or of another type: what layers see where they cannot see the engine's own memory.

use super::units::Units;
use crate::autograd::{Compute, Wanted, detached, leaf};
use burn::module::{Module, Param, Reparameterization, Reparameterizer};
use burn::tensor::{Gradients, Tensor};
use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// The copies of a model's parameters.
pub(crate) struct Copies {
    params: Vec<Option<One>>,
}

/// Makes a copy anew.
type Fill = Box<dyn Fn(&[f32]) + Send>;

struct One {
    fill: Fill,
    take: Take,
}

/// Takes a parameter's gradient out of a graph's.
pub(crate) type Take = Arc<dyn Fn(&mut Gradients) -> Option<Wanted> + Send + Sync>;

impl Copies {
    /// Has the layers of `model` see copies of its parameters on the device of `compute`. They must be filled before use.
    pub(crate) fn attach<M: Module>(model: M, units: &Units, compute: &Compute) -> (M, Self) {
        let named = units.params.iter().enumerate();
        let index = named.map(|(index, made)| (made.spec.path.clone(), index)).collect();
        let mut params: Vec<Option<One>> = units.params.iter().map(|_| None).collect();
        let model = model.apply_reparameterization(Attach { index, compute, params: &mut params });
        (model, Self { params })
    }

    /// Makes the copies of a unit's parameters anew, from the numbers of the unit.
    pub(crate) fn fill(&self, units: &Units, unit: usize, numbers: &[f32]) {
        for &(param, _) in &units.units[unit].params {
            if let Some(one) = &self.params[param] {
                (one.fill)(&numbers[units.place(param).1]);
            }
        }
    }

    /// How to take the gradient of each parameter out of a graph's.
    pub(crate) fn takes(&self) -> impl Iterator<Item = Option<Take>> {
        self.params.iter().map(|one| one.as_ref().map(|one| one.take.clone()))
    }
}

/// Holds a copy, the leaf of graphs: a `Tensor<D>`.
#[derive(Clone, Default)]
struct Slot(Arc<Mutex<Option<Box<dyn Any + Send>>>>);

impl Slot {
    fn set<const D: usize>(&self, tensor: Tensor<D>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(tensor));
    }

    fn get<const D: usize>(&self) -> Option<Tensor<D>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_ref()?.downcast_ref().cloned()
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Slot")
    }
}

struct Attach<'a> {
    index: HashMap<String, usize>,
    compute: &'a Compute,
    params: &'a mut [Option<One>],
}

impl Reparameterizer for Attach<'_> {
    type Reparam = Copied;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Copied>) {
        let Some(&index) = self.index.get(path) else { return (param, None) };
        let slot = Slot::default();
        let (shape, compute) = (param.base().dims(), self.compute.clone());
        let filled = slot.clone();
        let fill = Box::new(move |numbers: &[f32]| {
            filled.set::<D>(leaf(compute.tensor(numbers.to_vec(), shape)));
        });
        let taken = slot.clone();
        let take =
            Arc::new(move |found: &mut Gradients| taken.get::<D>()?.grad_remove(found).map(Wanted::of));
        self.params[index] = Some(One { fill, take });
        (param, Some(Copied { slot }))
    }
}

/// Attached to a parameter: its value is the copy.
#[derive(Module, Debug)]
struct Copied {
    #[module(skip)]
    slot: Slot,
}

impl Reparameterization for Copied {
    const NAME: &'static str = "copy";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let recorded = base.is_autodiff();
        // Before the first copy only shapes are looked at.
        let copy = self.slot.get::<D>().unwrap_or(base);
        if recorded { copy } else { detached(copy) }
    }
}
