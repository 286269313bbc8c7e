//! What ranks get from each other in shared memory, where nobody sends.

use super::SMALL;
use crate::member::call::Kind;

/// Bytes that leave one rank of `size` for others: that they read where it has put them, or that it writes where they
/// read. `bytes` is the larger side of the operation, and `own` the rank's part of it.
///
/// An all-reduce of B bytes: the others read all of this rank's data but its own slice, and all of them get the sum
/// of its slice, 2(n-1)/n * B bytes as in a ring. Up to 16 KiB each of the others reads all, (n-1) * B.
pub(crate) fn sent(kind: Kind, root: bool, size: usize, bytes: usize, own: usize) -> u64 {
    let others = size - 1;
    let sent = match kind {
        Kind::AllReduce if bytes <= SMALL => others * bytes,
        Kind::AllReduce => bytes - own + others * own,
        // Everyone reduces a slice, and the root gets the sums of all.
        Kind::Reduce if root => bytes - own,
        Kind::Reduce => bytes,
        Kind::ReduceScatter | Kind::AllToAll => bytes - own,
        Kind::AllGather => others * own,
        Kind::Broadcast if root => others * bytes,
        Kind::Scatter if root => bytes - own,
        Kind::Gather if !root => own,
        Kind::Broadcast | Kind::Scatter | Kind::Gather | Kind::Barrier | Kind::Send | Kind::Join => 0,
    };
    sent as u64
}
