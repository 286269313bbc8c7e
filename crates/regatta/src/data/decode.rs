//! Decodes a file's bytes to text.

/// The text of `bytes`, which are UTF-8, or UTF-16 with a byte-order mark. The mark is removed.
///
/// # Errors
/// The bytes have another encoding or are not text. The message says which, where the first wrong byte is, and what to
/// do.
pub(crate) fn text(bytes: Vec<u8>) -> Result<String, String> {
    if let [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] = bytes[..] {
        return Err(convert("is UTF-32", "UTF-32"));
    }
    match bytes[..] {
        [0xff, 0xfe, ..] => return utf16(&bytes, u16::from_le_bytes),
        [0xfe, 0xff, ..] => return utf16(&bytes, u16::from_be_bytes),
        _ => {}
    }
    // ASCII text in UTF-16 is valid UTF-8, too, with zeros between the letters.
    if let Some(name) = utf16_without_mark(&bytes) {
        return Err(convert(&format!("looks like {name} without a byte-order mark"), name));
    }
    match String::from_utf8(bytes) {
        Ok(mut text) => {
            if text.starts_with(MARK) {
                text.drain(..MARK.len_utf8());
            }
            Ok(text)
        }
        Err(error) => {
            let at = error.utf8_error().valid_up_to();
            let bytes = error.as_bytes();
            if let Some(format) = format_of(bytes) {
                return Err(format!("is {format}"));
            }
            let line = 1 + bytes[..at].iter().filter(|&&byte| byte == b'\n').count();
            let problem = format!(
                "is not UTF-8 text: byte {:#04x} at offset {at} (line {line}) is of another encoding or not of a text",
                bytes[at]
            );
            Err(convert(&problem, "LATIN1"))
        }
    }
}

/// The byte order of UTF-16 if `bytes` look like it, without a byte-order mark.
fn utf16_without_mark(bytes: &[u8]) -> Option<&'static str> {
    let seen = &bytes[..bytes.len().min(EXAMINED_BYTES)];
    if seen.len() < 8 {
        return None;
    }
    let zeros = |parity: usize| seen.iter().skip(parity).step_by(2).filter(|&&byte| byte == 0).count();
    // Of the two bytes of an ASCII character one is zero, always at the same position.
    let (even, odd, most) = (zeros(0), zeros(1), seen.len() * 2 / 5);
    match (even, odd) {
        (0, odd) if odd > most => Some("UTF-16LE"),
        (even, 0) if even > most => Some("UTF-16BE"),
        _ => None,
    }
}

/// Bytes that are examined to recognise UTF-16.
const EXAMINED_BYTES: usize = 4096;

/// Unicode's byte-order mark.
const MARK: char = '\u{feff}';

/// JSON text without the byte-order mark that some editors write at its beginning.
pub(crate) fn json(text: &str) -> &str {
    text.strip_prefix(MARK).unwrap_or(text)
}

fn convert(problem: &str, encoding: &str) -> String {
    format!("{problem}; convert it, as with `iconv -f {encoding} -t UTF-8 FILE > NEW`, or remove it")
}

fn utf16(bytes: &[u8], unit: impl Fn([u8; 2]) -> u16) -> Result<String, String> {
    let (pairs, rest) = bytes[2..].as_chunks();
    if !rest.is_empty() {
        return Err("is truncated: it is UTF-16, but has an odd number of bytes".into());
    }
    let mut text = String::with_capacity(pairs.len());
    let mut at = 2;
    for c in char::decode_utf16(pairs.iter().map(|pair| unit(*pair))) {
        let Ok(c) = c else {
            let line = 1 + text.matches('\n').count();
            return Err(format!(
                "is damaged: it is UTF-16, but has half a character at offset {at} (line {line})"
            ));
        };
        at += 2 * c.len_utf16();
        text.push(c);
    }
    Ok(text)
}

