//! Keys that have no effect. A key that the kind of model, data or optimizer does not read is an error; one that only
//! the plan does not read is a warning.

use super::schema::{
    CompressConfig, Config, DataConfig, DataKind, LocalConfig, OptimizerConfig, OptimizerKind,
    ParallelConfig, SampleConfig, SyncConfig, TokenizerKind, TrainConfig,
};
use super::sources::{Origin, Sources};
use crate::error::{Error, Result};
use regatta_plan::{Axis, CompressKind, Outer, Plan, ScheduleKind, SyncMode};
use serde::Serialize;
use std::collections::BTreeMap;
use toml::Value;

/// A key without effect.
pub(super) struct Unused {
    pub(super) key: String,
    /// The keys because of whose values it has no effect.
    decided_by: Vec<&'static str>,
    /// Why it has no effect, and how it would have one.
    pub(super) why: String,
}

fn unused(key: &str, decided_by: &[&'static str], why: impl Into<String>) -> Unused {
    Unused { key: key.into(), decided_by: decided_by.to_vec(), why: why.into() }
}

/// Refuses a key that was set to another value than its default and that nothing reads. If a flag has chosen another
/// kind than the file, the file's keys for its own kind are accepted.
pub(super) fn check(config: &Config, sources: &Sources, origin: &str) -> Result<()> {
    for Unused { key, decided_by, why } in without_effect(config) {
        let Some(by) = given(config, sources, &key) else { continue };
        let file = |by: &Origin| matches!(by, Origin::File(_));
        let chosen = decided_by.iter().any(|key| sources.of(key).is_some_and(|by| !file(by)));
        if file(by) && chosen {
            continue;
        }
        return Err(Error::Config { origin: origin.into(), key, problem: format!("has no effect: {why}") });
    }
    Ok(())
}

/// Who set `key` to another value than its default; none if it was not set, or by the program itself.
pub(super) fn given<'a>(config: &Config, sources: &'a Sources, key: &str) -> Option<&'a Origin> {
    let by = sources.of(key).filter(|by| **by != Origin::Program)?;
    (values(config).get(key) != defaults().get(key)).then_some(by)
}

/// The keys of all sections but the model's, with their values.
pub(super) fn values(config: &Config) -> BTreeMap<String, Value> {
    let Config { data, train, optimizer, parallel, compress, local, sync, sample, .. } = config;
    flat(data, train, optimizer, (parallel, compress, local, sync), sample)
}

/// The same keys with their defaults.
pub(super) fn defaults() -> BTreeMap<String, Value> {
    flat(
        &DataConfig::default(),
        &TrainConfig::default(),
        &OptimizerConfig::default(),
        (
            &ParallelConfig::default(),
            &CompressConfig::default(),
            &LocalConfig::default(),
            &SyncConfig::default(),
        ),
        &SampleConfig::default(),
    )
}

fn flat(
    data: &DataConfig,
    train: &TrainConfig,
    optimizer: &OptimizerConfig,
    (parallel, compress, local, sync): (&ParallelConfig, &CompressConfig, &LocalConfig, &SyncConfig),
    sample: &SampleConfig,
) -> BTreeMap<String, Value> {
    fn section(name: &str, section: &impl Serialize) -> Vec<(String, Value)> {
        let table = toml::Table::try_from(section).unwrap_or_default();
        table.into_iter().map(|(key, value)| (format!("{name}.{key}"), value)).collect()
    }
    let sections = [
        section("data", data),
        section("train", train),
        section("optimizer", optimizer),
        section("parallel", parallel),
        section("compress", compress),
        section("local", local),
        section("sync", sync),
        section("sample", sample),
    ];
    sections.into_iter().flatten().collect()
}

/// Keys that nothing reads under any plan.
fn without_effect(config: &Config) -> Vec<Unused> {
    let mut all = of_data(config);
    all.extend(of_optimizer(config));
    all.extend(of_compress(config));
    all.extend(of_local(config));
    all.extend(of_sync(config));
    all.extend(of_sample(config));
    all
}

