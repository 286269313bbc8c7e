//! Dropout, and residual sums with dropout.

use super::custom::{Back, custom, fused, in_place, numbers, tensor_of, value};
use super::work::{Cost, Work};
use burn::backend::flex::FlexTensor;
use burn::tensor::{Tensor, TensorData};
use regatta_kernel::bias;
use regatta_kernel::dropout::{Dropout, SampleRows};
use std::ops::Range;

/// Dropout of a part of a larger tensor.
#[derive(Debug, Clone)]
pub(crate) struct DropoutPart {
    pub(crate) dropout: Dropout,
    /// The samples of the global batch that the rows of dimension 0 are.
    pub(crate) rows: SampleRows,
    /// The range of dimension 1 of the larger tensor.
    pub(crate) part: Range<usize>,
    /// The size of dimension 1 of the larger tensor.
    pub(crate) full: usize,
}

impl DropoutPart {
    /// Drops elements of `values`, the numbers of a tensor whose dimension 0 is `rows`.
    fn apply(&self, rows: usize, values: &mut [f32]) {
        let row_len = values.len() / rows.max(1);
        let inner = row_len / self.part.len().max(1);
        for (row, values) in values.chunks_exact_mut(row_len.max(1)).enumerate() {
            let first = (self.rows.sample(row) * self.full + self.part.start) * inner;
            self.dropout.apply(first as u64, values);
        }
    }

    fn of(&self, tensor: FlexTensor, rows: usize) -> FlexTensor {
        in_place(tensor, |values| self.apply(rows, values))
    }

    fn mask<const D: usize>(&self, x: &Tensor<D>) -> Tensor<D> {
        let shape = x.dims();
        let mut mask = vec![1.0f32; shape.iter().product()];
        self.apply(shape[0], &mut mask);
        // The mask has the type of `x`, so that the product has it too.
        Tensor::from_data(TensorData::new(mask, shape), (&x.device(), x.dtype()))
    }
}

fn work<const D: usize>(x: &Tensor<D>) -> Work {
    let elements: f64 = x.dims().iter().map(|&size| size as f64).product();
    Work::new("residual", elements, 12.0 * elements)
}

/// `x` with elements dropped.
pub(crate) fn drop_elements<const D: usize>(x: Tensor<D>, dropout: DropoutPart) -> Tensor<D> {
    if !fused(&x) {
        let mask = dropout.mask(&x);
        return x * mask;
    }
    let rows = x.dims()[0];
    custom(work(&x), [value(x)], |[x]| {
        let output = dropout.of(x, rows);
        let back: Back<1> = Box::new(move |gradient, _| [Some(dropout.of(gradient, rows))]);
        (output, back)
    })
}

/// `x + y`, with elements of `y` dropped.
pub(crate) fn residual<const D: usize>(
    x: Tensor<D>,
    y: Tensor<D>,
    dropout: Option<DropoutPart>,
) -> Tensor<D> {
    if !fused(&x) {
        return x + dropout.into_iter().fold(y, drop_elements);
    }
    let rows = x.dims()[0];
    let work = work(&x);
    // Without dropout, backward passes the gradient on and costs nothing.
    let work = if dropout.is_some() { work } else { Work { backward: Cost::default(), ..work } };
    custom(work, [value(x), value(y)], |[x, y]| {
        let output = in_place(y, |y| {
            if let Some(dropout) = &dropout {
                dropout.apply(rows, y);
            }
            bias::accumulate(y, &numbers(&x));
        });
        let back: Back<2> = Box::new(move |gradient, _| {
            let of_y = match dropout {
                // The gradient of `x` is the one before dropout, so that of `y` needs a copy.
                Some(dropout) => {
                    let mut values = numbers(&gradient).into_owned();
                    dropout.apply(rows, &mut values);
                    tensor_of(values, burn::backend::TensorMetadata::shape(&gradient))
                }
                None => gradient.clone(),
            };
            [Some(gradient), Some(of_y)]
        });
        (output, back)
    })
}
