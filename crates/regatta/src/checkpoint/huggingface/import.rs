//! Converts a folder of `transformers` to a run with a checkpoint of step 0.

use super::Gpt2Config;
use super::names::{Named, tensors};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::{Location, Part, ShardWriter, State, Which, commit, fresh_folder};
use crate::config::{
    CompressConfig, Config, DataConfig, LocalConfig, ModelConfig, OptimizerConfig, ParallelConfig,
    SampleConfig, SyncConfig, TokenizerKind, TrainConfig,
};
use crate::data::decode;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::models::GptConfig;
use half::{bf16, f16};
use memmap2::Mmap;
use regatta_plan::{Batch, Mesh, Piece, Plan};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Values in a file of the checkpoint, and so in memory at once; one tensor may exceed it.
const FILE_VALUES: usize = 256 << 20;

/// What [`import`] created.
#[derive(Debug, Clone, PartialEq)]
pub struct Imported {
    /// The model's shape.
    pub model: GptConfig,
    /// Number of the model's parameters.
    pub parameters: usize,
    /// Whether the run has the model's tokenizer.
    pub tokenizer: bool,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

/// Creates the run folder `run` from a GPT-2 that `transformers` saved in `from` (`config.json`, `model.safetensors`
/// or its shards; F32, F16 or BF16). The run has a complete checkpoint of step 0 without optimizer state, and
/// `tokenizer.json` if `from` has tokenizer files.
///
/// # Errors
/// A file is missing or damaged, Regatta's GPT does not support a setting, a tensor is missing or has another shape,
/// or the run already has checkpoints.
pub fn import(from: &Path, run: &Path) -> Result<Imported> {
    let location = Location::of_run(run);
    if let Ok(found) = Checkpoint::find(&location, Which::Last) {
        let problem = "already exists and is not overwritten; use another run folder";
        return Err(Error::checkpoint(found.path(), problem));
    }
    let (theirs, gpt) = read_config(&from.join("config.json"))?;
    let mut warnings = vec![];
    if [theirs.attn_pdrop, theirs.embd_pdrop].iter().any(|&rate| rate != theirs.resid_pdrop) {
        warnings.push(format!(
            "attn_pdrop {}, embd_pdrop {} and resid_pdrop {} differ: dropout is {} everywhere",
            theirs.attn_pdrop, theirs.embd_pdrop, theirs.resid_pdrop, theirs.resid_pdrop
        ));
    }
    let files =
        weight_files(from)?.into_iter().map(|path| Weights::open(&path)).collect::<Result<Vec<_>>>()?;
    let read =
        files.iter().map(|file| Ok((file.path.as_path(), file.tensors()?))).collect::<Result<Vec<_>>>()?;
    let (tensors, found) = matched(&theirs, &gpt, &read, from, &mut warnings)?;
    let tokenizer = import_tokenizer(from, run, theirs.vocab_size, &mut warnings)?;
    let state = state(&gpt, theirs.vocab_size, tokenizer.as_deref())?;
    let folder = fresh_folder(&location, 0)?;
    let mut entries = vec![];
    for group in groups(&tensors) {
        let values: Vec<Vec<f32>> = group
            .iter()
            .map(|tensor| {
                found.get(short(&tensor.theirs)).map(|found| to_f32(found.view.dtype(), found.view.data()))
            })
            .map(Option::unwrap_or_default)
            .collect();
        for (tensor, values) in group.iter().zip(&values) {
            if let Some(first) = values.iter().position(|value| !value.is_finite()) {
                let count = values.iter().filter(|value| !value.is_finite()).count();
                warnings.push(format!(
                    "{} has {count} of {} values that are not finite, the first at {first} ({}): the model's output \
                     will be useless",
                    tensor.theirs,
                    values.len(),
                    values[first]
                ));
            }
        }
        let parts = group.iter().zip(&values).map(|(tensor, values)| Part {
            name: tensor.ours.clone(),
            shape: tensor.shape.clone(),
            piece: Piece::whole(&tensor.shape),
            values,
        });
        let mut writer = ShardWriter::new(location.clone(), entries.len());
        writer.begin(&folder, parts.collect())?;
        entries.push(writer.wait()?);
    }
    commit(&location, &folder, &state, entries, false)?;
    let parameters = tensors.iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
    Ok(Imported { model: gpt, parameters, tokenizer: tokenizer.is_some(), warnings })
}

/// A tensor in a file of `transformers`.
struct Found<'a> {
    /// Its name in the file.
    name: String,
    path: &'a Path,
    view: TensorView<'a>,
}

