//! How reductions in two stages, in each host and across hosts, are rounded.
//!
//! 16-bit floats are rounded once in each host, and once in the end. For a mean, integers and f16 are summed in a type
//! that holds every sum, and divided by all ranks in the end.

use crate::algorithm::streams;
use crate::member::call::Call;
use crate::numbers::element::{DType, Element, ReduceOp};

/// Whether the sums of `op` need a wider type from the beginning.
pub(super) fn exactly<T: Element>(op: ReduceOp) -> bool {
    // Of bf16 the range is that of f32.
    streams::outgrows::<T>(op) && T::DTYPE != DType::BF16
}

/// The call with which both stages reduce.
pub(super) fn summing(call: Call) -> Call {
    match call.op {
        ReduceOp::Mean => Call { op: ReduceOp::Sum, ..call },
        _ => call,
    }
}
