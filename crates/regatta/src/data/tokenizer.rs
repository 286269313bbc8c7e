//! Converts text to tokens and back: by characters, by bytes, or by byte-level byte-pair encoding.

use super::bpe::Bpe;
use super::decode;
use super::words::pieces;
use crate::error::{Error, Result};
use crate::files::write_atomically;
use serde_json::{Value, json};
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

/// Most tokens by which a model's vocabulary may exceed the tokenizer's. Vocabularies are padded to a multiple of at
/// most 1024.
const MOST_PADDING: usize = 1023;

/// A vocabulary, and the rules by which text is split into its tokens.
///
/// ```
/// use regatta::data::tokenizer::Tokenizer;
/// let tokenizer = Tokenizer::chars(["hello"].into_iter());
/// let ids = tokenizer.encode("hole")?;
/// assert_eq!(ids, [1, 3, 2, 0]); // the vocabulary is e, h, l, o
/// assert_eq!(tokenizer.decode(&ids), "hole");
/// # Ok::<(), regatta::Error>(())
/// ```
#[derive(Clone)]
pub struct Tokenizer(Kind);

#[derive(Clone)]
enum Kind {
    Chars { chars: Vec<char>, ids: HashMap<char, u32> },
    Bytes,
    Bpe(Box<Bpe>),
}

