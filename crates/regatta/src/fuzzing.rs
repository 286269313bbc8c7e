//! Targets of the fuzz tests in `fuzz/`: one function for each kind of foreign file that Regatta reads. Each takes
//! arbitrary bytes and panics if it finds a bug. The tests below call them, too, with random inputs.

use crate::checkpoint::Manifest;
use crate::checkpoint::huggingface::examine;
use crate::data::tokenizer::Tokenizer;
use crate::data::{cifar10, decode, mnist, tokens};
use crate::params::Placement;
use serde_json::{Map, Value, json};
use std::sync::LazyLock;

/// Bytes of a record of CIFAR-10: a label, and three channels of 32 x 32 pixels.
const CIFAR10_RECORD: usize = 3073;

/// A value that is likely to be invalid in the place of another.
fn invalid(choice: u8) -> Value {
    match choice % 20 {
        0 => Value::Null,
        1 => json!(0),
        2 => json!(1),
        3 => json!(-1),
        4 => json!(u64::MAX),
        5 => json!(1u64 << 62),
        6 => json!(1u64 << 32),
        7 => json!(1u64 << 24),
        8 => json!(0.5),
        9 => json!(1e308),
        10 => json!(""),
        11 => json!("nan"),
        12 => json!("../x"),
        13 => json!("\u{feff}\u{0}"),
        14 => json!([]),
        15 => json!({}),
        16 => json!(true),
        17 => json!([0, 18446744073709551615u64]),
        18 => json!({ "start": 3, "end": 1 }),
        _ => json!(u64::from(choice)),
    }
}

/// The paths of all values within `value`.
fn places(value: &Value) -> Vec<String> {
    fn walk(value: &Value, path: &str, found: &mut Vec<String>) {
        found.push(path.to_string());
        match value {
            Value::Array(items) => {
                items
                    .iter()
                    .enumerate()
                    .for_each(|(index, item)| walk(item, &format!("{path}/{index}"), found));
            }
            Value::Object(items) => items.iter().for_each(|(key, item)| {
                walk(item, &format!("{path}/{}", key.replace('~', "~0").replace('/', "~1")), found)
            }),
            _ => {}
        }
    }
    let mut found = vec![];
    walk(value, "", &mut found);
    found
}

/// `template` with changes that `bytes` determine. Three bytes are a change: two choose a value, and one chooses
/// whether it is removed, repeated or replaced. A value that an earlier change has removed stays removed.
fn changed(template: &Value, bytes: &[u8]) -> Value {
    let mut value = template.clone();
    let places = places(template);
    for change in bytes.chunks_exact(3) {
        let place = &places[usize::from(u16::from_le_bytes([change[0], change[1]])) % places.len()];
        let (parent, key) = place.rsplit_once('/').unwrap_or(("", ""));
        let key = key.replace("~1", "/").replace("~0", "~");
        match (change[2] >> 6, value.pointer_mut(parent)) {
            // Removes the value.
            (3, Some(Value::Object(items))) => drop(items.remove(&key)),
            // Repeats the first item.
            (2, Some(Value::Array(items))) if !items.is_empty() && items.len() < 64 => {
                items.push(items[0].clone())
            }
            _ => {
                if let Some(slot) = value.pointer_mut(place) {
                    *slot = invalid(change[2]);
                }
            }
        }
    }
    value
}

/// `bytes` as text, or `template` with the changes that they determine; the first byte chooses which.
fn text_from(template: &Value, bytes: &[u8]) -> String {
    match bytes.split_first() {
        Some((0, bytes)) => String::from_utf8_lossy(bytes).into_owned(),
        Some((_, bytes)) => changed(template, bytes).to_string(),
        None => String::new(),
    }
}

/// Parses a manifest with a right checksum.
pub fn manifest(bytes: &[u8]) {
    let mut envelope = json!({ "format": "regatta checkpoint", "version": 2, "checksum": 0 });
    if let Some((1, changes)) = bytes.split_first() {
        envelope = changed(&envelope, &changes[..changes.len().min(3)]);
    }
    let text = text_from(&A_MANIFEST, bytes);
    let checksum = crc32fast::hash(text.as_bytes());
    let envelope = envelope.to_string().replacen(":0", &format!(":{checksum}"), 1);
    let whole = format!("{},\"manifest\":{text}}}", envelope.trim_end_matches('}'));
    let Ok(manifest) = Manifest::parse(whole.as_bytes()) else { return };
    // The calls that a reader makes before it reads tensors.
    let state = &manifest.state;
    let _ = state.config.model.describe(state.vocab, Placement::whole());
    state.config.model.costs(state.vocab);
    let _ = (state.plan.global_batch(), state.plan.to_string());
    let elements: usize =
        manifest.tensors.values().flatten().fold(1, |all, &dim| all.saturating_mul(dim.max(1)));
    if elements < 1 << 16 {
        manifest.uncovered();
    }
}

