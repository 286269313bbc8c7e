//! Dropout, and sums of a layer's result with what went around it.

use super::custom::{Back, custom, fused, in_place, numbers, tensor_of, value};
use super::work::{Cost, Work};
use burn::backend::flex::FlexTensor;
use burn::tensor::{Tensor, TensorData};
use regatta_kernel::bias;
use regatta_kernel::dropout::Dropout;
use std::ops::Range;

/// Dropout of a tensor that is part `part` along dimension 1 of a whole one, `whole` long there.
#[derive(Debug, Clone)]
pub(crate) struct Drops {
    pub(crate) dropout: Dropout,
    pub(crate) part: Range<usize>,
    pub(crate) whole: usize,
}

impl Drops {
    /// Drops elements of a tensor of `outer` sequences.
    fn apply(&self, outer: usize, values: &mut [f32]) {
        let each = values.len() / outer.max(1);
        let rest = each / self.part.len().max(1);
        for (index, values) in values.chunks_exact_mut(each.max(1)).enumerate() {
            let first = (index * self.whole + self.part.start) * rest;
            self.dropout.apply(first as u64, values);
        }
    }

    fn of(&self, tensor: FlexTensor, outer: usize) -> FlexTensor {
        in_place(tensor, |values| self.apply(outer, values))
    }

    fn mask<const D: usize>(&self, x: &Tensor<D>) -> Tensor<D> {
        let shape = x.dims();
        let mut mask = vec![1.0f32; shape.iter().product()];
        self.apply(shape[0], &mut mask);
        // As many digits as `x` has.
        Tensor::from_data(TensorData::new(mask, shape), (&x.device(), x.dtype()))
    }
}

fn work<const D: usize>(x: &Tensor<D>) -> Work {
    let elements: f64 = x.dims().iter().map(|&size| size as f64).product();
    Work::new("residual", elements, 12.0 * elements)
}

/// `x` with elements dropped.
pub(crate) fn drop_elements<const D: usize>(x: Tensor<D>, drops: Drops) -> Tensor<D> {
    if !fused(&x) {
        let mask = drops.mask(&x);
        return x * mask;
    }
    let outer = x.dims()[0];
    custom(work(&x), [value(x)], |[x]| {
        let output = drops.of(x, outer);
        let back: Back<1> = Box::new(move |gradient, _| [Some(drops.of(gradient, outer))]);
        (output, back)
    })
}

/// `x + y`, with elements of `y` dropped.
pub(crate) fn residual<const D: usize>(x: Tensor<D>, y: Tensor<D>, drops: Option<Drops>) -> Tensor<D> {
    if !fused(&x) {
        return x + drops.into_iter().fold(y, drop_elements);
    }
    let outer = x.dims()[0];
    let work = work(&x);
    // Without dropout backward hands the gradient on.
    let work = if drops.is_some() { work } else { Work { backward: Cost::default(), ..work } };
    custom(work, [value(x), value(y)], |[x, y]| {
        let output = in_place(y, |y| {
            if let Some(drops) = &drops {
                drops.apply(outer, y);
            }
            bias::accumulate(y, &numbers(&x));
        });
        let back: Back<2> = Box::new(move |gradient, _| {
            let of_y = match drops {
                // A copy of its own: the other one goes around.
                Some(drops) => {
                    let mut values = numbers(&gradient).into_owned();
                    drops.apply(outer, &mut values);
                    tensor_of(values, burn::backend::TensorMetadata::shape(&gradient))
                }
                None => gradient.clone(),
            };
            [Some(gradient), Some(of_y)]
        });
        (output, back)
    })
}
