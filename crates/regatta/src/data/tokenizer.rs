//! Text to tokens and back: by characters, by bytes, or by byte-level byte-pair encoding.

use crate::checkpoint::write_atomically;
use crate::error::{Error, Result};
use serde_json::{Value, json};
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::Path;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerImpl};

type BytePair =
    TokenizerImpl<BPE, tokenizers::NormalizerWrapper, ByteLevel, tokenizers::PostProcessorWrapper, ByteLevel>;

/// A vocabulary and the rules to use it.
#[derive(Clone)]
pub struct Tokenizer(Kind);

#[derive(Clone)]
enum Kind {
    Chars { chars: Vec<char>, ids: HashMap<char, u32> },
    Bytes,
    Bpe(Box<BytePair>),
}

fn failed(path: &Path) -> impl Fn(Box<dyn std::error::Error + Send + Sync>) -> Error {
    move |error| Error::data(path, format!("is no tokenizer: {error}"))
}

impl Tokenizer {
    /// One token a character that occurs in `texts`, in the order of code points.
    pub fn chars<'a>(texts: impl Iterator<Item = &'a str>) -> Self {
        let set: BTreeSet<char> = texts.flat_map(str::chars).collect();
        Self::from_chars(set.into_iter().collect())
    }

    fn from_chars(chars: Vec<char>) -> Self {
        let ids = chars.iter().enumerate().map(|(id, &c)| (c, id as u32)).collect();
        Self(Kind::Chars { chars, ids })
    }

    /// One token a byte.
    pub fn bytes() -> Self {
        Self(Kind::Bytes)
    }

    /// Byte-level byte-pair encoding with GPT-2's splitting into words, trained on `texts` up to `vocab_size`
    /// tokens (Sennrich et al. 2016; Radford et al. 2019, section 2.2). The same texts give the same tokens.
    ///
    /// # Errors
    /// Should the trainer fail.
    pub fn train_bpe<'a>(texts: impl Iterator<Item = &'a str> + Send, vocab_size: usize) -> Result<Self> {
        let mut trainer = BpeTrainerBuilder::new()
            .vocab_size(vocab_size)
            .min_frequency(2)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let mut tokenizer = byte_level(BPE::default());
        // Pieces of whole lines, so that training runs over them in parallel.
        let pieces = texts.flat_map(|text| pieces(text, 1 << 16));
        tokenizer
            .train(&mut trainer, pieces.map(str::to_string))
            .map_err(|error| Error::Usage(format!("cannot train a tokenizer: {error}")))?;
        Ok(Self(Kind::Bpe(Box::new(tokenizer))))
    }

    /// Loads what [`save`](Self::save) wrote, a byte-level BPE `tokenizer.json` of Hugging Face, or a folder with
    /// such a file or with GPT-2's `vocab.json` (`encoder.json`) and `merges.txt` (`vocab.bpe`).
    ///
    /// # Errors
    /// Files that are missing or hold something else.
    pub fn load(path: &Path) -> Result<Self> {
        if path.is_dir() {
            let file = |names: [&str; 2]| names.iter().map(|name| path.join(name)).find(|path| path.exists());
            if path.join("tokenizer.json").exists() {
                return Self::load(&path.join("tokenizer.json"));
            }
            let (Some(vocab), Some(merges)) =
                (file(["vocab.json", "encoder.json"]), file(["merges.txt", "vocab.bpe"]))
            else {
                let problem = "holds neither tokenizer.json nor GPT-2's vocab.json and merges.txt";
                return Err(Error::data(path, problem));
            };
            let model = BPE::from_file(&vocab.to_string_lossy(), &merges.to_string_lossy());
            return Ok(Self(Kind::Bpe(Box::new(byte_level(model.build().map_err(failed(path))?)))));
        }
        let text = fs::read_to_string(path).map_err(Error::io("read the tokenizer", path))?;
        let value: Value = serde_json::from_str(&text).map_err(|error| failed(path)(error.into()))?;
        match value["regatta"].as_str() {
            Some("bytes") => Ok(Self::bytes()),
            Some("chars") => match value["chars"].as_str() {
                Some(chars) => Ok(Self::from_chars(chars.chars().collect())),
                None => Err(Error::data(path, "is damaged: it has no characters")),
            },
            Some(other) => Err(Error::data(path, format!("is a tokenizer of the unknown kind {other:?}"))),
            None => {
                let tokenizer = BytePair::from_bytes(text.as_bytes());
                let tokenizer = tokenizer
                    .map_err(|error| Error::data(path, format!("is no byte-level BPE tokenizer: {error}")))?;
                Ok(Self(Kind::Bpe(Box::new(tokenizer))))
            }
        }
    }

    /// As JSON: Hugging Face's format for BPE, a small one of ours for characters and bytes.
    ///
    /// # Errors
    /// Should serialisation fail.
    pub fn to_json(&self) -> Result<String> {
        match &self.0 {
            Kind::Bytes => Ok(json!({ "regatta": "bytes" }).to_string()),
            Kind::Chars { chars, .. } => {
                Ok(json!({ "regatta": "chars", "chars": chars.iter().collect::<String>() }).to_string())
            }
            Kind::Bpe(tokenizer) => {
                tokenizer.to_string(false).map_err(|error| Error::Usage(error.to_string()))
            }
        }
    }

    /// Writes it to `path`.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        write_atomically(path, self.to_json()?.as_bytes())
    }

    /// What kind it is, for messages.
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
            // Ids need not be dense in files of others.
            Kind::Bpe(bpe) => bpe.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1),
        }
    }

    /// The tokens of `text`.
    ///
    /// # Errors
    /// A character that is not in the vocabulary.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match &self.0 {
            Kind::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Kind::Chars { ids, .. } => text
                .chars()
                .map(|c| {
                    ids.get(&c).copied().ok_or_else(|| {
                        Error::Usage(format!(
                            "the character {c:?} does not occur in the text that the vocabulary was made from"
                        ))
                    })
                })
                .collect(),
            Kind::Bpe(bpe) => {
                let mut ids = vec![];
                for piece in pieces(text, 1 << 14) {
                    let encoded = bpe.encode_fast(piece, false);
                    ids.extend(
                        encoded.map_err(|error| Error::Usage(format!("cannot encode: {error}")))?.get_ids(),
                    );
                }
                Ok(ids)
            }
        }
    }

    /// The bytes of one token.
    fn token_bytes(&self, id: u32) -> Vec<u8> {
        match &self.0 {
            Kind::Bytes => u8::try_from(id).into_iter().collect(),
            Kind::Chars { chars, .. } => {
                chars.get(id as usize).map_or(vec![], |c| c.to_string().into_bytes())
            }
            Kind::Bpe(bpe) => {
                bpe.id_to_token(id).map_or(vec![], |token| token.chars().filter_map(byte_of).collect())
            }
        }
    }

    /// The text of `ids`; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.token_bytes(id)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Decodes token by token.
    pub fn stream(&self) -> Stream<'_> {
        Stream { tokenizer: self, bytes: vec![] }
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

