//! Embeddings: the rows of a table for token ids and for positions.

use super::custom::{Back, custom, fused, in_place, integers, numbers, tensor_of, value};
use super::work::Work;
use burn::backend::{Shape, TensorMetadata};
use burn::tensor::{Int, Tensor};
use regatta_kernel::{bias, embedding};
use std::ops::Range;

/// The rows of `table` for `ids` `[batch, time]`, as `[batch, time, width]`. `table` `[rows, width]` is the part of the
/// whole table that starts at row `first`; ids outside of it give zeros.
pub(crate) fn rows_of(table: Tensor<2>, ids: Tensor<2, Int>, first: usize) -> Tensor<3> {
    let [batch, time] = ids.dims();
    let [rows, width] = table.dims();
    if !fused(&table) {
        let ids = ids.reshape([batch * time]).sub_scalar(first as i64);
        let here = ids.clone().greater_equal_elem(0).bool_and(ids.clone().lower_elem(rows as i64));
        let found = table.select(0, ids.clamp(0, rows as i64 - 1));
        let elsewhere = here.bool_not().unsqueeze_dim::<2>(1).expand([batch * time, width]);
        return found.mask_fill(elsewhere, 0.0).reshape([batch, time, width]);
    }
    let here = move |id: i64| usize::try_from(id).ok()?.checked_sub(first).filter(|row| *row < rows);
    let ids: Vec<Option<usize>> = integers(ids).into_iter().map(here).collect();
    let work = Work::new("embedding", 0.0, 8.0 * (ids.len() * width) as f64);
    custom(work, [value(table)], |[table]| {
        let out = embedding::gather(&numbers(&table), &ids, width);
        let output = tensor_of(out, Shape::from([batch, time, width]));
        let back: Back<1> = Box::new(move |gradient, [wanted]| {
            [wanted.map(|_| {
                let mut sums = vec![0.0f32; rows * width];
                embedding::scatter_add(&numbers(&gradient), &ids, width, &mut sums);
                tensor_of(sums, Shape::from([rows, width]))
            })]
        });
        (output, back)
    })
}

/// Adds the rows `places` (`time` of them) of `table` `[positions, width]` to every sequence of `x`
/// `[batch, time, width]`.
pub(crate) fn add_positions(x: Tensor<3>, table: Tensor<2>, places: Range<usize>) -> Tensor<3> {
    let [batch, _, width] = x.dims();
    if !fused(&x) {
        return x + table.narrow(0, places.start, places.len()).unsqueeze::<3>();
    }
    let work = Work::new("embedding", 0.0, 8.0 * (batch * places.len() * width) as f64);
    custom(work, [value(x), value(table)], |[x, table]| {
        let shape = table.shape();
        let part = places.start * width..places.end * width;
        let rows = numbers(&table);
        let output = in_place(x, |x| {
            x.chunks_exact_mut(part.len().max(1)).for_each(|x| bias::accumulate(x, &rows[part.clone()]));
        });
        let back: Back<2> = Box::new(move |gradient, [_, of_table]| {
            let of_table = of_table.map(|_| {
                let mut sums = vec![0.0f32; shape.num_elements()];
                for gradient in numbers(&gradient).chunks_exact(part.len().max(1)) {
                    bias::accumulate(&mut sums[part.clone()], gradient);
                }
                tensor_of(sums, shape)
            });
            [Some(gradient), of_table]
        });
        (output, back)
    })
}
