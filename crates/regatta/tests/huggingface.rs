//! GPT-2 from and to `transformers`: what PyTorch computes and what we compute must agree. Python is the one that
//! REGATTA_PYTHON names, or python3; where it lacks torch or transformers, those tests say so and pass.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use regatta::checkpoint::huggingface::{export, import};
use regatta::checkpoint::{
    Checkpoint, Location, Part, ShardWriter, State, Which, commit, fresh_folder, verify,
};
use regatta::config::{Config, ModelConfig};
use regatta::data::tokenizer::Tokenizer;
use regatta::layers::ParamBuilder;
use regatta::models::{ActivationFunction, Gpt, GptConfig};
use regatta::plan::{Batch, Mesh, Piece, Plan};
use safetensors::{Dtype, tensor::TensorView};
use std::fs;
use std::path::Path;
use std::process::Command;

/// The numbers of a tensor.
fn to_vec<const D: usize>(tensor: Tensor<D>) -> Option<Vec<f32>> {
    let tensor = if tensor.is_autodiff() { tensor.inner() } else { tensor };
    tensor.try_into_vec_as::<f32>().ok()
}

const VOCAB: usize = 31;
const IDS: [i64; 12] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 30];

/// Makes a small random model in OUT, or loads the one in OUT; prints the logits of the ids.
const SCRIPT: &str = r#"
import sys, json, torch
from transformers import GPT2Config, GPT2Model, GPT2LMHeadModel
what, out, ids, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
if what == "make":
    torch.manual_seed(7)
    dtype = getattr(torch, options.pop("dtype", "float32"))
    base = options.pop("base", False)
    shard = options.pop("max_shard_size", "5GB")
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=3, n_embd=24, n_positions=16, **options)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            # Weights, biases and norms that all matter.
            p.add_(torch.randn_like(p) * 0.1)
    (model.transformer if base else model).save_pretrained(out, max_shard_size=shard)
    model = model.float()
else:
    model, info = GPT2LMHeadModel.from_pretrained(out, output_loading_info=True)
    bad = {k: list(map(str, v)) for k, v in info.items() if v}
    assert not bad, bad
model.eval()
with torch.no_grad():
    print(json.dumps(model(torch.tensor([ids])).logits.flatten().tolist()))
"#;

fn python() -> String {
    std::env::var("REGATTA_PYTHON").unwrap_or_else(|_| "python3".into())
}

fn have_python() -> bool {
    let found = Command::new(python()).args(["-c", "import torch, transformers"]).output();
    let found = found.is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("skipped: {} has no torch and transformers; name another with REGATTA_PYTHON", python());
    }
    found
}

fn torch(what: &str, folder: &Path, options: &str) -> Vec<f32> {
    let ids = serde_json::to_string(&IDS).unwrap();
    let output = Command::new(python())
        .args(["-c", SCRIPT, what, folder.to_str().unwrap(), &ids, options])
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

fn logits(model: &Gpt) -> Vec<f32> {
    let ids = Tensor::<2, Int>::from_data(TensorData::new(IDS.to_vec(), [1, IDS.len()]), &Device::flex());
    to_vec(model.clone().valid().logits(ids)).unwrap()
}

fn assert_close(ours: &[f32], theirs: &[f32]) {
    assert_eq!(ours.len(), theirs.len());
    let largest = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).max_by(f32::total_cmp).unwrap_or(0.0);
    let spread = theirs.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    assert!(largest < 1e-4 && spread > 0.03, "differ by {largest}, the largest is {spread}");
}

/// Collects a model's parameters by path.
#[derive(Default)]
struct Collect {
    path: Vec<String>,
    found: Vec<(String, Vec<usize>, Vec<f32>)>,
}

impl ModuleVisitor for Collect {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        self.found.push((self.path.join("."), tensor.dims().to_vec(), to_vec(tensor.inner()).unwrap()));
    }
}

/// Replaces a model's parameters by those of a checkpoint.
struct Restore<'a> {
    path: Vec<String>,
    checkpoint: &'a Checkpoint,
}

impl ModuleMapper for Restore<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, tensor, mapper) = param.consume();
        let piece = Piece::whole(&tensor.dims());
        let mut values = vec![f32::NAN; piece.len()];
        self.checkpoint.read(&self.path.join("."), &piece, &mut values).unwrap();
        let tensor = Tensor::<D>::from_data(TensorData::new(values, tensor.dims()), &tensor.device());
        Param::from_mapped_value(id, tensor.require_grad(), mapper)
    }
}

fn load(run: &Path) -> (Gpt, GptConfig) {
    let checkpoint = Checkpoint::find(&Location::of_run(run), Which::Last).unwrap();
    let config = checkpoint.state().config.model.get::<GptConfig>().unwrap().clone();
    let model = Gpt::new(&config, checkpoint.state().vocab, &ParamBuilder::new(99));
    (model.map(&mut Restore { path: vec![], checkpoint: &checkpoint }), config)
}