/// Returns our tensors, and those of the files by short name. Checks that the files have each of ours in the right
/// shape, and no further tensor of a layer.
fn matched<'a>(
    theirs: &Gpt2Config,
    gpt: &GptConfig,
    files: &'a [(&'a Path, SafeTensors<'a>)],
    from: &Path,
    warnings: &mut Vec<String>,
) -> Result<(Vec<Named>, HashMap<String, Found<'a>>)> {
    let mut found: HashMap<String, Found> = HashMap::new();
    let mut wrapped = 0;
    for (path, tensors) in files {
        for (name, view) in tensors.tensors() {
            let plain = unwrapped(&name);
            wrapped += usize::from(plain != name);
            let key = short(&plain).to_string();
            if let Some(other) = found.insert(key, Found { name: name.clone(), path, view }) {
                let problem = format!("has both {} and {name}, which are the same tensor", other.name);
                return Err(Error::checkpoint(path, problem));
            }
        }
    }
    if wrapped > 0 {
        warnings.push(format!(
            "the names of {wrapped} tensors have parts that torch.compile or DistributedDataParallel added \
             (_orig_mod, module): these parts are ignored"
        ));
    }
    // Each layer has twelve tensors; a wrong number of layers must not cost memory for their descriptions.
    if gpt.layers > found.len() {
        let problem =
            format!("has {} tensors, too few for the {} layers of its config.json", found.len(), gpt.layers);
        return Err(Error::checkpoint(from, problem));
    }
    let tensors = tensors(gpt, theirs.vocab_size);
    warnings.extend(unused_tensors(&tensors, found.keys(), from)?);
    for tensor in &tensors {
        let Some(Found { path, view, .. }) = found.get(short(&tensor.theirs)) else {
            return Err(Error::checkpoint(
                from,
                format!("has no tensor {}, which its config.json requires", tensor.theirs),
            ));
        };
        let known = matches!(view.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16);
        if !known || view.shape() != tensor.shape {
            let problem = format!(
                "has {} as {:?} {:?}, but config.json requires F32, F16 or BF16 {:?}",
                tensor.theirs,
                view.dtype(),
                view.shape(),
                tensor.shape
            );
            return Err(Error::checkpoint(path, problem));
        }
    }
    if let (true, Some(head), Some(tokens)) = (gpt.tied, found.get("lm_head.weight"), found.get("wte.weight"))
        && (head.view.dtype() != tokens.view.dtype() || head.view.data() != tokens.view.data())
    {
        warnings.push(format!(
            "{} has an lm_head.weight that differs from wte.weight, but its config.json ties them: it is ignored, as \
             transformers does; to keep it, write \"tie_word_embeddings\": false into config.json",
            head.path.display()
        ));
    }
    Ok((tensors, found))
}

/// A tensor's name without the parts that PyTorch's module wrappers add.
fn unwrapped(name: &str) -> String {
    let parts = name.split('.').filter(|part| !["_orig_mod", "module"].contains(part));
    parts.collect::<Vec<_>>().join(".")
}

/// A tensor's name as in a model that was saved without a head.
fn short(name: &str) -> &str {
    name.strip_prefix("transformer.").unwrap_or(name)
}

fn read_config(path: &Path) -> Result<(Gpt2Config, GptConfig)> {
    let text = fs::read_to_string(path).map_err(Error::io("read the model's settings", path))?;
    parse_config(&text).map_err(|problem| Error::checkpoint(path, problem))
}

fn parse_config(text: &str) -> Result<(Gpt2Config, GptConfig), String> {
    let theirs: Gpt2Config = serde_json::from_str(decode::json(text))
        .map_err(|error| format!("is not a config.json of transformers: {error}"))?;
    let gpt = theirs.gpt()?;
    Ok((theirs, gpt))
}

/// Checks the settings and the tensors of a model, without its values.
#[cfg(any(test, fuzzing))]
pub(crate) fn examine(config: &str, weights: &[u8]) -> Result<()> {
    let path = Path::new("model");
    let (theirs, gpt) = parse_config(config).map_err(|problem| Error::checkpoint(path, problem))?;
    let read =
        SafeTensors::deserialize(weights).map_err(|error| Error::checkpoint(path, error.to_string()))?;
    matched(&theirs, &gpt, &[(path, read)], path, &mut vec![]).map(drop)
}

/// The path of `model.safetensors`, or of the shards that its index names.
fn weight_files(from: &Path) -> Result<Vec<PathBuf>> {
    let (one, index) = (from.join("model.safetensors"), from.join("model.safetensors.index.json"));
    if one.exists() {
        return Ok(vec![one]);
    }
    if !index.exists() {
        let problem = "has no model.safetensors; save the model with transformers' save_pretrained";
        return Err(Error::checkpoint(from, problem));
    }
    let text = fs::read_to_string(&index).map_err(Error::io("read", &index))?;
    let wrong = |problem: String| Error::checkpoint(&index, problem);
    let value: serde_json::Value = serde_json::from_str(decode::json(&text))
        .map_err(|error| wrong(format!("is not an index of shards: {error}")))?;
    let names = value["weight_map"].as_object().into_iter().flat_map(|map| map.values());
    let names: BTreeSet<&str> = names.filter_map(|name| name.as_str()).collect();
    match names.iter().find(|name| name.contains(['/', '\\'])) {
        Some(name) => Err(wrong(format!("names {name:?}, which is not a file in the same folder"))),
        None if names.is_empty() => Err(wrong("names no shards".into())),
        None => Ok(names.into_iter().map(|name| from.join(name)).collect()),
    }
}