/// The format of `bytes`, by the first bytes of formats that are often found among texts.
fn format_of(bytes: &[u8]) -> Option<&'static str> {
    let known: [(&[u8], &str); 5] = [
        (b"PAR1", "a Parquet table: write its column of text into a text file first"),
        (&[0x1f, 0x8b], "compressed: unpack it with gunzip"),
        (&[0x28, 0xb5, 0x2f, 0xfd], "compressed: unpack it with zstd -d"),
        (b"PK\x03\x04", "a zip archive: unpack it first"),
        (b"%PDF", "a PDF document: extract its text first, as with pdftotext"),
    ];
    known.iter().find(|(magic, _)| bytes.starts_with(magic)).map(|(_, what)| *what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encoded(text: &str, mark: bool, unit: impl Fn(u16) -> [u8; 2]) -> Vec<u8> {
        let marked = mark.then_some(0xfeffu16);
        marked.into_iter().chain(text.encode_utf16()).flat_map(unit).collect()
    }

    #[test]
    fn byte_order_marks_are_removed() {
        assert_eq!(text(b"\xef\xbb\xbfabc".to_vec()).unwrap(), "abc");
        assert_eq!(text(b"\xef\xbb\xbf".to_vec()).unwrap(), "");
        assert_eq!(text(encoded("grüß 世界 𝄞\n", true, u16::to_le_bytes)).unwrap(), "grüß 世界 𝄞\n");
        assert_eq!(text(encoded("grüß 世界 𝄞\n", true, u16::to_be_bytes)).unwrap(), "grüß 世界 𝄞\n");
        // Within the text it is a character like any other.
        assert_eq!(text("a\u{feff}b".into()).unwrap(), "a\u{feff}b");
        assert_eq!(json("\u{feff}{}"), "{}");
    }

    #[test]
    fn other_encodings_are_refused_with_their_place() {
        let problem = |bytes: &[u8]| text(bytes.to_vec()).unwrap_err();
        let latin1 = problem(b"first\nsecond\ncaf\xe9\n");
        assert!(latin1.contains("byte 0xe9 at offset 16 (line 3)") && latin1.contains("iconv"), "{latin1}");
        for (name, unit) in
            [("UTF-16LE", u16::to_le_bytes as fn(u16) -> [u8; 2]), ("UTF-16BE", u16::to_be_bytes)]
        {
            let bare = problem(&encoded("plain words\n", false, unit));
            assert!(
                bare.contains(&format!("looks like {name}")) && bare.contains(&format!("-f {name}")),
                "{bare}"
            );
        }
        assert!(problem(b"\xff\xfe\0\0a\0\0\0").contains("UTF-32"));
        assert!(problem(b"\xff\xfea\0b").contains("odd number"));
        let half =
            problem(&[&[0xff, 0xfe][..], &encoded("ab\n", false, u16::to_le_bytes), &[0, 0xd8]].concat());
        assert!(half.contains("half a character at offset 8 (line 2)"), "{half}");
        assert!(problem(b"PAR1\xff\xff\xff").contains("Parquet"));
        // Single zeros are text.
        assert_eq!(text(b"a\0bcdefgh ijkl".to_vec()).unwrap(), "a\0bcdefgh ijkl");
    }

    proptest! {
        #[test]
        fn any_bytes_are_text_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = text(bytes);
        }

        #[test]
        fn text_comes_back_from_every_encoding(original in "\\PC{0,60}") {
            prop_assume!(!original.starts_with(MARK));
            prop_assert_eq!(&text(original.clone().into_bytes()).unwrap(), &original);
            prop_assert_eq!(&text(encoded(&original, true, u16::to_be_bytes)).unwrap(), &original);
            // This mark and two zeros are the mark of UTF-32.
            prop_assume!(!original.starts_with('\0'));
            prop_assert_eq!(&text(encoded(&original, true, u16::to_le_bytes)).unwrap(), &original);
        }
    }
}
