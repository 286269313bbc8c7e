//! What carries operations out, a file each; see [`backend`](super::backend).

pub(super) mod direct;
pub(super) mod hierarchical;
pub(super) mod native;
pub(super) mod streams;
#[cfg(test)]
pub(super) mod toy;