fn of_data(config: &Config) -> Vec<Unused> {
    let data = &config.data;
    if data.kind == DataKind::Own {
        // The program may read any key.
        return vec![];
    }
    let kind = data.kind.name();
    let by = &["data.kind"];
    let of = |what: &str| format!("data.kind = \"{kind}\" {what}");
    let text = data.kind.is_text();
    let digits = matches!(data.kind, DataKind::Mnist | DataKind::Cifar10);
    let mut all = vec![];
    if data.kind == DataKind::Rust {
        let why = "reads the sources that cargo has downloaded; for a text of your own, set data.kind = \"text\" too";
        all.push(unused("data.path", by, of(why)));
    }
    if data.kind == DataKind::Synthetic {
        all.push(unused(
            "data.path",
            by,
            of("reads no files; set data.kind to the kind of data in the path"),
        ));
        all.push(unused("data.cache", by, of("writes no files")));
    }
    if digits && data.path.is_some() {
        all.push(unused("data.cache", &["data.kind", "data.path"], "images are read from data.path"));
    }
    if !text {
        for key in ["tokenizer", "vocab_size", "tokenizer_path", "val_fraction"] {
            let why = of("has no text; it is for data.kind = \"text\" and \"rust\"");
            all.push(unused(&format!("data.{key}"), by, why));
        }
    }
    if data.kind != DataKind::Rust {
        all.push(unused("data.max_mib", by, of("is read whole; it is for data.kind = \"rust\"")));
    }
    if !digits {
        all.push(unused(
            "data.shift",
            by,
            of("is not shifted; it is for data.kind = \"mnist\" and \"cifar10\""),
        ));
    }
    if data.kind != DataKind::Synthetic {
        for key in ["data.classes", "data.samples"] {
            all.push(unused(key, by, of("takes this from its files; it is for data.kind = \"synthetic\"")));
        }
    }
    let name = data.tokenizer.name();
    if text && data.tokenizer != TokenizerKind::Bpe {
        for key in ["data.vocab_size", "data.tokenizer_path"] {
            let why =
                format!("data.tokenizer = \"{name}\" does not read it; set data.tokenizer = \"bpe\" too");
            all.push(unused(key, &["data.tokenizer"], why));
        }
    }
    if text && data.tokenizer == TokenizerKind::Bpe && data.tokenizer_path.is_some() {
        let why = "the tokenizer of data.tokenizer_path has its own size; remove one of them";
        all.push(unused("data.vocab_size", &["data.tokenizer_path"], why));
    }
    all
}

fn of_optimizer(config: &Config) -> Vec<Unused> {
    let optimizer = &config.optimizer;
    let by = &["optimizer.kind"];
    let mut all = vec![];
    match optimizer.kind {
        OptimizerKind::Sgd => {
            for key in ["optimizer.beta1", "optimizer.beta2", "optimizer.eps"] {
                let why = "optimizer.kind = \"sgd\" uses only momentum; it is for optimizer.kind = \"adamw\"";
                all.push(unused(key, by, why));
            }
        }
        OptimizerKind::AdamW => {
            let why =
                "optimizer.kind = \"adamw\" uses beta1 and beta2 instead; it is for optimizer.kind = \"sgd\"";
            all.push(unused("optimizer.momentum", by, why));
        }
    }
    if optimizer.constant {
        for key in ["optimizer.min_lr", "optimizer.decay_steps"] {
            let why = "optimizer.constant = true keeps the learning rate; remove one of them";
            all.push(unused(key, &["optimizer.constant"], why));
        }
    }
    all
}

fn of_compress(config: &Config) -> Vec<Unused> {
    let kind = config.compress.kind;
    let mut all = vec![];
    let mut add = |key: &str, of: &str| {
        let why = format!("compress.kind = \"{kind}\" does not read it; it is for {of}");
        all.push(unused(key, &["compress.kind"], why));
    };
    if !kind.is_sparse() {
        add("compress.ratio", "\"topk\", \"randomk\" and \"dgc\"");
    }
    if kind != CompressKind::Powersgd {
        add("compress.rank", "\"powersgd\"");
    }
    if kind != CompressKind::Dgc {
        add("compress.momentum", "\"dgc\"");
    }
    if !matches!(kind, CompressKind::Dgc | CompressKind::Onebit) {
        add("compress.warmup", "\"dgc\" and \"onebit\"");
    }
    all
}

