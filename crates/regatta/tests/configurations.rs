//! Any configuration and any change of it: an answer or an error, never a panic, an endless wait or memory without bound.

use proptest::prelude::*;
use regatta::config::Config;
use regatta::plan::{Axis, Mesh};
use regatta::train::Outline;

/// Keys, and values that each may be given beside numbers.
const KEYS: [(&str, &[&str]); 46] = [
    ("model.layers", &[]),
    ("model.encoder_layers", &[]),
    ("model.decoder_layers", &[]),
    ("model.heads", &[]),
    ("model.embed", &[]),
    ("model.block", &[]),
    ("model.hidden", &["[64]", "[64, 1048576]", "[4611686018427387904, 2]", "[]"]),
    ("model.channels", &["[16]", "[4096, 4096, 4096, 4096]", "[4611686018427387904]"]),
    ("model.stages", &["[2, 2]", "[512, 512]", "[1024, 1]", "[4611686018427387904]"]),
    ("model.side", &[]),
    ("model.inputs", &[]),
    ("model.dropout", &["0.5", "nan", "-inf"]),
    ("model.label_smoothing", &["0.1", "1.5"]),
    ("model.tied", &["false"]),
    ("data.kind", &["rust", "mnist", "cifar10", "synthetic", "text"]),
    ("data.tokenizer", &["bytes", "bpe", "chars"]),
    ("data.vocab_size", &[]),
    ("data.max_mib", &[]),
    ("data.classes", &[]),
    ("data.samples", &[]),
    ("data.val_fraction", &["0.5", "nan"]),
    ("data.path", &["1984", "true", "x # y", "[1]"]),
    ("train.steps", &[]),
    ("train.batch", &[]),
    ("train.batch_per_worker", &[]),
    ("train.accumulate", &[]),
    ("train.eval_batches", &[]),
    ("train.seed", &[]),
    ("train.precision", &["bf16", "f16"]),
    ("train.loss_scale", &["1e300", "nan"]),
    ("optimizer.kind", &["sgd", "adamw"]),
    ("optimizer.lr", &["1e300", "nan", "1e-300"]),
    ("optimizer.warmup", &[]),
    ("optimizer.decay_steps", &[]),
    ("parallel.workers", &[]),
    ("parallel.mesh", &MESHES),
    ("parallel.zero", &["1", "2", "3"]),
    ("parallel.prefetch", &[]),
    ("parallel.schedule", &["gpipe", "1f1b", "interleaved", "zero-bubble"]),
    ("parallel.chunks", &[]),
    ("parallel.sequence", &["true"]),
    ("parallel.recompute", &["block", "all"]),
    ("parallel.memory_mib", &["1", "1e9", "nan"]),
    ("parallel.bucket_mib", &["0.001", "65536", "1e300"]),
    ("parallel.threads", &[]),
    ("sample.tokens", &[]),
];

const MESHES: [&str; 9] = [
    "data=2",
    "data=4,tensor=2",
    "pipe=4",
    "pipe=2,data=2,tensor=2",
    "replica=2,data=2",
    "data=65536",
    "pipe=65536",
    "tensor=4611686018427387904",
    "data=4294967296,pipe=4294967296",
];

/// Numbers at which something may break.
const NUMBERS: [&str; 22] = [
    "0",
    "1",
    "2",
    "3",
    "4",
    "7",
    "8",
    "16",
    "64",
    "100",
    "1024",
    "4096",
    "65536",
    "100000",
    "1048576",
    "4294967295",
    "4294967296",
    "250000000000",
    "4611686018427387904",
    "9223372036854775807",
    "-1",
    "1.5",
];

const MODELS: [(&str, &str); 5] = [
    ("gpt", "text"),
    ("encoder-decoder", "text"),
    ("mlp", "mnist"),
    ("cnn", "mnist"),
    ("resnet", "synthetic"),
];

fn changes() -> impl Strategy<Value = Vec<String>> {
    let one = (0..KEYS.len()).prop_flat_map(|index| {
        let (key, words) = KEYS[index];
        let values = [&NUMBERS[..], words, words, words].concat();
        proptest::sample::select(values).prop_map(move |value| format!("{key}={value}"))
    });
    proptest::collection::vec(one, 0..6)
}

