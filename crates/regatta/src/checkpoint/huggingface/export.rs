//! From a checkpoint to a folder that `transformers` loads.

use super::Gpt2Config;
use super::names::{Named, tensors};
use crate::checkpoint::header::safetensors_header;
use crate::checkpoint::{Checkpoint, Location, write_atomically};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::models::NormKind;
use crate::train::ModelConfig;
use regatta_plan::Piece;
use std::fs;
use std::path::Path;

/// What [`export`] wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// Numbers of the model.
    pub parameters: usize,
    /// Whether the tokenizer went along.
    pub tokenizer: bool,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// Writes the GPT of `checkpoint` into the folder `out` as `model.safetensors` and `config.json`, with the names and
/// settings of `GPT2LMHeadModel`; biases that the model does not have are zeros. A `tokenizer` file with byte-pair
/// encoding goes along. Tensor by tensor, so that only the largest one has to fit in memory.
///
/// # Errors
/// A checkpoint that is damaged or of another kind of model, a folder that holds a model already or cannot be written.
pub fn export(checkpoint: &Checkpoint, tokenizer: Option<&Path>, out: &Path) -> Result<Exported> {
    let state = checkpoint.state();
    let ModelConfig::Gpt(gpt) = &state.config.model else {
        let problem = "holds no gpt: only language models can be exported for transformers";
        return Err(Error::checkpoint(checkpoint.path(), problem));
    };
    if gpt.norm == NormKind::Rms {
        return Err(Error::checkpoint(
            checkpoint.path(),
            "has RMS norms, of which transformers' GPT-2 has none",
        ));
    }
    if out.join("model.safetensors").exists() || out.join("config.json").exists() {
        return Err(Error::checkpoint(
            out,
            "holds a model already, which is not written over; use another folder",
        ));
    }
    let tensors = tensors(gpt, state.vocab);
    let there = |tensor: &Named| gpt.bias || !tensor.bias;
    // Everything is found right before anything is written.
    let wanted: Vec<_> = tensors
        .iter()
        .filter(|tensor| there(tensor))
        .map(|tensor| (tensor.ours.as_str(), Piece::whole(&tensor.shape)))
        .collect();
    checkpoint.check(wanted.iter().map(|(name, piece)| (*name, piece)))?;
    fs::create_dir_all(out).map_err(Error::io("create", out))?;
    let mut exported = Exported { parameters: 0, tokenizer: false, warnings: vec![] };
    let end_of_text = match tokenizer {
        Some(path) => copy_tokenizer(path, out, gpt.block, state.vocab, &mut exported)?,
        None => None,
    };
    let path = out.join("model.safetensors");
    let shapes = tensors.iter().map(|tensor| (tensor.theirs.clone(), tensor.shape.clone()));
    let header = safetensors_header(&[("format", "pt")], shapes)
        .map_err(|error| Error::checkpoint(&path, error.to_string()))?;
    exported.parameters = wanted.iter().map(|(_, piece)| piece.len()).sum();
    let all: usize = tensors.iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
    let failed = |error| Error::io("write", &path)(error);
    let mut sink =
        Location::folder(out).create("model.safetensors", (header.len() + 4 * all) as u64).map_err(failed)?;
    sink.write(&header).map_err(failed)?;
    for tensor in &tensors {
        let piece = Piece::whole(&tensor.shape);
        let mut values = vec![0f32; piece.len()];
        if there(tensor) {
            checkpoint.read(&tensor.ours, &piece, &mut values)?;
        }
        sink.write(bytemuck::cast_slice(&values)).map_err(failed)?;
    }
    sink.finish().map_err(failed)?;
    write_json(&out.join("config.json"), &Gpt2Config::of(gpt, state.vocab, end_of_text))?;
    Ok(exported)
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let json =
        serde_json::to_vec_pretty(value).map_err(|error| Error::checkpoint(path, error.to_string()))?;
    write_atomically(path, &json)
}

/// Copies a tokenizer that `transformers` can read; returns the id of its end of text, if it has one.
fn copy_tokenizer(
    path: &Path,
    out: &Path,
    block: usize,
    vocab: usize,
    exported: &mut Exported,
) -> Result<Option<u32>> {
    let tokenizer = Tokenizer::load(path)?;
    if tokenizer.kind() != "bpe" {
        let kind = tokenizer.kind();
        exported.warnings.push(format!("transformers has no tokenizer of kind {kind}: it is not exported"));
        return Ok(None);
    }
    let end = tokenizer.end_of_text().filter(|&id| (id as usize) < vocab);
    tokenizer.save(&out.join("tokenizer.json"))?;
    let mut settings = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block,
        "clean_up_tokenization_spaces": false,
    });
    if let Some(id) = end {
        let text = tokenizer.decode(&[id]);
        settings["eos_token"] = text.clone().into();
        settings["bos_token"] = text.into();
    }
    write_json(&out.join("tokenizer_config.json"), &settings)?;
    exported.tokenizer = true;
    Ok(end)
}
