//! Byte-level byte-pair encoding with GPT-2's words (Sennrich et al. 2016; Radford et al. 2019, section 2.2).
//!
//! The crate `tokenizers` reads and applies the merges. Words recur in a text, so each word is passed to it only once;
//! that is several times faster than passing the whole text. Merges are learned in `bpe_trainer`.

use super::bpe_trainer;
use super::words::{ascii_words, pieces};
use crate::error::{Error, Result};
use ahash::AHashMap;
use rayon::prelude::*;
use serde_json::Value;
use std::collections::HashMap;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, TokenizerImpl,
};

type BytePair =
    TokenizerImpl<BPE, tokenizers::NormalizerWrapper, ByteLevel, tokenizers::PostProcessorWrapper, ByteLevel>;

/// Bytes of text that are passed to `tokenizers` at once.
const PIECE: usize = 1 << 14;

/// Bytes of a piece whose words are counted by one task.
const COUNTED_PIECE: usize = 1 << 16;

/// Upper bound of ids. No vocabulary in use has a tenth of this.
const MOST_TOKENS: u32 = 1 << 24;

/// Tokens that mark the end of a document in tokenizers of this kind: GPT-2's, its successors', RoBERTa's.
const ENDS: [&str; 3] = ["<|endoftext|>", "<|end_of_text|>", "</s>"];

/// Merges, their vocabulary and the bytes of each token.
#[derive(Clone)]
pub(super) struct Bpe {
    inner: BytePair,
    bytes: HashMap<u32, Box<[u8]>>,
    /// Tokens that are recognised before the text is split into words, as `<|endoftext|>`.
    added: Vec<String>,
    /// The special token that ends a document.
    end_of_text: Option<u32>,
    /// Whether every byte has a token, so that any text can be encoded.
    complete: bool,
}

impl Bpe {
    /// Trains on `texts` until there are `vocab_size` tokens. `progress` gets the number of tokens so far.
    pub(super) fn train<'a>(
        texts: impl Iterator<Item = &'a str> + Send,
        vocab_size: usize,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self> {
        if vocab_size < 256 {
            return Err(Error::Usage(format!(
                "a byte-level vocabulary has a token for each of 256 bytes: {vocab_size} tokens are too few"
            )));
        }
        let failed = |error: String| Error::Usage(format!("cannot train a tokenizer: {error}"));
        let mut words: Vec<_> = count_words(texts).map_err(failed)?.into_iter().collect();
        // The order of a hash map is random and must not affect the result.
        words.sort_unstable();
        let (alphabet, spelling) = alphabet();
        let words = words.iter().map(|(word, count)| (word.as_bytes(), *count));
        let learned = bpe_trainer::learn(words, &alphabet, vocab_size, 2, progress).map_err(failed)?;
        let spelt: Vec<String> = learned
            .tokens
            .iter()
            .map(|token| token.iter().map(|&byte| spelling[usize::from(byte)]).collect())
            .collect();
        let merges =
            learned.merges.iter().map(|&(a, b)| (spelt[a as usize].clone(), spelt[b as usize].clone()));
        let merges = merges.collect();
        let vocab: AHashMap<String, u32> = spelt.into_iter().zip(0..).collect();
        let model = BPE::builder().vocab_and_merges(vocab, merges).build();
        let mut inner = byte_level(BPE::default());
        inner.with_model(model.map_err(|error| failed(error.to_string()))?);
        Ok(Self::new(inner))
    }

