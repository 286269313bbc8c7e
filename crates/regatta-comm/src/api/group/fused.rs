//! Several tensors in one operation (Sergeev & Del Balso 2018, "Horovod", tensor fusion): short ones are packed
//! together, so that many tensors cost the latency of one.

use super::Group;
use crate::error::Result;
use crate::execution::operation::Operation;
use crate::execution::operations::Caller;
use crate::numbers::element::{Element, ReduceOp, Reduction};

/// Tensors up to here are packed; above, the copies cost more than the operation saved.
const SHORT: usize = 1 << 20;
/// Packed tensors go when there are so many bytes.
const FULL: usize = 4 << 20;

impl Group {
    /// [`all_reduce`](Self::all_reduce) of several tensors at once; all ranks give the same number with the same
    /// lengths. Adasum is of each tensor by itself.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub fn all_reduce_grouped<T: Element>(
        &self,
        tensors: &mut [&mut [T]],
        reduction: impl Into<Reduction>,
    ) -> Result<()> {
        self.turn().all_reduce_grouped(tensors, reduction.into())
    }

    /// [`broadcast`](Self::broadcast) of several tensors at once.
    ///
    /// # Errors
    /// As [`broadcast`](Self::broadcast).
    pub fn broadcast_grouped<T: Element>(&self, tensors: &mut [&mut [T]], root: usize) -> Result<()> {
        let caller = self.turn();
        let broadcast = Operation::broadcast(root);
        fused(tensors, |data, lengths| caller.in_place(&broadcast.clone().packed(lengths), data))
    }
}

impl Caller<'_> {
    pub(crate) fn all_reduce_grouped<T: Element>(
        self,
        tensors: &mut [&mut [T]],
        reduction: Reduction,
    ) -> Result<()> {
        let all_reduce = Operation::all_reduce(reduction);
        if reduction.op == ReduceOp::Adasum {
            return tensors.iter_mut().try_for_each(|tensor| self.in_place(&all_reduce, tensor));
        }
        fused(tensors, |data, lengths| self.in_place(&all_reduce.clone().packed(lengths), data))
    }
}

/// Does `operation` with long tensors as they are, and with runs of short ones packed together; it is given the
/// lengths of what is packed.
fn fused<T: Element>(
    tensors: &mut [&mut [T]],
    mut operation: impl FnMut(&mut [T], Vec<u64>) -> Result<()>,
) -> Result<()> {
    let mut rest = tensors;
    let mut packed: Vec<T> = vec![];
    while !rest.is_empty() {
        let mut bytes = 0;
        let short = rest.iter().take_while(|tensor| {
            bytes += size_of_val(&***tensor);
            size_of_val(&***tensor) <= SHORT && bytes <= FULL
        });
        let count = short.count();
        if count <= 1 {
            let (tensor, more) = rest.split_at_mut(1);
            operation(tensor[0], vec![])?;
            rest = more;
            continue;
        }
        let (run, more) = rest.split_at_mut(count);
        packed.clear();
        run.iter().for_each(|tensor| packed.extend_from_slice(tensor));
        operation(&mut packed, run.iter().map(|tensor| tensor.len() as u64).collect())?;
        let mut from = packed.as_slice();
        for tensor in run {
            let (own, left) = from.split_at(tensor.len());
            tensor.copy_from_slice(own);
            from = left;
        }
        rest = more;
    }
    Ok(())
}
