//! Byte-level byte-pair encoding with GPT-2's words (Sennrich et al. 2016; Radford et al. 2019, section 2.2).
//!
//! The crate `tokenizers` trains, reads and applies the merges. Text repeats its words, so each word of a text is
//! given to it once; that is several times faster than handing it the text.

use super::words::{ascii_words, pieces};
use crate::error::{Error, Result};
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerImpl};

type BytePair =
    TokenizerImpl<BPE, tokenizers::NormalizerWrapper, ByteLevel, tokenizers::PostProcessorWrapper, ByteLevel>;

/// Bytes of text that are handed to `tokenizers` at once.
const PIECE: usize = 1 << 14;

/// Merges, their vocabulary and the bytes of each token.
#[derive(Clone)]
pub(super) struct Bpe {
    inner: BytePair,
    bytes: HashMap<u32, Box<[u8]>>,
    /// Tokens that are taken out of the text before it is split into words, as `<|endoftext|>`.
    added: Vec<String>,
    /// Whether every byte has a token, so that any text can be encoded.
    complete: bool,
}

impl Bpe {
    /// Trained on `texts` up to `vocab_size` tokens.
    pub(super) fn train<'a>(texts: impl Iterator<Item = &'a str> + Send, vocab_size: usize) -> Result<Self> {
        if vocab_size < 256 {
            return Err(Error::Usage(format!(
                "a byte-level vocabulary has a token for each of 256 bytes: {vocab_size} are too few"
            )));
        }
        let mut trainer = BpeTrainerBuilder::new()
            .vocab_size(vocab_size)
            .min_frequency(2)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let mut inner = byte_level(BPE::default());
        // Small enough that training runs over them in parallel.
        let pieces = texts.flat_map(|text| pieces(text, 1 << 16));
        inner
            .train(&mut trainer, pieces.map(str::to_string))
            .map_err(|error| Error::Usage(format!("cannot train a tokenizer: {error}")))?;
        Ok(Self::new(inner))
    }

    /// From GPT-2's two files.
    pub(super) fn from_files(vocab: &Path, merges: &Path) -> Result<Self, String> {
        let model = BPE::from_file(&vocab.to_string_lossy(), &merges.to_string_lossy());
        Ok(Self::new(byte_level(model.build().map_err(|error| format!("is no tokenizer: {error}"))?)))
    }

    /// From Hugging Face's `tokenizer.json`.
    pub(super) fn from_json(mut value: Value) -> Result<Self, String> {
        // Settings for other uses, which would cut, fill or vary what is learned from.
        for key in ["truncation", "padding"] {
            if let Some(setting) = value.get_mut(key) {
                setting.take();
            }
        }
        if let Some(dropout) = value.get_mut("model").and_then(|model| model.get_mut("dropout")) {
            dropout.take();
        }
        let inner = BytePair::from_bytes(value.to_string())
            .map_err(|error| format!("is no byte-level BPE tokenizer: {error}"))?;
        match inner.get_pre_tokenizer() {
            Some(level) if level.use_regex && !level.add_prefix_space => Ok(Self::new(inner)),
            _ => {
                Err("does not split text as GPT-2 does (pre_tokenizer ByteLevel with use_regex and without \
                      add_prefix_space): such tokenizers are not supported"
                    .into())
            }
        }
    }

    fn new(inner: BytePair) -> Self {
        let of_char: HashMap<char, u8> = byte_chars().zip(0..=255).collect();
        let spelt = |token: &str| token.chars().filter_map(|c| of_char.get(&c).copied()).collect();
        let mut bytes: HashMap<u32, Box<[u8]>> =
            inner.get_vocab(false).into_iter().map(|(token, id)| (id, spelt(&token))).collect();
        let mut added = vec![];
        for (id, token) in inner.get_added_tokens_decoder() {
            // These are text as it is, not spelt byte by byte.
            bytes.insert(id, token.content.as_bytes().into());
            added.push(token.content);
        }
        let complete = byte_chars().all(|c| inner.token_to_id(c.encode_utf8(&mut [0; 4])).is_some());
        Self { inner, bytes, added, complete }
    }

    pub(super) fn to_json(&self) -> Result<String> {
        self.inner.to_string(false).map_err(|error| Error::Usage(format!("cannot save a tokenizer: {error}")))
    }

    /// One more than the largest id: ids need not be dense in files of others.
    pub(super) fn vocab_size(&self) -> usize {
        self.bytes.keys().max().map_or(0, |&id| id as usize + 1)
    }

    /// The bytes of a token; none where there is no such token.
    pub(super) fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(&id).map_or(&[], |bytes| bytes)
    }

    /// The tokens of `text`.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = vec![];
        let plain = self.inner.get_normalizer().is_none();
        if plain && !self.added.iter().any(|token| text.contains(token.as_str())) {
            self.encode_words(text, &mut ids)?;
        } else {
            for piece in pieces(text, PIECE) {
                self.encode_piece(piece, &mut ids)?;
            }
        }
        if !self.complete && plain {
            self.check(text, &ids)?;
        }
        Ok(ids)
    }

    /// Word by word; a word that came before is copied from where it is in `ids`.
    fn encode_words<'a>(&self, text: &'a str, ids: &mut Vec<u32>) -> Result<()> {
        let mut seen: HashMap<&'a str, std::ops::Range<usize>> = HashMap::new();
        for piece in pieces(text, 1) {
            if !piece.is_ascii() {
                self.encode_piece(piece, ids)?;
                continue;
            }
            for word in ascii_words(piece) {
                if let Some(known) = seen.get(word) {
                    ids.extend_from_within(known.clone());
                } else {
                    let start = ids.len();
                    self.encode_piece(word, ids)?;
                    seen.insert(word, start..ids.len());
                }
            }
        }
        Ok(())
    }

    fn encode_piece(&self, piece: &str, ids: &mut Vec<u32>) -> Result<()> {
        let encoded = self.inner.encode_fast(piece, false);
        ids.extend(encoded.map_err(|error| Error::Usage(format!("cannot encode: {error}")))?.get_ids());
        Ok(())
    }

    /// Names the first character of `text` that `ids` do not give back.
    fn check(&self, text: &str, ids: &[u32]) -> Result<()> {
        let back: Vec<u8> = ids.iter().flat_map(|&id| self.token_bytes(id)).copied().collect();
        let lost = text.char_indices().find(|&(at, c)| {
            back.get(at..at + c.len_utf8()) != text.get(at..at + c.len_utf8()).map(str::as_bytes)
        });
        match lost {
            Some((_, c)) => {
                Err(Error::Usage(format!("the character {c:?} is not in the tokenizer's vocabulary")))
            }
            None => Ok(()),
        }
    }
}