    /// Reads the contents of GPT-2's two files.
    pub(super) fn from_texts(vocab: &str, merges: &str) -> Result<Self, String> {
        let vocab: HashMap<String, u32> = serde_json::from_str(vocab)
            .map_err(|error| format!("is not a tokenizer: its vocabulary: {error}"))?;
        let pairs = merges.lines().filter(|line| !line.starts_with("#version") && !line.is_empty());
        let pairs = pairs.map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
            [a, b] => Ok((a.to_string(), b.to_string())),
            _ => Err(format!("is not a tokenizer: {line:?} is not a merge of two tokens")),
        });
        let pairs: Vec<(String, String)> = pairs.collect::<Result<_, _>>()?;
        let vocab: AHashMap<String, u32> = vocab.into_iter().collect();
        let model = BPE::builder().vocab_and_merges(vocab, pairs).build();
        Self::checked(byte_level(model.map_err(|error| format!("is not a tokenizer: {error}"))?))
    }

    /// Refuses very large ids, because a model has a row for each id up to the largest, and an id of two tokens.
    fn checked(inner: BytePair) -> Result<Self, String> {
        let mut tokens: Vec<(u32, String)> =
            inner.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect();
        tokens.sort_unstable();
        if let Some([(id, a), (_, b)]) = tokens.array_windows().find(|[a, b]| a.0 == b.0) {
            return Err(format!("is not a tokenizer: the tokens {a:?} and {b:?} both have the id {id}"));
        }
        match tokens.last() {
            None => Err("is not a tokenizer: it has no tokens".into()),
            Some((id, token)) if *id >= MOST_TOKENS => Err(format!(
                "has a token {token:?} with the id {id}: at most {MOST_TOKENS} tokens are supported"
            )),
            Some(_) => Ok(Self::new(inner)),
        }
    }

    /// Reads Hugging Face's `tokenizer.json`.
    pub(super) fn from_json(mut value: Value) -> Result<Self, String> {
        supported(&value)?;
        // These settings would truncate, pad or vary the text.
        for key in ["truncation", "padding"] {
            if let Some(setting) = value.get_mut(key) {
                setting.take();
            }
        }
        if let Some(dropout) = value.get_mut("model").and_then(|model| model.get_mut("dropout")) {
            dropout.take();
        }
        let inner = BytePair::from_bytes(value.to_string())
            .map_err(|error| format!("is not a byte-level BPE tokenizer: {error}"))?;
        match inner.get_pre_tokenizer() {
            Some(level) if level.use_regex && !level.add_prefix_space => Self::checked(inner),
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
        let (mut added, mut ends) = (vec![], vec![]);
        for (id, token) in inner.get_added_tokens_decoder() {
            // Their content is plain text, not spelt byte by byte.
            bytes.insert(id, token.content.as_bytes().into());
            if let Some(place) = ENDS.iter().position(|end| token.special && *end == token.content) {
                ends.push((place, id));
            }
            added.push(token.content);
        }
        let end_of_text = ends.into_iter().min().map(|(_, id)| id);
        let complete = byte_chars().all(|c| inner.token_to_id(c.encode_utf8(&mut [0; 4])).is_some());
        Self { inner, bytes, added, end_of_text, complete }
    }

    pub(super) fn to_json(&self) -> Result<String> {
        self.inner.to_string(false).map_err(|error| Error::Usage(format!("cannot save a tokenizer: {error}")))
    }

    /// One more than the largest id: ids in foreign files may have gaps.
    pub(super) fn vocab_size(&self) -> usize {
        self.bytes.keys().max().map_or(0, |&id| id as usize + 1)
    }

    /// The token that ends a document, if there is one.
    pub(super) fn end_of_text(&self) -> Option<u32> {
        self.end_of_text
    }

    /// Whether a token has this id.
    pub(super) fn has(&self, id: u32) -> bool {
        self.bytes.contains_key(&id)
    }

    /// The bytes of a token; empty if no token has this id.
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

    /// Encodes word by word. The tokens of a word that occurred before are copied from `ids`.
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

    /// Checks that `ids` decode to `text`. The error names the first character that they lack.
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

/// Refuses settings that byte-level tokenizers do not have. Some of them would make the crate panic.
fn supported(value: &Value) -> Result<(), String> {
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if value["model"][key].as_str().is_some_and(|affix| !affix.is_empty()) {
            return Err(format!("is not a byte-level BPE tokenizer: it has a {key}"));
        }
    }
    fn normalizes(value: &Value) -> Result<(), String> {
        let known = ["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Sequence"];
        match (value, value["type"].as_str()) {
            (Value::Null, _) => Ok(()),
            (_, Some("Sequence")) => {
                value["normalizers"].as_array().into_iter().flatten().try_for_each(normalizes)
            }
            (_, Some(name)) if known.contains(&name) => Ok(()),
            (_, name) => {
                Err(format!("has the normalizer {}, which is not supported", name.unwrap_or("(none)")))
            }
        }
    }
    normalizes(&value["normalizer"])
}

