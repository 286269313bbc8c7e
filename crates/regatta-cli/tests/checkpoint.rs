//! `regatta checkpoint`, as a person calls it.

use safetensors::{Dtype, tensor::TensorView};
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn regatta(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_regatta")).arg("checkpoint").args(arguments).output().unwrap()
}

fn succeed(arguments: &[&str]) -> String {
    let output = regatta(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn fail(arguments: &[&str]) -> String {
    let output = regatta(arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// A GPT-2 of one layer as transformers saves it, with a vocabulary of bytes and a few merges.
fn gpt2(folder: &Path) {
    let config = r#"{"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 4, "n_positions": 8, "vocab_size": 11,
        "resid_pdrop": 0.0, "eos_token_id": [1, 2]}"#;
    fs::write(folder.join("config.json"), config).unwrap();
    let vocab = r#"{"h":0,"e":1,"l":2,"o":3,"Ġ":4,"w":5,"he":6,"ll":7,"hell":8,"hello":9,"Ġw":10}"#;
    fs::write(folder.join("vocab.json"), vocab).unwrap();
    fs::write(folder.join("merges.txt"), "#version: 0.2\nh e\nl l\nhe ll\nhell o\nĠ w\n").unwrap();
    let bytes: Vec<u8> = (0..64u32).flat_map(|i| (i as f32 / 64.0).to_le_bytes()).collect();
    let shapes = [
        ("wte.weight", vec![11, 4]),
        ("wpe.weight", vec![8, 4]),
        ("h.0.ln_1.weight", vec![4]),
        ("h.0.ln_1.bias", vec![4]),
        ("h.0.attn.c_attn.weight", vec![4, 12]),
        ("h.0.attn.c_attn.bias", vec![12]),
        ("h.0.attn.c_proj.weight", vec![4, 4]),
        ("h.0.attn.c_proj.bias", vec![4]),
        ("h.0.ln_2.weight", vec![4]),
        ("h.0.ln_2.bias", vec![4]),
        ("h.0.mlp.c_fc.weight", vec![4, 16]),
        ("h.0.mlp.c_fc.bias", vec![16]),
        ("h.0.mlp.c_proj.weight", vec![16, 4]),
        ("h.0.mlp.c_proj.bias", vec![4]),
        ("ln_f.weight", vec![4]),
        ("ln_f.bias", vec![4]),
    ];
    let views = shapes.map(|(name, shape)| {
        let len = 4 * shape.iter().product::<usize>();
        (name, TensorView::new(Dtype::F32, shape, &bytes[..len]).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

#[test]
fn import_inspect_verify_export() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).display().to_string();
    fs::create_dir(path("hf")).unwrap();
    gpt2(&place.path().join("hf"));
    let said = succeed(&["import", &path("hf"), "--out", &path("run")]);
    assert!(said.contains("a gpt of 328 parameters with its tokenizer"), "{said}");
    assert!(fail(&["import", &path("hf"), "--out", &path("run")]).contains("another run folder"));

    let step = path("run/checkpoints/step-00000000");
    for target in [&path("run"), &step, &format!("file://{}", path("run/checkpoints"))] {
        let said = succeed(&["inspect", target]);
        for part in [
            "step        0",
            "activation gelu-tanh",
            "parameters  328",
            "layers.0.attention.qkv.weight [4, 12]",
        ] {
            assert!(said.contains(part), "{part:?} is not in {said}");
        }
        assert!(succeed(&["verify", target]).contains("1 checkpoint(s), 1 file(s)"));
    }

    let said = succeed(&["export", &path("run"), "--out", &path("back")]);
    assert!(said.contains("328 parameters of step 0 with its tokenizer"), "{said}");
    let there = fs::read(path("back/model.safetensors")).unwrap();
    let there = safetensors::SafeTensors::deserialize(&there).unwrap();
    let was = fs::read(path("hf/model.safetensors")).unwrap();
    let was = safetensors::SafeTensors::deserialize(&was).unwrap();
    assert_eq!(there.len(), was.len());
    for (name, tensor) in was.tensors() {
        assert_eq!(there.tensor(&format!("transformer.{name}")).unwrap(), tensor, "{name}");
    }
    assert!(fail(&["export", &path("run"), "--out", &path("back")]).contains("another folder"));

    let file = format!("{step}/rank-00000.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&file, bytes).unwrap();
    for target in [&path("run"), &step] {
        let said = fail(&["verify", target]);
        assert!(said.contains("rank-00000.safetensors") && said.contains("norm.beta"), "{said}");
    }
    let said = fail(&["export", &path("run"), "--out", &path("bad")]);
    assert!(said.contains("norm.beta") && !place.path().join("bad").exists(), "{said}");
}

#[test]
fn what_is_not_there() {
    for command in ["inspect", "verify"] {
        assert!(fail(&[command, "/does/not/exist"]).contains("there is no complete checkpoint"));
        assert!(fail(&[command, "ftp://x/y"]).contains("not supported as an object store"));
    }
    let place = tempfile::tempdir().unwrap();
    let path = place.path().display().to_string();
    assert!(fail(&["import", &path, "--out", &format!("{path}/run")]).contains("config.json"));
}
