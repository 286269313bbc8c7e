//! What a rank calls, in a form that fits a cache line and a message header, so that ranks can compare notes.

use crate::element::{DType, ReduceOp};
use std::fmt;

/// The operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    AllReduce = 1,
    ReduceScatter,
    AllGather,
    Broadcast,
    Barrier,
    Send,
}

/// One call of an operation. All ranks of a group must agree on every field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Call {
    pub kind: Kind,
    pub dtype: DType,
    pub op: ReduceOp,
    pub root: u32,
    /// Elements.
    pub len: u64,
}

/// Bytes of an encoded call.
pub(crate) const ENCODED: usize = 16;

impl Call {
    pub(crate) fn new(kind: Kind, dtype: DType, len: usize) -> Self {
        Self { kind, dtype, op: ReduceOp::Sum, root: 0, len: len as u64 }
    }

    pub(crate) fn op(self, op: ReduceOp) -> Self {
        Self { op, ..self }
    }

    pub(crate) fn root(self, root: usize) -> Self {
        Self { root: root as u32, ..self }
    }

    /// As two words.
    pub(crate) fn encode(self) -> [u64; 2] {
        let codes =
            u64::from(self.kind as u8) | u64::from(self.dtype as u8) << 8 | u64::from(self.op as u8) << 16;
        [codes | u64::from(self.root) << 32, self.len]
    }

    /// The call that was encoded, or nothing where the words are none.
    pub(crate) fn decode([codes, len]: [u64; 2]) -> Option<Self> {
        let kind = match codes as u8 {
            1 => Kind::AllReduce,
            2 => Kind::ReduceScatter,
            3 => Kind::AllGather,
            4 => Kind::Broadcast,
            5 => Kind::Barrier,
            6 => Kind::Send,
            _ => return None,
        };
        let dtype = DType::from_code((codes >> 8) as u8)?;
        let op = ReduceOp::from_code((codes >> 16) as u8)?;
        Some(Self { kind, dtype, op, root: (codes >> 32) as u32, len })
    }

    /// As bytes, for a message.
    pub(crate) fn to_bytes(self) -> [u8; ENCODED] {
        let [a, b] = self.encode();
        let mut bytes = [0; ENCODED];
        bytes[..8].copy_from_slice(&a.to_le_bytes());
        bytes[8..].copy_from_slice(&b.to_le_bytes());
        bytes
    }

    /// From a message's bytes.
    pub(crate) fn from_bytes(bytes: [u8; ENCODED]) -> Option<Self> {
        let (a, b) = bytes.split_at(8);
        Self::decode([u64::from_le_bytes(a.try_into().ok()?), u64::from_le_bytes(b.try_into().ok()?)])
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dtype, op, root, len, .. } = self;
        match self.kind {
            Kind::AllReduce => write!(f, "all_reduce {dtype}[{len}] {op}"),
            Kind::ReduceScatter => write!(f, "reduce_scatter {dtype}[{len}] {op}"),
            Kind::AllGather => write!(f, "all_gather {dtype}[{len}]"),
            Kind::Broadcast => write!(f, "broadcast {dtype}[{len}] from {root}"),
            Kind::Barrier => write!(f, "barrier"),
            Kind::Send => write!(f, "send/recv {dtype}[{len}]"),
        }
    }
}

/// What a message that is no call is called in errors.
pub(crate) fn show(call: Option<Call>) -> String {
    call.map_or("something else".into(), |call| call.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_decode_without_panic(bytes in any::<[u8; ENCODED]>()) {
            if let Some(call) = Call::from_bytes(bytes) {
                prop_assert_eq!(Call::from_bytes(call.to_bytes()), Some(call));
            }
        }
    }

    #[test]
    fn prints_as_it_was_called() {
        let call = Call::new(Kind::AllReduce, DType::F32, 1024).op(ReduceOp::Mean);
        assert_eq!(call.to_string(), "all_reduce f32[1024] mean");
        assert_eq!(Call::from_bytes(call.to_bytes()), Some(call));
    }
}
