//! What a rank calls, in a form that fits a cache line and a message header, so that ranks can compare notes.

use crate::numbers::element::{DType, ReduceOp};
use std::fmt;

macro_rules! kinds {
    ($($(#[$doc:meta])* $code:literal $kind:ident = $name:literal),* $(,)?) => {
        /// The operations.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        #[non_exhaustive]
        pub enum Kind {
            $($(#[$doc])* $kind = $code),*
        }

        impl Kind {
            /// All operations.
            pub const ALL: &'static [Self] = &[$(Self::$kind),*];

            /// Its name, as the method's of [`Group`](crate::Group).
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => $name),*
                }
            }
        }
    };
}

kinds! {
    /// Reduction, left on all ranks.
    1 AllReduce = "all_reduce",
    /// Reduction, left on one rank.
    2 Reduce = "reduce",
    /// Reduction, left in parts on all ranks.
    3 ReduceScatter = "reduce_scatter",
    /// Everyone's numbers to everyone.
    4 AllGather = "all_gather",
    /// Everyone's numbers to one rank.
    5 Gather = "gather",
    /// One rank's numbers in parts to everyone.
    6 Scatter = "scatter",
    /// One rank's numbers to everyone.
    7 Broadcast = "broadcast",
    /// A part of everyone's numbers to everyone.
    8 AllToAll = "all_to_all",
    /// Nothing but waiting.
    9 Barrier = "barrier",
    /// From one rank to another.
    10 Send = "send/recv",
    /// A rank has run out of data.
    11 Join = "join",
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
    /// Low half of the group's id.
    pub group: u32,
    /// Number of the operation in its group, from 1; of a message, its number between the two ranks.
    pub sequence: u32,
    /// Digest of what else ranks must agree on: counts, factors. 0: nothing.
    pub detail: u64,
}

/// Bytes of an encoded call.
pub(crate) const ENCODED: usize = 32;

impl Call {
    pub(crate) fn new(kind: Kind, dtype: DType, len: usize) -> Self {
        Self { kind, dtype, op: ReduceOp::Sum, root: 0, len: len as u64, group: 0, sequence: 0, detail: 0 }
    }

    pub(crate) fn op(self, op: ReduceOp) -> Self {
        Self { op, ..self }
    }

    pub(crate) fn root(self, root: usize) -> Self {
        Self { root: root as u32, ..self }
    }

    /// Adds words that ranks must agree on.
    pub(crate) fn detail(self, words: impl IntoIterator<Item = u64>) -> Self {
        let mut words = words.into_iter().peekable();
        if words.peek().is_none() {
            return self;
        }
        Self { detail: digest(self.detail, words), ..self }
    }

    /// Whether all ranks of the group take part: only such calls are numbered alike on all.
    pub(crate) fn is_collective(&self) -> bool {
        self.kind != Kind::Send
    }

    /// As words.
    pub(crate) fn encode(self) -> [u64; 4] {
        let codes =
            u64::from(self.kind as u8) | u64::from(self.dtype as u8) << 8 | u64::from(self.op as u8) << 16;
        let place = u64::from(self.group) << 32 | u64::from(self.sequence);
        [codes | u64::from(self.root) << 32, self.len, place, self.detail]
    }

    /// The call that was encoded, or nothing where the words are none.
    pub(crate) fn decode([codes, len, place, detail]: [u64; 4]) -> Option<Self> {
        let kind = Kind::ALL.iter().copied().find(|kind| *kind as u8 == codes as u8)?;
        let dtype = DType::from_code((codes >> 8) as u8)?;
        let op = ReduceOp::from_code((codes >> 16) as u8)?;
        if (codes >> 24) as u8 != 0 {
            return None;
        }
        let (group, sequence) = ((place >> 32) as u32, place as u32);
        Some(Self { kind, dtype, op, root: (codes >> 32) as u32, len, group, sequence, detail })
    }

    /// As bytes, for a message.
    pub(crate) fn to_bytes(self) -> [u8; ENCODED] {
        let mut bytes = [0; ENCODED];
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(self.encode()) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// From a message's bytes.
    pub(crate) fn from_bytes(bytes: &[u8; ENCODED]) -> Option<Self> {
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().ok()?);
        }
        Self::decode(words)
    }
}

/// A digest of words; never 0. FNV-1a (Fowler, Noll & Vo).
pub(crate) fn digest(start: u64, words: impl IntoIterator<Item = u64>) -> u64 {
    let fold = |hash: u64, word: u64| {
        word.to_le_bytes()
            .iter()
            .fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
    };
    words.into_iter().fold(start ^ 0xcbf2_9ce4_8422_2325, fold).max(1)
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, dtype, op, root, len, sequence, detail, .. } = self;
        write!(f, "{} #{sequence}", kind.name())?;
        if !matches!(kind, Kind::Barrier | Kind::Join) {
            write!(f, " {dtype}[{len}]")?;
        }
        match kind {
            Kind::AllReduce | Kind::ReduceScatter => write!(f, " {op}")?,
            Kind::Reduce => write!(f, " {op} to {root}")?,
            Kind::Gather => write!(f, " to {root}")?,
            Kind::Broadcast | Kind::Scatter => write!(f, " from {root}")?,
            _ => {}
        }
        if *detail != 0 {
            write!(f, " (counts or factors {:04x})", detail >> 48)?;
        }
        Ok(())
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
            if let Some(call) = Call::from_bytes(&bytes) {
                prop_assert_eq!(Call::from_bytes(&call.to_bytes()), Some(call));
            }
        }
    }

    #[test]
    fn prints_as_it_was_called() {
        let call = Call { sequence: 17, ..Call::new(Kind::AllReduce, DType::F32, 1024).op(ReduceOp::Mean) };
        assert_eq!(call.to_string(), "all_reduce #17 f32[1024] mean");
        assert_eq!(Call::from_bytes(&call.to_bytes()), Some(call));
        let other = call.detail([1, 2]);
        assert_ne!(other.detail, call.detail([2, 1]).detail);
        assert_ne!(other.to_string(), call.to_string());
        assert_eq!(call.detail([]), call);
    }
}
