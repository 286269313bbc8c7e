//! Splits text into words as GPT-2 does, and finds places where text can be cut without changing its words.
//!
//! GPT-2 finds words by the regular expression `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+|
//! ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+` (Radford et al. 2019) and merges bytes only within a word. This module finds the
//! same words in ASCII text without a regular-expression engine.

/// Cuts `text` into pieces of about `size` bytes whose words are the words of the text, so that pieces can be encoded
/// one by one. Pieces end at ends of lines if there are any, else before spaces.
///
/// A cut does not change words after a single line break or before a single space, if the characters around it are not
/// white space. In longer runs of white space the expression adds the last character to the next word, so a cut there
/// would change words.
pub(crate) fn pieces(text: &str, size: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (from, near) = (size.clamp(1, rest.len()), size.saturating_mul(2).min(rest.len()));
        let cut = (from..near)
            .find(|&at| ends_line(rest, at))
            .or_else(|| (from..rest.len()).find(|&at| ends_line(rest, at) || begins_word(rest, at)))
            .unwrap_or(rest.len());
        let (piece, after) = rest.split_at(cut);
        rest = after;
        Some(piece)
    })
}

/// Whether a single line break lies just before `at`.
fn ends_line(text: &str, at: usize) -> bool {
    text.as_bytes()[at - 1] == b'\n' && solid_before(text, at - 1) && solid_after(text, at)
}

/// Whether a single space lies at `at`.
fn begins_word(text: &str, at: usize) -> bool {
    text.as_bytes()[at] == b' ' && solid_before(text, at) && solid_after(text, at + 1)
}

fn solid_before(text: &str, at: usize) -> bool {
    text[..at].chars().next_back().is_none_or(|c| !c.is_whitespace())
}

fn solid_after(text: &str, at: usize) -> bool {
    text[at..].chars().next().is_some_and(|c| !c.is_whitespace())
}

#[derive(PartialEq, Clone, Copy)]
enum Class {
    Letter,
    Digit,
    Space,
    Other,
}

fn class(byte: u8) -> Class {
    match byte {
        b'a'..=b'z' | b'A'..=b'Z' => Class::Letter,
        b'0'..=b'9' => Class::Digit,
        b'\t'..=b'\r' | b' ' => Class::Space,
        _ => Class::Other,
    }
}

/// The words of `text`, which must be ASCII and a [piece](pieces).
pub(crate) fn ascii_words(text: &str) -> impl Iterator<Item = &str> {
    debug_assert!(text.is_ascii());
    let mut rest = text;
    std::iter::from_fn(move || {
        let (word, after) = rest.split_at(first_word(rest.as_bytes()));
        rest = after;
        Some(word).filter(|word| !word.is_empty())
    })
}

/// The length of the first word. Tries the alternatives of the expression in their order.
fn first_word(text: &[u8]) -> usize {
    match text {
        [] => return 0,
        [b'\'', b's' | b't' | b'm' | b'd', ..] => return 2,
        [b'\'', b'r' | b'v', b'e', ..] | [b'\'', b'l', b'l', ..] => return 3,
        _ => {}
    }
    let run = |from: usize, of: Class| text[from..].iter().take_while(|&&byte| class(byte) == of).count();
    let lead = usize::from(text[0] == b' ');
    if let Some(of) = text.get(lead).map(|&byte| class(byte)).filter(|&of| of != Class::Space) {
        return lead + run(lead, of);
    }
    let spaces = run(0, Class::Space);
    // `\s+(?!\S)` leaves the last one to the next word; `\s+` takes a single one.
    if spaces == text.len() || spaces == 1 { spaces } else { spaces - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    const TEXT: &str = "fn main() {\n    println!(\"grüß dich, 世界\");\n}\n\nfn other() {\n    main();\n}\n";

    /// The words that the expression itself finds.
    fn by_expression(text: &str) -> Vec<String> {
        let mut words = PreTokenizedString::from(text);
        ByteLevel::new(false, true, true).pre_tokenize(&mut words).unwrap();
        let splits = words.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(_, (from, to), _)| text[from..to].to_string()).collect()
    }

    #[test]
    fn pieces_are_the_whole_text() {
        for size in 0..TEXT.len() + 2 {
            assert_eq!(pieces(TEXT, size).collect::<String>(), TEXT);
        }
        assert!(pieces(TEXT, 5).count() > 2);
        assert_eq!(pieces("", 5).count(), 0);
        // Without line breaks, and without ASCII.
        assert!(pieces(&"word ".repeat(1000), 50).count() > 50);
        assert!(pieces(&"世界人民\n".repeat(1000), 50).count() > 50);
    }

    proptest! {
        #[test]
        fn cuts_change_no_word(text in "([ab1'!]|'s|'ll| |  |\n|\n\n|\t|\r\n|é|世|½|\u{a0}|\u{3000}){0,40}", size in 1usize..12) {
            let parts: Vec<String> = pieces(&text, size).flat_map(by_expression).collect();
            prop_assert_eq!(parts, by_expression(&text));
        }

        #[test]
        fn words_are_the_words_of_the_expression(
            text in prop_oneof!["[ -~\t\n\r\x00\x0b\x0c\x1c\x7f]{0,40}", "([aZ0'!]|'s|'re|'LL|'l| |  |\n|\n\n|\t){0,40}"],
        ) {
            prop_assert_eq!(ascii_words(&text).collect::<Vec<_>>(), by_expression(&text));
        }
    }
}