impl Tokenizer {
    /// One token per character that occurs in `texts`, in the order of code points.
    pub fn chars<'a>(texts: impl Iterator<Item = &'a str>) -> Self {
        let set: BTreeSet<char> = texts.flat_map(str::chars).collect();
        Self::from_chars(set.into_iter().collect())
    }

    fn from_chars(chars: Vec<char>) -> Self {
        let ids = chars.iter().enumerate().map(|(id, &c)| (c, id as u32)).collect();
        Self(Kind::Chars { chars, ids })
    }

    /// One token per byte: 256 tokens.
    pub fn bytes() -> Self {
        Self(Kind::Bytes)
    }

    /// Byte-level byte-pair encoding with GPT-2's splitting into words, trained on `texts` up to `vocab_size`
    /// tokens (Sennrich et al. 2016; Radford et al. 2019, section 2.2). The same texts give the same tokens.
    ///
    /// # Errors
    /// `vocab_size` is below 256, or the trainer fails.
    pub fn train_bpe<'a>(texts: impl Iterator<Item = &'a str> + Send, vocab_size: usize) -> Result<Self> {
        Self::train_bpe_with(texts, vocab_size, &mut |_| {})
    }

    /// As [`train_bpe`](Self::train_bpe); `progress` gets the number of tokens so far.
    ///
    /// # Errors
    /// As [`train_bpe`](Self::train_bpe).
    pub fn train_bpe_with<'a>(
        texts: impl Iterator<Item = &'a str> + Send,
        vocab_size: usize,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self> {
        Ok(Self(Kind::Bpe(Box::new(Bpe::train(texts, vocab_size, progress)?))))
    }

    /// Loads a file that [`save`](Self::save) wrote, a byte-level BPE `tokenizer.json` of Hugging Face, or a folder
    /// with such a file or with GPT-2's `vocab.json` (`encoder.json`) and `merges.txt` (`vocab.bpe`). A file's
    /// settings for truncation, padding and dropout are ignored: the whole text is encoded, and always in the same
    /// way.
    ///
    /// # Errors
    /// A file is missing or is not a tokenizer.
    pub fn load(path: &Path) -> Result<Self> {
        let files = Self::files(path)?;
        let read = |path: &Path| fs::read_to_string(path).map_err(Error::io("read the tokenizer", path));
        if let [vocab, merges] = &files[..] {
            let read = Self::of_gpt2(&read(vocab)?, &read(merges)?);
            return read.map_err(|problem| Error::data(path, problem));
        }
        Self::parse(&read(&files[0])?).map_err(|problem| Error::data(&files[0], problem))
    }

    /// Parses the contents of GPT-2's two files.
    pub(crate) fn of_gpt2(vocab: &str, merges: &str) -> Result<Self, String> {
        let bpe = Bpe::from_texts(decode::json(vocab), decode::json(merges))?;
        Ok(Self(Kind::Bpe(Box::new(bpe))))
    }

    /// The files that [`load`](Self::load) reads: one, or a vocabulary and its merges.
    pub(crate) fn files(path: &Path) -> Result<Vec<PathBuf>> {
        if !path.is_dir() {
            return Ok(vec![path.into()]);
        }
        if path.join("tokenizer.json").exists() {
            return Ok(vec![path.join("tokenizer.json")]);
        }
        let file = |names: [&str; 2]| names.iter().map(|name| path.join(name)).find(|path| path.exists());
        match (file(["vocab.json", "encoder.json"]), file(["merges.txt", "vocab.bpe"])) {
            (Some(vocab), Some(merges)) => Ok(vec![vocab, merges]),
            _ => {
                let problem = "has neither tokenizer.json nor GPT-2's vocab.json and merges.txt";
                Err(Error::data(path, problem))
            }
        }
    }

    /// Parses a tokenizer's JSON.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let value: Value = serde_json::from_str(decode::json(text))
            .map_err(|error| format!("is not a tokenizer: {error}"))?;
        match value["regatta"].as_str() {
            Some("bytes") => Ok(Self::bytes()),
            Some("chars") => {
                let chars: Vec<char> = value["chars"].as_str().unwrap_or_default().chars().collect();
                // Sorted and without duplicates, as `chars` creates them.
                if chars.is_empty() || !chars.is_sorted_by(|a, b| a < b) {
                    return Err("is damaged: its characters are missing or not in order".into());
                }
                Ok(Self::from_chars(chars))
            }
            Some(other) => Err(format!("is a tokenizer of the unknown kind {other:?}")),
            None => Ok(Self(Kind::Bpe(Box::new(Bpe::from_json(value)?)))),
        }
    }

    /// The tokenizer as JSON: Hugging Face's format for BPE, Regatta's own for characters and bytes.
    ///
    /// # Errors
    /// Serialisation fails.
    pub fn to_json(&self) -> Result<String> {
        match &self.0 {
            Kind::Bytes => Ok(json!({ "regatta": "bytes" }).to_string()),
            Kind::Chars { chars, .. } => {
                Ok(json!({ "regatta": "chars", "chars": chars.iter().collect::<String>() }).to_string())
            }
            Kind::Bpe(bpe) => bpe.to_json(),
        }
    }

    /// Writes it to `path`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        write_atomically(path, self.to_json()?.as_bytes())
    }

    /// Its kind: `chars`, `bytes` or `bpe`.
    pub fn kind(&self) -> &'static str {
        match self.0 {
            Kind::Chars { .. } => "chars",
            Kind::Bytes => "bytes",
            Kind::Bpe(_) => "bpe",
        }
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        match &self.0 {
            Kind::Chars { chars, .. } => chars.len(),
            Kind::Bytes => 256,
            Kind::Bpe(bpe) => bpe.vocab_size(),
        }
    }

    /// Checks that it fits a model with `vocab` tokens. Under BPE the model may have up to 1023 more tokens, because
    /// vocabularies are often padded to a size that divides well (50304 for GPT-2's 50257).
    ///
    /// # Errors
    /// The message says why it does not fit.
    pub fn fits(&self, vocab: usize) -> Result<(), String> {
        let own = self.vocab_size();
        let padding = if matches!(self.0, Kind::Bpe(_)) { MOST_PADDING } else { 0 };
        match vocab.checked_sub(own) {
            Some(beyond) if beyond <= padding => Ok(()),
            _ => Err(format!("the model has {vocab} tokens, but the tokenizer has {own}")),
        }
    }

    /// The token that ends a document, if the tokenizer has one, as GPT-2's `<|endoftext|>`.
    pub fn end_of_text(&self) -> Option<u32> {
        match &self.0 {
            Kind::Bpe(bpe) => bpe.end_of_text(),
            Kind::Chars { .. } | Kind::Bytes => None,
        }
    }

    /// Whether a token has the id `id`; ids in foreign files may have gaps.
    pub fn has(&self, id: u32) -> bool {
        match &self.0 {
            Kind::Bpe(bpe) => bpe.has(id),
            Kind::Chars { .. } | Kind::Bytes => (id as usize) < self.vocab_size(),
        }
    }

    /// Cuts `text` into pieces of about `size` bytes that can be encoded one by one.
    pub(crate) fn pieces<'a>(
        &self,
        text: &'a str,
        size: usize,
    ) -> Box<dyn Iterator<Item = &'a str> + Send + 'a> {
        match self.0 {
            Kind::Bpe(_) => Box::new(pieces(text, size)),
            // Text can be cut between any two characters.
            Kind::Chars { .. } | Kind::Bytes => {
                let mut rest = text;
                Box::new(std::iter::from_fn(move || {
                    let (piece, after) = rest.split_at(rest.ceil_char_boundary(size));
                    rest = after;
                    Some(piece).filter(|piece| !piece.is_empty())
                }))
            }
        }
    }

    /// The tokens of `text`.
    ///
    /// # Errors
    /// The text has a character that is not in the vocabulary.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match &self.0 {
            Kind::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Kind::Chars { ids, .. } => text
                .chars()
                .map(|c| {
                    ids.get(&c).copied().ok_or_else(|| {
                        Error::Usage(format!(
                            "the character {c:?} does not occur in the text from which the vocabulary was made"
                        ))
                    })
                })
                .collect(),
            Kind::Bpe(bpe) => bpe.encode(text),
        }
    }

    /// Appends the bytes of one token to `out`; nothing for an id that is not in the vocabulary.
    fn push_bytes(&self, id: u32, out: &mut Vec<u8>) {
        match &self.0 {
            Kind::Bytes => out.extend(u8::try_from(id)),
            Kind::Chars { chars, .. } => {
                if let Some(c) = chars.get(id as usize) {
                    out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                }
            }
            Kind::Bpe(bpe) => out.extend(bpe.token_bytes(id)),
        }
    }

    /// The text of `ids`; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut bytes = vec![];
        ids.iter().for_each(|&id| self.push_bytes(id, &mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A decoder that takes one token at a time.
    pub fn stream(&self) -> Stream<'_> {
        Stream { tokenizer: self, bytes: vec![] }
    }
}