/// The byte that a character of a byte-level token stands for: itself where printable, else shifted by 256 in
/// the order of the bytes that are not (GPT-2's table).
fn byte_of(c: char) -> Option<u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let code = c as u32;
    match u8::try_from(code) {
        Ok(byte) => printable(byte).then_some(byte),
        Err(_) => (0..=255u8).filter(|&byte| !printable(byte)).nth(code.checked_sub(256)? as usize),
    }
}

/// Cuts `text` after line breaks into pieces of about `size` bytes. A line break begins no word for GPT-2's
/// splitting but may end a run of white space, so cuts are made only before a line that begins with none.
pub(crate) fn pieces(text: &str, size: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let bytes = rest.as_bytes();
        let cut = (size.min(bytes.len())..bytes.len())
            .find(|&at| bytes[at - 1] == b'\n' && bytes[at].is_ascii_graphic())
            .unwrap_or(bytes.len());
        let (piece, after) = rest.split_at(cut);
        rest = after;
        Some(piece)
    })
}

/// A decoder that holds back bytes until they are whole characters.
pub struct Stream<'a> {
    tokenizer: &'a Tokenizer,
    bytes: Vec<u8>,
}

impl Stream<'_> {
    /// The text that `id` completes; may be empty.
    pub fn push(&mut self, id: u32) -> String {
        self.bytes.extend(self.tokenizer.token_bytes(id));
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
    fn all_kinds_go_there_and_back() {
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
    }

    #[test]
    fn foreign_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.json");
        for text in ["", "{}", "[1]", "{\"regatta\":\"x\"}", "{\"regatta\":\"chars\"}"] {
            fs::write(&path, text).unwrap();
            assert!(Tokenizer::load(&path).is_err(), "{text}");
        }
        assert!(Tokenizer::load(folder.path()).is_err());
        assert!(Tokenizer::load(Path::new("/does/not/exist")).is_err());
    }

    #[test]
    fn pieces_are_the_whole_text() {
        for size in 1..TEXT.len() {
            assert_eq!(pieces(TEXT, size).collect::<String>(), TEXT);
        }
        assert!(pieces(TEXT, 5).count() > 2);
    }
}