/// Everything that `regatta plan show` computes of a configuration.
fn look(config: &Config) -> Result<(), String> {
    let mesh = config.parallel.mesh.as_deref().map(|mesh| mesh.parse::<Mesh>().unwrap());
    let world = config.parallel.workers.or(mesh.map(|mesh| mesh.size())).unwrap_or(2);
    let told = |error: regatta::plan::PlanError| error.to_string();
    let plan = config.plan(world).map_err(told)?;
    for vocab in [10, 1 << 20] {
        config.check_plan(&plan, vocab).map_err(told)?;
        let footprints = config.footprints(&plan, vocab).map_err(told)?;
        assert_eq!(footprints.len(), plan.stages());
        // A product that has wrapped would be small.
        let whole = config.model.num_params(vocab).unwrap() as f64;
        let held: f64 = footprints.iter().map(|of| of.parameters as f64).sum::<f64>();
        assert!(
            held * (plan.mesh.axis(Axis::Tensor) * plan.shards()) as f64 >= 4.0 * whole,
            "{held} bytes for {whole} numbers"
        );
        let misfit = config.check_memory(&plan, vocab).map_err(|misfit| misfit.to_string());
        for rank in [0, world - 1] {
            let outline = Outline::new(config, &plan, vocab, rank).map_err(told)?;
            for one in outline.collectives() {
                assert!(one.bytes < 1 << 62 && one.sent < 1 << 62, "{one:?}");
            }
        }
        misfit?;
    }
    Ok(())
}

/// The most address space that this process has had, in MiB; none where the system does not tell.
fn peak_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmPeak:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1024)
}

fn cases() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(400);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn plans_of_any_configuration(model in 0..MODELS.len(), batch in 1usize..64, changes in changes()) {
        let (kind, data) = MODELS[model];
        let path = if data == "synthetic" { "" } else { "path = 'x'\n" };
        let text = format!("[model]\nkind = '{kind}'\n[data]\nkind = '{data}'\n{path}[train]\nbatch = {batch}\n");
        let before = peak_mib();
        if let Ok(config) = Config::parse(&text, "random", &changes) {
            // A plan that cannot be is a sentence.
            let _ = look(&config);
            let again = toml::to_string(&config).unwrap();
            match Config::parse(&again, "again", &[]).map_err(|error| error.to_string()) {
                Ok(again) => prop_assert_eq!(again, config),
                // A flag has chosen another kind than the file's, whose keys stay.
                Err(error) => prop_assert!(error.contains("has no effect"), "{}", error),
            }
        }
        if let (Some(before), Some(after)) = (before, peak_mib()) {
            prop_assert!(after - before < 1024, "{} MiB more", after - before);
        }
    }

    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,200}", set in "[a-z._]{0,20}=?\\PC{0,40}") {
        let _ = Config::parse(&text, "random", &[]);
        let _ = Config::parse("[model]\nkind='gpt'\n[data]\npath='x'\n[train]\nbatch=1\n", "random", &[set]);
    }
}

#[test]
fn numbers_that_cannot_be_counted_are_named() {
    let text = "[model]\nkind='gpt'\n[data]\npath='x'\n[train]\nbatch=8\n";
    for (set, wanted) in [
        (
            "train.accumulate=4611686018427387904",
            "`train.accumulate`: 4611686018427387904 is too large: at most 65536",
        ),
        ("train.accumulate=250000000000", "`train.accumulate`: 250000000000 is too large"),
        ("model.embed=4611686018427387904", "`model.embed`: 4611686018427387904 is too large"),
        ("parallel.prefetch=9223372036854775807", "`parallel.prefetch`"),
        ("parallel.mesh=data=4294967296", "at most 65536 ranks"),
        ("model.label_smoothing=2", "`model.label_smoothing`: 2 is out of range"),
    ] {
        let error = Config::parse(text, "c.toml", &[set.to_string()]).unwrap_err().to_string();
        assert!(error.contains(wanted), "{set}: {error}");
    }
    let resnet =
        "[model]\nkind='resnet'\nchannels=4611686018427387904\n[data]\nkind='synthetic'\n[train]\nbatch=1\n";
    assert!(Config::parse(resnet, "c.toml", &[]).unwrap_err().to_string().contains("`model.channels`"));
    let many = resnet.replace("channels=4611686018427387904", "side=2048\ninputs=4096");
    let error = Config::parse(&many, "c.toml", &[]).unwrap_err().to_string();
    assert!(
        error.contains("`data.classes`: 10 patterns of 2048 x 2048 x 4096 numbers are too many"),
        "{error}"
    );
}