fn of_local(config: &Config) -> Vec<Unused> {
    let local = &config.local;
    if local.every == 0 {
        let keys = ["outer", "start", "lr", "momentum", "fragments", "overlap", "mixing"];
        let why = "islands exchange gradients in every step with local.every = 0; set local.every too";
        return keys.map(|key| unused(&format!("local.{key}"), &["local.every"], why)).into();
    }
    let mut all = vec![];
    if local.outer != Outer::Diloco {
        for key in ["local.lr", "local.momentum"] {
            let why =
                format!("local.outer = \"{}\" has no outer optimizer; it is for \"diloco\"", local.outer);
            all.push(unused(key, &["local.outer"], why));
        }
    }
    if local.overlap == 0 {
        let why = "no step goes on while islands come together; it is for local.overlap from 1 up";
        all.push(unused("local.mixing", &["local.overlap"], why));
    }
    all
}

fn of_sync(config: &Config) -> Vec<Unused> {
    let sync = &config.sync;
    if sync.servers == 0 {
        let why = "workers exchange gradients with each other where there are no parameter servers; set sync.servers too";
        return ["sync.mode", "sync.staleness"].map(|key| unused(key, &["sync.servers"], why)).into();
    }
    if sync.mode != SyncMode::Ssp {
        let why = format!("sync.mode = \"{}\" has no bound; it is for \"ssp\"", sync.mode);
        return vec![unused("sync.staleness", &["sync.mode"], why)];
    }
    vec![]
}

fn of_sample(config: &Config) -> Vec<Unused> {
    let sample = &config.sample;
    if config.model.context().is_none() {
        let keys = ["sample.prompt", "sample.tokens", "sample.temperature", "sample.top_k"];
        let why = format!("a model of kind {} generates no text", config.model.kind());
        return keys.map(|key| unused(key, &[], why.clone())).into();
    }
    if sample.prompt.is_none() {
        let keys = ["sample.tokens", "sample.temperature", "sample.top_k"];
        let why = "no text is generated without a prompt; set sample.prompt too";
        return keys.map(|key| unused(key, &["sample.prompt"], why)).into();
    }
    if sample.temperature == 0.0 {
        let why = "sample.temperature = 0 always takes the likeliest token";
        return vec![unused("sample.top_k", &["sample.temperature"], why)];
    }
    vec![]
}

/// Keys that `plan` does not read.
pub(super) fn under(config: &Config, plan: &Plan) -> Vec<Unused> {
    let mesh = &plan.mesh;
    let mut all = vec![];
    let mut add = |key: &str, why: String| all.push(unused(key, &[], why));
    if mesh.axis(Axis::Data) == 1 {
        add("parallel.zero", format!("the mesh {mesh} has one rank along data, so nothing can be sharded"));
    }
    if plan.shards() == 1 {
        add("parallel.prefetch", "nothing is sharded, so nothing is gathered".into());
    } else if plan.zero == 3 {
        add("parallel.bucket_mib", "under parallel.zero = 3 every block is a bucket".into());
    }
    if mesh.axis(Axis::Tensor) == 1 {
        let why = format!("the mesh {mesh} has one rank along tensor, so no layer is split");
        add("parallel.sequence", why.clone());
        add("parallel.layout", why);
    }
    if plan.stages() == 1 && plan.schedule != ScheduleKind::Interleaved {
        add("parallel.schedule", format!("the mesh {mesh} has one rank along pipe, so there is no pipeline"));
    }
    if plan.stages() == 1 {
        add("compress.pipeline", format!("the mesh {mesh} has one rank along pipe, so there is no pipeline"));
    }
    if mesh.workers() == 1 {
        add("compress.kind", format!("the mesh {mesh} has one worker, which sends no gradients"));
    }
    if mesh.axis(Axis::Replica) == 1 {
        add("local.every", format!("the mesh {mesh} has one rank along replica, so there is one island"));
    }
    if plan.world() == 1 {
        for key in ["parallel.transport", "parallel.algorithm"] {
            add(key, "a single rank does not communicate".into());
        }
    }
    let optimizer = &config.optimizer;
    if optimizer.kind == OptimizerKind::Sgd && optimizer.momentum == 0.0 {
        add("parallel.offload", "sgd without momentum keeps no state".into());
    }
    all
}