/// Parses a configuration and the changes of `--set`; each change follows a byte 255.
pub fn configuration(bytes: &[u8]) {
    let mut parts = bytes.split(|&byte| byte == 255);
    let template = &A_MANIFEST["state"]["config"];
    let first = parts.next().unwrap_or(&[]);
    let text = match first.first() {
        Some(1..) => toml::to_string(&changed(template, &first[1..])).unwrap_or_default(),
        _ => String::from_utf8_lossy(first).into_owned(),
    };
    let sets: Vec<String> = parts.map(|set| String::from_utf8_lossy(set).into_owned()).collect();
    let Ok(config) = crate::config::Config::parse(&text, "fuzzing", &sets) else { return };
    let again = toml::to_string(&config).expect("TOML");
    assert_eq!(crate::config::Config::parse(&again, "fuzzing", &[]).expect("the same configuration"), config);
}

static A_MANIFEST: LazyLock<Value> = LazyLock::new(a_manifest);

fn a_manifest() -> Value {
    let text = "[model]\nkind = \"gpt\"\nlayers = 1\nheads = 2\nembed = 4\nblock = 4\n[data]\npath = \"x\"\n\
                [train]\nbatch = 4\n";
    let config = crate::config::Config::parse(text, "fuzzing", &[]).expect("a configuration");
    let plan = config.plan(2).expect("a plan");
    let params = config.model.describe(5, Placement::whole()).expect("a model");
    let state = crate::checkpoint::State::new(3, config, plan, 5, Default::default(), Some(0.25), None, None);
    let shapes = params.iter().map(|param| (param.spec.path.clone(), json!(param.spec.shape)));
    let tensors: Map<String, Value> = shapes.collect();
    let mut offset = 64;
    let mut parts = vec![];
    for param in &params {
        let piece = regatta_plan::Piece::whole(&param.spec.shape);
        parts.push(json!({ "name": param.spec.path, "piece": piece, "checksum": 7, "offset": offset }));
        offset += 4 * piece.len();
    }
    let file = json!({ "file": "rank-00000.safetensors", "bytes": offset, "header": 9, "parts": parts });
    json!({ "state": state, "tensors": tensors, "files": [file] })
}

/// Reads Hugging Face's `config.json` and the header of `model.safetensors`: changes of the first up to a byte 255,
/// then of the second.
pub fn huggingface(bytes: &[u8]) {
    let cut = bytes.iter().position(|&byte| byte == 255).unwrap_or(bytes.len());
    let (first, second) = (&bytes[..cut], bytes.get(cut + 1..).unwrap_or(&[]));
    let config = text_from(&a_gpt2(), first);
    if let Some((0, raw)) = second.split_first() {
        let _ = examine(&config, raw);
        return;
    }
    let mut end = 0;
    let mut header = Map::new();
    let mut add = |name: &str, shape: &[usize]| {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        header.insert(name.into(), json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] }));
    };
    for (name, shape) in [
        ("transformer.wte.weight", &[5, 4][..]),
        ("transformer.wpe.weight", &[4, 4]),
        ("transformer.ln_f.weight", &[4]),
        ("transformer.ln_f.bias", &[4]),
        ("transformer.h.0.ln_1.weight", &[4]),
        ("transformer.h.0.ln_1.bias", &[4]),
        ("transformer.h.0.ln_2.weight", &[4]),
        ("transformer.h.0.ln_2.bias", &[4]),
        ("transformer.h.0.attn.c_attn.weight", &[4, 12]),
        ("transformer.h.0.attn.c_attn.bias", &[12]),
        ("transformer.h.0.attn.c_proj.weight", &[4, 4]),
        ("transformer.h.0.attn.c_proj.bias", &[4]),
        ("transformer.h.0.mlp.c_fc.weight", &[4, 16]),
        ("transformer.h.0.mlp.c_fc.bias", &[16]),
        ("transformer.h.0.mlp.c_proj.weight", &[16, 4]),
        ("transformer.h.0.mlp.c_proj.bias", &[4]),
    ] {
        add(name, shape);
    }
    let header = text_from(&Value::Object(header), second);
    let weights = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; end]].concat();
    let outcome = examine(&config, &weights);
    if first == [1] && second == [1] {
        outcome.expect("the unchanged model is valid");
    }
}