/// A checkpoint of a random model of ours.
fn save(run: &Path, gpt: &GptConfig) -> Gpt {
    let model = Gpt::new(gpt, VOCAB, &ParamBuilder::new(5));
    let mut collect = Collect::default();
    model.visit(&mut collect);
    let text = "[model]\nkind = \"gpt\"\n[data]\npath = \"x\"\n[train]\nbatch = 1";
    let mut config = Config::parse(text, "test", &[]).unwrap();
    config.model = ModelConfig::new(gpt.clone());
    let plan = Plan::new(Mesh::data(1), Batch::global(1, 1), 1 << 20).unwrap();
    let state = State::new(4, config, plan, VOCAB, Default::default(), None, None, None);
    let location = Location::of_run(run);
    let folder = fresh_folder(&location, 4).unwrap();
    let mut writer = ShardWriter::new(location.clone(), 0);
    let parts = collect.found.iter().map(|(name, shape, values)| Part {
        name: name.clone(),
        shape: shape.clone(),
        piece: Piece::whole(shape),
        values,
    });
    writer.begin(&folder, parts.collect()).unwrap();
    commit(&location, &folder, &state, vec![writer.wait().unwrap()], true).unwrap();
    model
}

fn gpt(bias: bool, tied: bool, activation: ActivationFunction) -> GptConfig {
    GptConfig {
        layers: 2,
        heads: 3,
        embed: 24,
        context: 16,
        dropout: 0.0,
        bias,
        tied,
        activation,
        ..GptConfig::default()
    }
}

#[test]
fn what_torch_made_computes_the_same_here() {
    if !have_python() {
        return;
    }
    for (options, tied, gelu, bound) in [
        ("", true, ActivationFunction::GeluTanh, 1),
        (
            ", \"activation_function\": \"gelu\", \"tie_word_embeddings\": false",
            false,
            ActivationFunction::Gelu,
            1,
        ),
        (", \"dtype\": \"bfloat16\"", true, ActivationFunction::GeluTanh, 1),
        (", \"dtype\": \"float16\", \"base\": true", true, ActivationFunction::GeluTanh, 1),
        (", \"max_shard_size\": \"10KB\"", true, ActivationFunction::GeluTanh, 2),
    ] {
        let place = tempfile::tempdir().unwrap();
        let (from, run) = (place.path().join("hf"), place.path().join("run"));
        let theirs = torch("make", &from, &format!("{{\"vocab_size\": {VOCAB}{options}}}"));
        let shards = fs::read_dir(&from).unwrap().flatten();
        let shards = shards.filter(|file| file.path().extension().is_some_and(|end| end == "safetensors"));
        assert!(shards.count() >= bound, "{options}");
        let imported = import(&from, &run).unwrap();
        assert!(!imported.tokenizer && imported.warnings.len() == 1, "{:?}", imported.warnings);
        assert_eq!(verify(run.to_str().unwrap()).unwrap().problems, [""; 0]);
        let (model, config) = load(&run);
        assert_eq!(config, GptConfig { dropout: 0.1, ..gpt(true, tied, gelu) });
        assert_close(&logits(&model), &theirs);
        // And out again; the other dtypes are f32 by now.
        if options.contains("dtype") || options.contains("shard") {
            continue;
        }
        let out = place.path().join("out");
        export(&Checkpoint::find(&Location::of_run(&run), Which::Last).unwrap(), None, &out).unwrap();
        assert_close(&torch("load", &out, "{}"), &theirs);
    }
}

#[test]
fn what_we_made_computes_the_same_in_torch() {
    if !have_python() {
        return;
    }
    for gpt in [gpt(true, true, ActivationFunction::GeluTanh), gpt(false, false, ActivationFunction::Gelu)] {
        let place = tempfile::tempdir().unwrap();
        let model = save(place.path(), &gpt);
        let out = place.path().join("hf");
        let checkpoint = Checkpoint::find(&Location::of_run(place.path()), Which::Best).unwrap();
        export(&checkpoint, None, &out).unwrap();
        assert_close(&logits(&model), &torch("load", &out, "{}"));
    }
}

