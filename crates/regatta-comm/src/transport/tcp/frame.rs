//! What goes over a connection that groups share.

/// Bytes of a group, as many as the header says, follow.
pub(super) const DATA: u32 = 0;
/// The receiver has consumed so many bytes of the group.
pub(super) const CREDIT: u32 = 1;
/// The sender has left the group.
pub(super) const CLOSE: u32 = 2;

/// Bytes of a header.
pub(super) const HEADER: usize = 16;
/// Most bytes of one group that are under way from one rank to another over one connection: sent, but not consumed.
/// Less in tests, so that they meet it.
pub(super) const WINDOW: usize = if cfg!(test) { 256 << 10 } else { 16 << 20 };
/// The receiver says what it has consumed when it is so much.
pub(super) const RETURN: usize = WINDOW / 4;
/// The longest frame, so that groups take turns.
pub(super) const LONGEST: usize = 512 << 10;

/// What a frame begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub group: u64,
    pub len: u32,
    pub kind: u32,
}

impl Header {
    pub(super) fn read(bytes: &[u8; HEADER]) -> Self {
        let [group, rest] = [0, 8].map(|at| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        });
        Self { group, len: rest as u32, kind: (rest >> 32) as u32 }
    }

    pub(super) fn bytes(self) -> [u8; HEADER] {
        let rest = u64::from(self.kind) << 32 | u64::from(self.len);
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&self.group.to_le_bytes());
        bytes[8..].copy_from_slice(&rest.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back() {
        let header = Header { group: 0x0123_4567_89ab_cdef, len: u32::MAX - 7, kind: CREDIT };
        assert_eq!(Header::read(&header.bytes()), header);
    }
}
