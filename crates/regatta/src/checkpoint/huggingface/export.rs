//! Converts a checkpoint to a folder that `transformers` loads.

use super::Gpt2Config;
use super::names::{Named, tensors};
use crate::checkpoint::header::safetensors_header;
use crate::checkpoint::{Checkpoint, Location};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::files::write_atomically;
use crate::models::{GptConfig, NormKind};
use regatta_plan::Piece;
use std::fs;
use std::path::Path;

/// What [`export`] wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// Number of the model's parameters.
    pub parameters: usize,
    /// Whether the tokenizer was exported too.
    pub tokenizer: bool,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

/// Writes the GPT of `checkpoint` into the folder `out` as `model.safetensors` and `config.json`, with the names and
/// settings of `GPT2LMHeadModel`; biases that the model does not have are zeros. A `tokenizer` file with byte-pair
/// encoding is exported too. Tensors are written one by one, so only the largest one has to fit in memory.
///
/// # Errors
/// The checkpoint is damaged or of another kind of model, or `out` already holds a model or cannot be written.
pub fn export(checkpoint: &Checkpoint, tokenizer: Option<&Path>, out: &Path) -> Result<Exported> {
    let state = checkpoint.state();
    let Some(gpt) = state.config.model.get::<GptConfig>() else {
        let problem = "is not of a gpt: only gpt models can be exported for transformers";
        return Err(Error::checkpoint(checkpoint.path(), problem));
    };
    if gpt.norm == NormKind::Rms {
        return Err(Error::checkpoint(
            checkpoint.path(),
            "has RMS norms, which transformers' GPT-2 does not support",
        ));
    }
    if out.join("model.safetensors").exists() || out.join("config.json").exists() {
        return Err(Error::checkpoint(
            out,
            "already holds a model, which is not overwritten; use another folder",
        ));
    }
    let tensors = tensors(gpt, state.vocab);
    let exists = |tensor: &Named| gpt.bias || !tensor.bias;
    // All tensors are verified before anything is written.
    let wanted: Vec<_> = tensors
        .iter()
        .filter(|tensor| exists(tensor))
        .map(|tensor| (tensor.ours.as_str(), Piece::whole(&tensor.shape)))
        .collect();
    checkpoint.check(wanted.iter().map(|(name, piece)| (*name, piece)))?;
    fs::create_dir_all(out).map_err(Error::io("create", out))?;
    let mut exported = Exported { parameters: 0, tokenizer: false, warnings: vec![] };
    let end_of_text = match tokenizer {
        Some(path) => copy_tokenizer(path, out, gpt.context, state.vocab, &mut exported)?,
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
        if exists(tensor) {
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

/// Copies the tokenizer if `transformers` can read it. Returns the id of its end-of-text token, if it has one.
fn copy_tokenizer(
    path: &Path,
    out: &Path,
    context: usize,
    vocab: usize,
    exported: &mut Exported,
) -> Result<Option<u32>> {
    let tokenizer = Tokenizer::load(path)?;
    if tokenizer.kind() != "bpe" {
        let kind = tokenizer.kind();
        exported
            .warnings
            .push(format!("transformers does not support a tokenizer of kind {kind}: it is not exported"));
        return Ok(None);
    }
    let end = tokenizer.end_of_text().filter(|&id| (id as usize) < vocab);
    tokenizer.save(&out.join("tokenizer.json"))?;
    let mut settings = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
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