/// A decoder that keeps bytes until they form whole characters.
pub struct Stream<'a> {
    tokenizer: &'a Tokenizer,
    bytes: Vec<u8>,
}

impl Stream<'_> {
    /// Adds a token. Returns the text that it completes, which may be empty.
    pub fn push(&mut self, id: u32) -> String {
        self.tokenizer.push_bytes(id, &mut self.bytes);
        let mut out = String::new();
        loop {
            match std::str::from_utf8(&self.bytes) {
                Ok(text) => {
                    out.push_str(text);
                    self.bytes.clear();
                    return out;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    out.push_str(&String::from_utf8_lossy(&self.bytes[..valid]));
                    match error.error_len() {
                        // The rest may still become a character.
                        None => {
                            self.bytes.drain(..valid);
                            return out;
                        }
                        Some(len) => {
                            out.push('\u{fffd}');
                            self.bytes.drain(..valid + len);
                        }
                    }
                }
            }
        }
    }

    /// The rest of the text: U+FFFD for an incomplete character, else empty.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "fn main() {\n    println!(\"grüß dich, 世界\");\n}\n\nfn other() {\n    main();\n}\n";

    fn round_trip(tokenizer: &Tokenizer) {
        let ids = tokenizer.encode(TEXT).unwrap();
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
        assert_eq!(tokenizer.decode(&ids), TEXT);
        let mut stream = tokenizer.stream();
        assert_eq!(ids.iter().map(|&id| stream.push(id)).collect::<String>(), TEXT);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        tokenizer.save(&path).unwrap();
        let loaded = Tokenizer::load(&path).unwrap();
        assert_eq!((loaded.encode(TEXT).unwrap(), loaded.kind()), (ids, tokenizer.kind()));
    }

    #[test]
    fn all_kinds_round_trip() {
        round_trip(&Tokenizer::bytes());
        round_trip(&Tokenizer::chars([TEXT].into_iter()));
        let bpe = || Tokenizer::train_bpe([TEXT, TEXT].into_iter(), 290).unwrap();
        round_trip(&bpe());
        assert_eq!(bpe().vocab_size(), 290);
        assert_eq!(bpe().to_json().unwrap(), bpe().to_json().unwrap());
        assert!(bpe().encode(TEXT).unwrap().len() < TEXT.len() * 3 / 4);
    }

    #[test]
    fn an_unknown_character_is_named() {
        let error = Tokenizer::chars(["abc"].into_iter()).encode("abx").unwrap_err();
        assert!(error.to_string().contains("'x'"), "{error}");
    }

    #[test]
    fn gpt2_files() {
        let folder = tempfile::tempdir().unwrap();
        // "Ġ" is how GPT-2 writes the space.
        let vocab = r#"{"h":0,"e":1,"l":2,"o":3,"Ġ":4,"w":5,"he":6,"ll":7,"hell":8,"hello":9,"Ġw":10,"<|endoftext|>":11}"#;
        fs::write(folder.path().join("vocab.json"), vocab).unwrap();
        fs::write(folder.path().join("merges.txt"), "#version: 0.2\nh e\nl l\nhe ll\nhell o\nĠ w\n").unwrap();
        let tokenizer = Tokenizer::load(folder.path()).unwrap();
        assert_eq!(tokenizer.encode("hello whe<|endoftext|>").unwrap(), [9, 10, 6, 11]);
        assert_eq!(tokenizer.decode(&[9, 10, 6]), "hello whe");
        assert_eq!(tokenizer.vocab_size(), 12);
        // Real vocabularies have all bytes. With one that lacks some, text must not be lost without an error.
        let error = tokenizer.encode("hello x").unwrap_err().to_string();
        assert!(error.contains("'x'"), "{error}");
    }

    #[test]
    fn foreign_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.json");
        for text in [
            "",
            "{}",
            "[1]",
            "{\"regatta\":\"x\"}",
            "{\"regatta\":\"chars\"}",
            "{\"regatta\":\"chars\",\"chars\":\"aab\"}",
            "{\"model\":3,\"truncation\":[]}",
        ] {
            fs::write(&path, text).unwrap();
            assert!(Tokenizer::load(&path).is_err(), "{text}");
        }
        assert!(Tokenizer::load(folder.path()).is_err());
        assert!(Tokenizer::load(Path::new("/does/not/exist")).is_err());
    }

    #[test]
    fn a_stream_gives_whole_characters_only() {
        let bytes = Tokenizer::bytes();
        let mut stream = bytes.stream();
        let pieces: Vec<String> = "aé世".bytes().map(|byte| stream.push(byte.into())).collect();
        assert_eq!(pieces, ["a", "", "é", "", "", "世"]);
        // A byte that cannot begin a character, an id that does not exist, then an incomplete character.
        assert_eq!((stream.push(0x80), stream.push(1000)), ("\u{fffd}".into(), String::new()));
        assert_eq!((stream.push(0xe4), stream.push(0xb8)), (String::new(), String::new()));
        assert_eq!(stream.finish(), "\u{fffd}");
        assert_eq!(bytes.stream().finish(), "");
    }
}