#[test]
fn tokens_are_the_same_in_transformers() {
    if !have_python() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let text = "the cat sat on the mat, the cat sat. 12 12 über <|endoftext|>";
    let tokenizer = Tokenizer::train_bpe([text, text].into_iter(), 280).unwrap();
    let path = place.path().join("tokenizer.json");
    tokenizer.save(&path).unwrap();
    save(place.path(), &gpt(true, true, ActivationFunction::Gelu));
    let out = place.path().join("hf");
    let checkpoint = Checkpoint::find(&Location::of_run(place.path()), Which::Last).unwrap();
    assert!(export(&checkpoint, Some(&path), &out).unwrap().tokenizer);
    let script = "import sys, json; from transformers import AutoTokenizer; \
                  print(json.dumps(AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2])['input_ids']))";
    let output = Command::new(python()).args(["-c", script, out.to_str().unwrap(), text]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let ids: Vec<u32> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(ids, tokenizer.encode(text).unwrap());
}

/// Without Python: out and in again gives the same numbers.
#[test]
fn there_and_back() {
    for gpt in [gpt(true, true, ActivationFunction::GeluTanh), gpt(false, false, ActivationFunction::Gelu)] {
        let place = tempfile::tempdir().unwrap();
        let (run, out, back) = (place.path().join("run"), place.path().join("hf"), place.path().join("back"));
        let model = save(&run, &gpt);
        let tokenizer = run.join("tokenizer.json");
        Tokenizer::bytes().save(&tokenizer).unwrap();
        let checkpoint = Checkpoint::find(&Location::of_run(&run), Which::Last).unwrap();
        let exported = export(&checkpoint, Some(&tokenizer), &out).unwrap();
        assert!(!exported.tokenizer && exported.warnings[0].contains("bytes"));
        // Nothing is written over.
        let error = export(&checkpoint, None, &out).unwrap_err().to_string();
        assert!(error.contains("another folder"), "{error}");
        let imported = import(&out, &back).unwrap();
        assert_eq!(imported.model, GptConfig { bias: true, ..gpt.clone() });
        assert_close(&logits(&load(&back).0), &logits(&model));
        let error = import(&out, &back).unwrap_err().to_string();
        assert!(error.contains("another run"), "{error}");
    }
}

/// A small exported model, to spoil.
fn exported() -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    let run = place.path().join("run");
    save(&run, &gpt(true, true, ActivationFunction::GeluTanh));
    let checkpoint = Checkpoint::find(&Location::of_run(&run), Which::Last).unwrap();
    export(&checkpoint, None, &place.path().join("hf")).unwrap();
    place
}

#[test]
fn foreign_models_are_refused() {
    let place = exported();
    let (from, back) = (place.path().join("hf"), place.path().join("back"));
    let config = fs::read_to_string(from.join("config.json")).unwrap();
    for (was, becomes, wanted) in [
        ("\"gpt2\"", "\"llama\"", "model_type"),
        ("\"gelu_new\"", "\"mish\"", "activation_function"),
        ("\"n_head\": 3", "\"n_head\": 5", "n_embd"),
        ("\"n_head\": 3", "\"n_head\": 0", "n_head"),
        ("\"n_layer\": 2", "\"n_layer\": 99999999999", "n_layer"),
        ("\"n_layer\": 2", "\"n_layer\": 1", "h.1."),
        ("\"n_layer\": 2", "\"n_layer\": 3", "no tensor transformer.h.2."),
        ("\"n_layer\": 2", "\"n_layer\": -1", "config.json"),
        ("\"n_inner\": null", "\"n_inner\": 7", "n_inner"),
        ("\"vocab_size\": 31", "\"vocab_size\": 32", "transformer.wte.weight"),
        ("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false", "lm_head.weight"),
        ("\"scale_attn_weights\": true", "\"scale_attn_weights\": false", "scale_attn_weights"),
        ("0.00001", "0.000001", "layer_norm_epsilon"),
        ("{", "", "config.json"),
    ] {
        let changed = config.replace(was, becomes);
        assert_ne!(changed, config, "{was}");
        fs::write(from.join("config.json"), changed).unwrap();
        let error = import(&from, &back).unwrap_err().to_string();
        assert!(error.contains(wanted), "{wanted}: {error}");
        assert!(Checkpoint::find(&Location::of_run(&back), Which::Last).is_err());
    }
    fs::write(from.join("config.json"), &config).unwrap();
    let weights = fs::read(from.join("model.safetensors")).unwrap();
    for bytes in [&weights[..weights.len() - 1], &weights[..100], &weights[..3], b""] {
        fs::write(from.join("model.safetensors"), bytes).unwrap();
        let error = import(&from, &back).unwrap_err().to_string();
        assert!(error.contains("model.safetensors"), "{error}");
    }
    fs::remove_file(from.join("model.safetensors")).unwrap();
    assert!(import(&from, &back).unwrap_err().to_string().contains("save_pretrained"));
    fs::write(from.join("model.safetensors.index.json"), "{\"weight_map\": {\"a\": \"../x\"}}").unwrap();
    assert!(import(&from, &back).unwrap_err().to_string().contains("not a file in the same folder"));
}

#[test]
fn what_is_no_part_of_the_model_is_left_out() {
    let place = exported();
    let (from, back) = (place.path().join("hf"), place.path().join("back"));
    let path = from.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let zeros = [0; 16];
    let extra = |name: &str| (name.to_string(), TensorView::new(Dtype::F32, vec![2, 2], &zeros).unwrap());
    let mut views: Vec<_> =
        file.tensors().into_iter().map(|(name, view)| (name.replace("transformer.", ""), view)).collect();
    views.extend([
        extra("h.0.attn.bias"),
        extra("h.1.attn.masked_bias"),
        extra("lm_head.weight"),
        extra("score.weight"),
    ]);
    safetensors::serialize_to_file(views, None, &path).unwrap();
    let imported = import(&from, &back).unwrap();
    assert!(
        imported.warnings.iter().any(|warning| warning.contains("score.weight")),
        "{:?}",
        imported.warnings
    );
    assert!(!imported.warnings.iter().any(|warning| warning.contains("attn")), "{:?}", imported.warnings);
}
