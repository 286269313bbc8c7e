//! Copies of parameters, for layers that cannot use the engine's memory because they run on a device or with 16-bit numbers.

use super::units::Units;
use crate::autograd::{Compute, Fetchable, detached, leaf};
use burn::module::{Module, Param, Reparameterization, Reparameterizer};
use burn::tensor::{Gradients, Tensor};
use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// The copies of a model's parameters.
pub(crate) struct DeviceCopies {
    params: Vec<Option<ParamCopy>>,
}

/// Replaces a copy by one of these numbers.
type Fill = Box<dyn Fn(&[f32]) + Send>;

struct ParamCopy {
    fill: Fill,
    take: TakeGradient,
}

/// Takes a parameter's gradient out of a graph's.
pub(crate) type TakeGradient = Arc<dyn Fn(&mut Gradients) -> Option<Fetchable> + Send + Sync>;

impl DeviceCopies {
    /// Makes the layers of `model` use copies of its parameters on the device of `compute`. The copies must be filled before
    /// use.
    pub(crate) fn attach<M: Module>(model: M, units: &Units, compute: &Compute) -> (M, Self) {
        let named = units.params.iter().enumerate();
        let index = named.map(|(index, param)| (param.spec.path.clone(), index)).collect();
        let mut params: Vec<Option<ParamCopy>> = units.params.iter().map(|_| None).collect();
        let model = model.apply_reparameterization(Attach { index, compute, params: &mut params });
        (model, Self { params })
    }

    /// Replaces the copies of a unit's parameters; `numbers` are those of the unit.
    pub(crate) fn fill(&self, units: &Units, unit: usize, numbers: &[f32]) {
        for &(param, _) in &units.units[unit].params {
            if let Some(copy) = &self.params[param] {
                (copy.fill)(&numbers[units.place(param).1]);
            }
        }
    }

    /// For each parameter, the function that takes its gradient out of a graph's.
    pub(crate) fn takes(&self) -> impl Iterator<Item = Option<TakeGradient>> {
        self.params.iter().map(|copy| copy.as_ref().map(|copy| copy.take.clone()))
    }
}

/// Holds a copy, a `Tensor<D>` that is a leaf of graphs.
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
    params: &'a mut [Option<ParamCopy>],
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
        let fill_slot = slot.clone();
        let fill = Box::new(move |numbers: &[f32]| {
            fill_slot.set::<D>(leaf(compute.tensor(numbers.to_vec(), shape)));
        });
        let take_slot = slot.clone();
        let take = Arc::new(move |gradients: &mut Gradients| {
            take_slot.get::<D>()?.grad_remove(gradients).map(Fetchable::of)
        });
        self.params[index] = Some(ParamCopy { fill, take });
        (param, Some(Copied { slot }))
    }
}

/// The reparameterization of a parameter whose value is the copy.
#[derive(Module, Debug)]
struct Copied {
    #[module(skip)]
    slot: Slot,
}

impl Reparameterization for Copied {
    const NAME: &'static str = "copy";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let recorded = base.is_autodiff();
        // Before the first copy, only the shape is used.
        let copy = self.slot.get::<D>().unwrap_or(base);
        if recorded { copy } else { detached(copy) }
    }
}