/// A mapped safetensors file.
struct Weights {
    path: PathBuf,
    map: Mmap,
}

impl Weights {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        // SAFETY: the map is read-only. If another program truncates the file meanwhile, a signal ends this process,
        // as with every map of a file.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("read", path))?;
        Ok(Self { path: path.into(), map })
    }

    fn tensors(&self) -> Result<SafeTensors<'_>> {
        SafeTensors::deserialize(&self.map).map_err(|error| {
            Error::checkpoint(
                &self.path,
                format!("is truncated or not a safetensors file ({error}); fetch it again"),
            )
        })
    }
}

/// A warning about tensors that our model does not have, if there are any.
///
/// # Errors
/// Such a tensor is part of a layer: the model would be another without it.
fn unused_tensors<'a>(
    tensors: &[Named],
    found: impl Iterator<Item = &'a String>,
    from: &Path,
) -> Result<Option<String>> {
    let mut ignored = vec![];
    for name in found {
        let known = |tensor: &Named| short(&tensor.theirs) == name;
        // Causal masks, and the copy of a tied embedding that some versions saved.
        let mask = name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias");
        if mask || name == "lm_head.weight" || tensors.iter().any(known) {
            continue;
        }
        if name.starts_with("h.") {
            let problem =
                format!("has a tensor {name}, which is not in the model that its config.json describes");
            return Err(Error::checkpoint(from, problem));
        }
        ignored.push(name.as_str());
    }
    ignored.sort_unstable();
    let warning =
        || format!("tensors that are not part of a language model are ignored: {}", ignored.join(", "));
    Ok((!ignored.is_empty()).then(warning))
}

fn to_f32(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    // The data may be unaligned.
    let halves = bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
    match dtype {
        Dtype::F16 => halves.map(|pair| f16::from_le_bytes(pair).to_f32()).collect(),
        Dtype::BF16 => halves.map(|pair| bf16::from_le_bytes(pair).to_f32()).collect(),
        _ => bytemuck::pod_collect_to_vec(bytes),
    }
}

/// Groups of tensors, each of which goes into one file.
fn groups(tensors: &[Named]) -> Vec<&[Named]> {
    let mut groups = vec![];
    let (mut start, mut values) = (0, 0);
    for (index, tensor) in tensors.iter().enumerate() {
        let len = tensor.shape.iter().product::<usize>();
        if index > start && values + len > FILE_VALUES {
            groups.push(&tensors[start..index]);
            (start, values) = (index, 0);
        }
        values += len;
    }
    groups.push(&tensors[start..]);
    groups
}

/// Saves the tokenizer in the run's folder, if `from` has one. Returns its path.
fn import_tokenizer(
    from: &Path,
    run: &Path,
    vocab: usize,
    warnings: &mut Vec<String>,
) -> Result<Option<PathBuf>> {
    let files = ["tokenizer.json", "vocab.json", "encoder.json"];
    if !files.iter().any(|name| from.join(name).exists()) {
        warnings.push("there are no tokenizer files: the run cannot generate text from prompts".into());
        return Ok(None);
    }
    let tokenizer = Tokenizer::load(from)?;
    match tokenizer.fits(vocab) {
        Err(problem) => warnings.push(format!("{problem}: generating text needs one that fits")),
        Ok(()) if tokenizer.vocab_size() < vocab => warnings.push(format!(
            "the model has {} tokens more than the tokenizer's {}: they are padding and are never generated",
            vocab - tokenizer.vocab_size(),
            tokenizer.vocab_size()
        )),
        Ok(()) => {}
    }
    fs::create_dir_all(run).map_err(Error::io("create", run))?;
    let path = run.join("tokenizer.json");
    tokenizer.save(&path)?;
    Ok(Some(path))
}

fn state(gpt: &GptConfig, vocab: usize, tokenizer: Option<&Path>) -> Result<State> {
    let mut data = DataConfig::default();
    if let Some(path) = tokenizer {
        (data.tokenizer, data.vocab_size) = (TokenizerKind::Bpe, vocab);
        data.tokenizer_path = Some(path.into());
    }
    let config = Config {
        model: ModelConfig::new(gpt.clone()),
        data,
        train: TrainConfig::default(),
        optimizer: OptimizerConfig::default(),
        parallel: ParallelConfig::default(),
        compress: CompressConfig::default(),
        local: LocalConfig::default(),
        sync: SyncConfig::default(),
        sample: SampleConfig::default(),
    };
    let plan = Plan::new(Mesh::data(1), Batch::global(1, 1), 25 << 20)
        .map_err(|error| Error::Usage(format!("no plan for one worker: {error}")))?;
    Ok(State::new(0, config, plan, vocab, Default::default(), None, None, None))
}
