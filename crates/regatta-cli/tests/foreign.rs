//! Models and checkpoints that others made: padded vocabularies, wrapped names, numbers that are not finite, manifests that
//! lie.

mod common;

use common::{Place, fail, said, succeed};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

/// A run of a small gpt over byte pairs, and what it looks like in transformers' format, in `hf`.
fn exported() -> Place {
    let place = Place::new();
    let train = ["--set", "data.tokenizer=bpe", "--set", "data.vocab_size=300"];
    succeed(&mut place.train("run", &train));
    succeed(&mut place.regatta(&["checkpoint", "export", "run", "--out", "hf"]));
    place
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Changes the tensors in a safetensors file.
fn rewrite(path: &Path, change: impl FnOnce(&mut Tensors)) {
    let bytes = fs::read(path).unwrap();
    let read = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Tensors = read
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let values = view.data().chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap()));
            (name, (view.shape().to_vec(), values.collect()))
        })
        .collect();
    change(&mut tensors);
    let bytes: BTreeMap<&String, Vec<u8>> = tensors
        .iter()
        .map(|(name, (_, values))| (name, values.iter().flat_map(|value| value.to_le_bytes()).collect()))
        .collect();
    let views = tensors.iter().map(|(name, (shape, _))| {
        (name.clone(), TensorView::new(Dtype::F32, shape.clone(), &bytes[name]).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn generated(place: &Place, run: &str) -> String {
    let output = succeed(&mut place.regatta(&[
        "generate",
        run,
        "--prompt",
        "line 1",
        "--temperature",
        "0",
        "--tokens",
        "40",
    ]));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_padded_vocabulary_is_imported_generated_from_and_trained() {
    let place = exported();
    succeed(&mut place.regatta(&["checkpoint", "import", "hf", "--out", "plain"]));
    let expected = generated(&place, "plain");
    // Rows beyond the tokenizer's, which would win every time.
    rewrite(&place.path("hf/model.safetensors"), |tensors| {
        let (shape, values) = tensors.get_mut("transformer.wte.weight").unwrap();
        let width = shape[1];
        let rows: Vec<f32> = values.chunks_exact(width).flatten().map(|value| 30.0 * value).collect();
        values.extend(&rows[..20 * width]);
        shape[0] += 20;
    });
    let config = fs::read_to_string(place.path("hf/config.json")).unwrap();
    let padded = config.replace("\"vocab_size\": 300", "\"vocab_size\": 320");
    assert_ne!(config, padded);
    fs::write(place.path("hf/config.json"), padded).unwrap();
    let told = said(&succeed(&mut place.regatta(&["checkpoint", "import", "hf", "--out", "padded"])));
    assert!(told.contains("20 tokens more than the tokenizer's 300: they are padding"), "{told}");
    assert_eq!(generated(&place, "padded"), expected);
    let own = ["data.tokenizer=bpe", "data.tokenizer_path=padded/tokenizer.json", "model.bias=true"];
    let mut more = vec!["--resume"];
    own.iter().for_each(|set| more.extend(["--set", set]));
    succeed(&mut place.train("padded", &[&more[..], &["--steps", "4"]].concat()));
    let summary = place.summary("padded");
    assert_eq!(summary["steps"], 4);
    let manifest = fs::read_to_string(place.path("padded/checkpoints/step-00000004/manifest.json"));
    assert!(manifest.is_ok_and(|text| text.contains("\"vocab\":320")));
    generated(&place, "padded");
    // Two workers take it too, and a vocabulary of another model is still refused.
    let two = [&more[..], &["--steps", "6", "--workers", "2"]].concat();
    succeed(&mut place.train("padded", &two));
    fs::write(place.path("padded/tokenizer.json"), "{\"regatta\":\"bytes\"}").unwrap();
    let problem = fail(&mut place.regatta(&["generate", "padded"]));
    assert!(problem.contains("320 tokens, but the tokenizer has 256"), "{problem}");
}

#[test]
fn names_that_wrappers_put_there_are_taken_without() {
    let place = exported();
    succeed(&mut place.regatta(&["checkpoint", "import", "hf", "--out", "plain"]));
    let expected = generated(&place, "plain");
    let plain = fs::read(place.path("hf/model.safetensors")).unwrap();
    for (run, wrap) in [
        ("compiled", (|name: &str| format!("_orig_mod.{name}")) as fn(&str) -> String),
        ("both", |name| format!("module._orig_mod.{name}")),
        ("blocks", |name| name.replace(".attn.", "._orig_mod.attn.")),
    ] {
        fs::write(place.path("hf/model.safetensors"), &plain).unwrap();
        rewrite(&place.path("hf/model.safetensors"), |tensors| {
            *tensors =
                std::mem::take(tensors).into_iter().map(|(name, values)| (wrap(&name), values)).collect();
        });
        let told = said(&succeed(&mut place.regatta(&["checkpoint", "import", "hf", "--out", run])));
        assert!(told.contains("_orig_mod"), "{told}");
        assert_eq!(generated(&place, run), expected, "{run}");
    }
    // The same tensor under two names.
    fs::write(place.path("hf/model.safetensors"), &plain).unwrap();
    rewrite(&place.path("hf/model.safetensors"), |tensors| {
        let bias = tensors["transformer.ln_f.bias"].clone();
        tensors.insert("module.transformer.ln_f.bias".into(), bias);
    });
    let problem = fail(&mut place.regatta(&["checkpoint", "import", "hf", "--out", "twice"]));
    assert!(
        problem.contains("the same tensor") && problem.contains("module.transformer.ln_f.bias"),
        "{problem}"
    );
}

#[test]
fn numbers_that_are_not_finite_are_told_with_their_tensor() {
    let place = exported();
    rewrite(&place.path("hf/model.safetensors"), |tensors| {
        let values = &mut tensors.get_mut("transformer.h.1.mlp.c_fc.weight").unwrap().1;
        (values[7], values[9]) = (f32::NAN, f32::INFINITY);
    });
    let told = said(&succeed(&mut place.regatta(&["checkpoint", "import", "hf", "--out", "nan"])));
    assert!(
        told.contains("warning: transformer.h.1.mlp.c_fc.weight has 2 of") && told.contains("first at 7"),
        "{told}"
    );
}

#[test]
fn a_head_that_is_not_the_embedding_is_not_dropped_in_silence() {
    let place = exported();
    rewrite(&place.path("hf/model.safetensors"), |tensors| {
        let mut head = tensors["transformer.wte.weight"].clone();
        tensors.insert("lm_head.weight".into(), head.clone());
        head.1[0] += 1.0;
        tensors.insert("lm_head.weight".into(), head);
    });
    let said = said(&succeed(&mut place.regatta(&["checkpoint", "import", "hf", "--out", "tied"])));
    assert!(said.contains("it is ignored") && said.contains("tie_word_embeddings"), "{said}");
}

/// CRC-32 as in zip files.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

/// Changes a manifest and gives it a right checksum.
fn forge(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut envelope: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let mut manifest = envelope["manifest"].take();
    change(&mut manifest);
    let text = manifest.to_string();
    let (format, version) = (&envelope["format"], &envelope["version"]);
    let checksum = crc32(text.as_bytes());
    let forged =
        format!("{{\"format\":{format},\"version\":{version},\"checksum\":{checksum},\"manifest\":{text}}}");
    fs::write(path, forged).unwrap();
}

#[test]
fn a_manifest_that_lies_is_refused() {
    let place = Place::new();
    succeed(&mut place.train("run", &[]));
    let path = place.path("run/checkpoints/step-00000012/manifest.json");
    let whole = fs::read(&path).unwrap();
    forge(&path, |_| {});
    succeed(&mut place.regatta(&["generate", "run", "--tokens", "3"]));
    let huge = Value::from(1u64 << 62);
    let model = |key: &str, value: Value| {
        let (key, pointer) = (key.to_string(), format!("/state/config/model/{key}"));
        let change: Box<dyn Fn(&mut Value)> = Box::new(move |manifest| {
            *manifest.pointer_mut(&pointer).unwrap() = value.clone();
        });
        (key, change)
    };
    let mut lies = vec![];
    for key in ["layers", "heads", "embed", "context"] {
        for value in [Value::from(0), huge.clone(), Value::from(u64::MAX), Value::from(1 << 23)] {
            lies.push(model(key, value));
        }
    }
    lies.push(model("dropout", Value::from(7.0)));
    let mut lie = |name: &str, change: Box<dyn Fn(&mut Value)>| lies.push((name.into(), change));
    lie("vocab", Box::new(|manifest| manifest["state"]["vocab"] = Value::from(1u64 << 40)));
    lie(
        "bytes of a file that is not so long",
        Box::new(|manifest| manifest["files"][0]["bytes"] = Value::from(1u64 << 50)),
    );
    lie(
        "a tensor without parts",
        Box::new(|manifest| manifest["tensors"]["tokens"] = serde_json::json!([1u64 << 40, 32])),
    );
    for (key, value) in
        [("batch_per_worker", u64::MAX), ("batch_per_worker", 0), ("accumulate", 0), ("chunks", 1 << 62)]
    {
        let change = move |manifest: &mut Value| manifest["state"]["plan"][key] = Value::from(value);
        lie(&format!("{key} of the plan"), Box::new(change));
    }
    for (name, change) in lies {
        fs::write(&path, &whole).unwrap();
        forge(&path, |manifest| change(manifest));
        // Whether the files are whole is another question, and who goes on has a configuration of his own; but all of
        // it must come to an end.
        let copied = Command::new("cp").args(["-r", "run", "copy"]).current_dir(place.path("")).status();
        assert!(copied.unwrap().success());
        for mut command in [
            place.regatta(&["checkpoint", "verify", "run"]),
            place.regatta(&["checkpoint", "inspect", "run"]),
            place.train("copy", &["--resume", "--steps", "13", "--workers", "1"]),
        ] {
            let output = command.output().unwrap();
            assert!(matches!(output.status.code(), Some(0 | 1)), "{name} {command:?}: {}", said(&output));
        }
        fs::remove_dir_all(place.path("copy")).unwrap();
        for arguments in
            [&["generate", "run", "--tokens", "3"][..], &["checkpoint", "export", "run", "--out", "hf"]]
        {
            // A few hundred MiB are enough for all that is true.
            let plain = place.regatta(arguments);
            let mut limited = Command::new("bash");
            limited.args(["-c", "ulimit -v 4000000; exec timeout 120 \"$0\" \"$@\""]);
            limited.arg(plain.get_program()).args(plain.get_args()).current_dir(place.path(""));
            let problem = fail(&mut limited);
            assert!(problem.contains("run/checkpoints/step-00000012"), "{name} {arguments:?}: {problem}");
        }
    }
}