fn a_gpt2() -> Value {
    json!({
        "model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 4, "n_positions": 4, "n_inner": null,
        "vocab_size": 5, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1,
        "tie_word_embeddings": true, "architectures": ["GPT2LMHeadModel"], "scale_attn_weights": true,
    })
}

/// Reads files of a tokenizer: `tokenizer.json`, or a vocabulary and its merges.
pub fn tokenizer(bytes: &[u8]) {
    let vocab: Map<String, Value> = ["a", "b", "Ġ", "ab", "<|endoftext|>"]
        .iter()
        .zip(0u64..)
        .map(|(token, id)| (token.to_string(), id.into()))
        .collect();
    let level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let template = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": level,
        "added_tokens": [{ "id": 4, "content": "<|endoftext|>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true }],
        "post_processor": null, "decoder": level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [["a", "b"]] },
    });
    let read = match bytes.split_first() {
        Some((2, bytes)) => {
            let cut = bytes.iter().position(|&byte| byte == 255).unwrap_or(bytes.len());
            let merges = String::from_utf8_lossy(bytes.get(cut + 1..).unwrap_or(&[])).into_owned();
            Tokenizer::of_gpt2(&changed(&template["model"]["vocab"], &bytes[..cut]).to_string(), &merges)
        }
        Some((3, bytes)) => {
            Tokenizer::parse(&changed(&json!({ "regatta": "chars", "chars": "ab" }), bytes).to_string())
        }
        _ => Tokenizer::parse(&text_from(&template, bytes)),
    };
    let Ok(tokenizer) = read else { return };
    let most = tokenizer.vocab_size();
    for text in ["", "ab ba", "a<|endoftext|>b", "aé\n\n世"] {
        let Ok(ids) = tokenizer.encode(text) else { continue };
        assert!(ids.iter().all(|&id| (id as usize) < most), "{ids:?} of {most}");
        let _ = tokenizer.decode(&ids);
    }
    assert!(tokenizer.end_of_text().is_none_or(|id| tokenizer.has(id)));
    let _ = tokenizer.fits(usize::MAX);
    // A tokenizer that was read can be saved and read again.
    let again = Tokenizer::parse(&tokenizer.to_json().expect("JSON")).expect("the same tokenizer");
    assert_eq!(again.vocab_size(), most);
}

/// Reads images, text of any encoding, or the header of a token file; the first byte chooses which.
pub fn images(bytes: &[u8]) {
    let Some((&which, bytes)) = bytes.split_first() else { return };
    match which % 5 {
        0 => drop(mnist::parse_idx(bytes, &[mnist::SIDE, mnist::SIDE])),
        1 => {
            if let Ok(items) = mnist::parse_idx(bytes, &[]) {
                assert_eq!(items, bytes[8..]);
            }
        }
        2 => {
            // A record is longer than the inputs, so they are repeated.
            let records: Vec<u8> = bytes.iter().copied().cycle().take(bytes.len() * CIFAR10_RECORD).collect();
            let _ = (cifar10::check_records(&records), cifar10::check_records(bytes));
        }
        3 => drop(decode::text(bytes.to_vec())),
        _ => drop(tokens::parse_header(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes that determine changes, or arbitrary bytes.
    fn input() -> impl Strategy<Value = Vec<u8>> {
        let changes = prop::collection::vec(any::<[u8; 3]>(), 0..6);
        let changes = (1u8..4, changes).prop_map(|(first, rest)| [vec![first], rest.concat()].concat());
        prop_oneof![6 => changes, 1 => prop::collection::vec(any::<u8>(), 0..120)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn foreign_manifests(bytes in input()) {
            manifest(&bytes);
        }

        #[test]
        fn foreign_configurations(bytes in input(), set in "[a-z]{0,6}[.][a-z_]{0,9}=[0-9a-z.\"-]{0,9}") {
            configuration(&[&bytes, &[255][..], set.as_bytes()].concat());
        }

        #[test]
        fn foreign_models(config in input(), weights in input()) {
            huggingface(&[config, vec![255], weights].concat());
        }

        #[test]
        fn foreign_tokenizers(bytes in input()) {
            tokenizer(&bytes);
        }

        #[test]
        fn foreign_images(bytes in input()) {
            images(&bytes);
        }
    }

    #[test]
    fn unchanged_templates_are_read() {
        let text = A_MANIFEST.to_string();
        let checksum = crc32fast::hash(text.as_bytes());
        let whole = format!(
            "{{\"format\":\"regatta checkpoint\",\"version\":2,\"checksum\":{checksum},\"manifest\":{text}}}"
        );
        let read = Manifest::parse(whole.as_bytes()).unwrap();
        assert!(read.uncovered().is_empty());
        huggingface(&[1, 255, 1]);
    }
}