fn byte_level(model: BPE) -> BytePair {
    let mut tokenizer = BytePair::new(model);
    let level = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(level)).with_decoder(Some(level));
    // GPT-2's only special token, where its vocabulary has it.
    if tokenizer.token_to_id("<|endoftext|>").is_some() {
        tokenizer.add_special_tokens(&[AddedToken::from("<|endoftext|>", true)]);
    }
    tokenizer
}

/// The characters that GPT-2 writes bytes 0 to 255 as: themselves where printable, else those from U+0100 on.
fn byte_chars() -> impl Iterator<Item = char> {
    let mut shifted = '\u{100}'..;
    (0..=255u8).filter_map(move |byte| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => Some(char::from(byte)),
        _ => shifted.next(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::sync::LazyLock;

    static TRAINED: LazyLock<Bpe> = LazyLock::new(|| {
        let text = "fn main() {\n\n    let it's = \"grüß 世界\";\n\n}\n\n\nabc abc ab 123 !!  x\n".repeat(20);
        Bpe::train([text.as_str()].into_iter(), 330).unwrap()
    });

    /// A vocabulary of all bytes and `merges`.
    fn with_merges(merges: &[[&str; 2]], change: impl FnOnce(&mut Value)) -> Result<Bpe, String> {
        let mut vocab: HashMap<String, u32> = byte_chars().map(String::from).zip(0..).collect();
        for (n, [a, b]) in merges.iter().enumerate() {
            vocab.insert(format!("{a}{b}"), 256 + n as u32);
        }
        let mut value = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
            "post_processor": null,
            "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
            "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges },
        });
        change(&mut value);
        Bpe::from_json(value)
    }

    fn text_of(bpe: &Bpe, ids: &[u32]) -> String {
        String::from_utf8(ids.iter().flat_map(|&id| bpe.token_bytes(id)).copied().collect()).unwrap()
    }

    proptest! {
        #[test]
        fn words_give_what_the_whole_text_gives(text in "([ab1'!(]|main|'s| |  |\n|\n\n|    let|é|世|ß|\u{a0}){0,40}") {
            let mut whole = vec![];
            TRAINED.encode_piece(&text, &mut whole).unwrap();
            let ids = TRAINED.encode(&text).unwrap();
            prop_assert_eq!(&ids, &whole);
            prop_assert_eq!(text_of(&TRAINED, &ids), text);
        }
    }

    #[test]
    fn training_is_deterministic() {
        let text: String = (0..20_000u64).map(|n| format!("w{} ", n * n % 997)).collect();
        let train = || Bpe::train([text.as_str()].into_iter(), 600).unwrap().to_json().unwrap();
        assert_eq!(train(), train());
        assert!(Bpe::train([text.as_str()].into_iter(), 255).is_err());
    }

    #[test]
    fn blank_lines_are_two_tokens_wherever_the_text_is_cut() {
        // GPT-2 has a token for two line breaks (628), but gives the second of "\n\nb" to the next word.
        let bpe = with_merges(&[["Ċ", "Ċ"]], |_| {}).unwrap();
        let line_break = bpe.encode("\n").unwrap()[0];
        let text = "a\n\nb".repeat(PIECE);
        for piece in [text.as_str(), &text[..400]] {
            assert!(bpe.encode(piece).unwrap().iter().all(|&id| id != 256));
        }
        let cut: Vec<u32> = pieces(&text, 64).flat_map(|piece| bpe.encode(piece).unwrap()).collect();
        assert_eq!(cut, bpe.encode(&text).unwrap());
        assert_eq!(cut.iter().filter(|&&id| id == line_break).count(), 2 * PIECE);
        assert_eq!(bpe.encode("a\n\n").unwrap().last(), Some(&256));
    }

    #[test]
    fn settings_for_other_uses_are_dropped() {
        let merges = [["a", "b"], ["c", "d"], ["ab", "cd"]];
        let expected = with_merges(&merges, |_| {}).unwrap().encode("abcd xyzwvu abcd").unwrap();
        let bpe = with_merges(&merges, |value| {
            value["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
            value["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
            value["model"]["dropout"] = json!(0.9);
        })
        .unwrap();
        for _ in 0..5 {
            assert_eq!(bpe.encode("abcd xyzwvu abcd").unwrap(), expected);
        }
        let split = with_merges(&merges, |value| value["pre_tokenizer"]["add_prefix_space"] = json!(true));
        assert!(split.is_err_and(|problem| problem.contains("add_prefix_space")));
    }

    #[test]
    fn special_tokens_are_text_as_it_is() {
        let bpe = with_merges(&[], |value| {
            value["added_tokens"] = json!([{"id": 256, "content": "<a b é>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}]);
        })
        .unwrap();
        let ids = bpe.encode("x<a b é>y").unwrap();
        assert_eq!((ids.len(), ids[1]), (3, 256));
        assert_eq!(text_of(&bpe, &ids), "x<a b é>y");
        assert_eq!(bpe.vocab_size(), 257);
    }
}