/// How often each word occurs in `texts`.
fn count_words<'a>(texts: impl Iterator<Item = &'a str> + Send) -> Result<AHashMap<&'a str, u64>, String> {
    type Counts<'a> = AHashMap<&'a str, u64>;
    let count = |piece: &'a str| -> Result<Counts<'a>, String> {
        let mut counts = Counts::new();
        if piece.is_ascii() {
            ascii_words(piece).for_each(|word| *counts.entry(word).or_default() += 1);
            return Ok(counts);
        }
        let mut words = PreTokenizedString::from(piece);
        ByteLevel::new(false, true, true).pre_tokenize(&mut words).map_err(|error| error.to_string())?;
        for (_, (from, to), _) in words.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            *counts.entry(&piece[from..to]).or_default() += 1;
        }
        Ok(counts)
    };
    let sum = |a: Counts<'a>, b: Counts<'a>| {
        let (mut all, less) = if a.len() < b.len() { (b, a) } else { (a, b) };
        less.into_iter().for_each(|(word, count)| *all.entry(word).or_default() += count);
        Ok(all)
    };
    texts.flat_map(|text| pieces(text, COUNTED_PIECE)).par_bridge().map(count).try_reduce(Counts::new, sum)
}

/// The bytes in the order of their ids, and by byte the character that it is written as. Ids are in the order of these
/// characters.
pub(super) fn alphabet() -> ([u8; 256], [char; 256]) {
    let mut spelling = ['\0'; 256];
    spelling.iter_mut().zip(byte_chars()).for_each(|(slot, c)| *slot = c);
    let mut bytes: [u8; 256] = std::array::from_fn(|byte| byte as u8);
    bytes.sort_by_key(|&byte| spelling[usize::from(byte)]);
    (bytes, spelling)
}

fn byte_level(model: BPE) -> BytePair {
    let mut tokenizer = BytePair::new(model);
    let level = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(level)).with_decoder(Some(level));
    // GPT-2's only special token, if its vocabulary has it.
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
        Bpe::train([text.as_str()].into_iter(), 330, &mut |_| {}).unwrap()
    });

    /// A tokenizer of all bytes and `merges`.
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

    /// The tokenizer that the crate trains on the texts.
    fn by_the_crate(texts: &[String], vocab_size: usize) -> String {
        let mut trainer = tokenizers::models::bpe::BpeTrainerBuilder::new()
            .vocab_size(vocab_size)
            .min_frequency(2)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let mut inner = byte_level(BPE::default());
        inner.train(&mut trainer, texts.iter().cloned()).unwrap();
        inner.to_string(false).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        #[test]
        fn texts_are_learned_as_the_crate_learns_them(
            texts in prop::collection::vec("([ab1'!(]|main|'s| the then|  |\n|\n\n|    let|é|世界|ß|\u{a0}){0,80}", 1..6),
            more in 0usize..90,
        ) {
            let ours = Bpe::train(texts.iter().map(String::as_str), 256 + more, &mut |_| {}).unwrap();
            prop_assert_eq!(ours.to_json().unwrap(), by_the_crate(&texts, 256 + more));
        }
    }

    #[test]
    fn training_is_deterministic() {
        let text: String = (0..20_000u64).map(|n| format!("w{} ", n * n % 997)).collect();
        let train = || Bpe::train([text.as_str()].into_iter(), 600, &mut |_| {}).unwrap().to_json().unwrap();
        assert_eq!(train(), train());
        assert!(Bpe::train([text.as_str()].into_iter(), 255, &mut |_| {}).is_err());
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
