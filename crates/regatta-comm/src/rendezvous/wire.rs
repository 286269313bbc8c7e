//! Frames on the store's connections: a length, then so many bytes. No length is trusted.

use std::io::{self, ErrorKind, Read, Write};

/// The longest frame in bytes.
pub(crate) const LONGEST: usize = 1 << 20;

/// Writes one frame.
pub(crate) fn write(stream: &mut impl Write, payload: &[u8]) -> io::Result<()> {
    if payload.len() > LONGEST {
        return Err(io::Error::new(ErrorKind::InvalidInput, "a store entry of over 1 MiB"));
    }
    let mut frame = Vec::with_capacity(4 + payload.len());
    frame.extend((payload.len() as u32).to_le_bytes());
    frame.extend(payload);
    stream.write_all(&frame)
}

/// Bytes of the frame that carries this.
pub(crate) fn framed(payload: &[u8]) -> u64 {
    4 + payload.len() as u64
}

/// Reads one frame.
pub(crate) fn read(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut len = [0; 4];
    stream.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len) as usize;
    if len > LONGEST {
        return Err(io::Error::new(ErrorKind::InvalidData, "a frame longer than any of ours"));
    }
    let mut payload = Vec::new();
    // Grows with what really comes, not with what was announced.
    stream.take(len as u64).read_to_end(&mut payload)?;
    if payload.len() < len {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok(payload)
}

/// Fields of a message, each with its length before it.
pub(crate) fn pack(fields: &[&[u8]]) -> Vec<u8> {
    let mut out = vec![];
    for field in fields {
        out.extend((field.len() as u32).to_le_bytes());
        out.extend(*field);
    }
    out
}

/// All fields of a message, or nothing where it has another form.
pub(crate) fn unpack_all(mut message: &[u8]) -> Option<Vec<&[u8]>> {
    let mut fields = vec![];
    while !message.is_empty() {
        let (len, rest) = message.split_first_chunk::<4>()?;
        let (field, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
        fields.push(field);
        message = rest;
    }
    Some(fields)
}

/// The `N` fields of a message, or nothing where it has another form.
pub(crate) fn unpack<const N: usize>(mut message: &[u8]) -> Option<[&[u8]; N]> {
    let mut fields = [&[][..]; N];
    for field in &mut fields {
        let (len, rest) = message.split_first_chunk::<4>()?;
        (*field, message) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
    }
    message.is_empty().then_some(fields)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn garbage_is_refused_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = read(&mut bytes.as_slice());
            let _ = unpack::<3>(&bytes);
            let _ = unpack_all(&bytes);
        }

        #[test]
        fn what_is_packed_comes_back(a in prop::collection::vec(any::<u8>(), 0..20), b in prop::collection::vec(any::<u8>(), 0..20)) {
            let packed = pack(&[&a, &b]);
            let mut stream = vec![];
            write(&mut stream, &packed).unwrap();
            let frame = read(&mut stream.as_slice()).unwrap();
            prop_assert_eq!(unpack::<2>(&frame), Some([a.as_slice(), b.as_slice()]));
            prop_assert_eq!(unpack_all(&frame), Some(vec![a.as_slice(), b.as_slice()]));
        }
    }

    #[test]
    fn a_huge_length_allocates_nothing() {
        assert!(read(&mut [255, 255, 255, 255, 1].as_slice()).is_err());
        assert!(read(&mut [255, 255, 15, 0, 1].as_slice()).is_err());
    }
}
