//! Checks whether the values of a configuration are valid and consistent.

use super::limits;
use super::reader::Reader;
use super::schema::{Config, DataKind, TokenizerKind};
use crate::autograd::Precision;
use crate::data::{cifar10, mnist};
use crate::error::Result;
use regatta_plan::{CompressKind, Mesh, Outer, SyncMode};

/// Tokens of the smallest vocabulary that is trained: the 256 bytes and one merge.
const SMALLEST_BPE: usize = 257;
/// Largest shift of an image in pixels.
const LARGEST_SHIFT: usize = 8;

/// Checks all values. The error names the key.
pub(super) fn check(config: &Config, reader: &Reader<'_>) -> Result<()> {
    let (data, train, optimizer, parallel) =
        (&config.data, &config.train, &config.optimizer, &config.parallel);
    limits::check(config, reader)?;
    check_samples(config, reader)?;
    match (train.batch, train.batch_per_worker) {
        (None, None) => {
            return Err(reader.error("train.batch", "missing: give it or train.batch_per_worker"));
        }
        (Some(_), Some(_)) => {
            return Err(
                reader.error("train.batch", "given together with train.batch_per_worker: keep one of them")
            );
        }
        _ => {}
    }
    config
        .model
        .check()
        .map_err(|problem| reader.error(&format!("model.{}", problem.key), problem.problem))?;
    if data.kind == DataKind::Text && data.path.is_none() {
        return Err(
            reader.error("data.path", "missing: give a text file or folder, as in --set data.path=FILE")
        );
    }
    reader.within("data.val_fraction", data.val_fraction, 0.0, 1.0, false)?;
    reader.at_least_one("data", &[("max_mib", data.max_mib)])?;
    // A tokenizer that is loaded has its own size.
    let trained = data.tokenizer == TokenizerKind::Bpe && data.tokenizer_path.is_none();
    if trained && data.vocab_size < SMALLEST_BPE {
        let problem = format!("a byte-level vocabulary has at least {SMALLEST_BPE} tokens");
        return Err(reader.error("data.vocab_size", problem));
    }
    reader.at_least_one("data", &[("classes", data.classes), ("samples", data.samples)])?;
    if data.shift > LARGEST_SHIFT {
        return Err(reader.error("data.shift", format!("at most {LARGEST_SHIFT} pixels")));
    }
    let counts = [("steps", train.steps), ("accumulate", train.accumulate), ("log_every", train.log_every)];
    reader.at_least_one("train", &counts)?;
    reader.at_least_one("train", &[("batch", train.batch.unwrap_or(1)), ("keep", train.keep)])?;
    reader.within("train.checkpoint_minutes", train.checkpoint_minutes, 0.0, 1e6, true)?;
    reader.at_least_one("train", &[("batch_per_worker", train.batch_per_worker.unwrap_or(1))])?;
    reader.within("train.loss_scale", train.loss_scale.unwrap_or(1.0), 1e-30, 1e30, true)?;
    reader.within("optimizer.lr", optimizer.lr, 0.0, 1e6, true)?;
    reader.within("optimizer.min_lr", optimizer.min_lr.unwrap_or(0.0), 0.0, 1e6, true)?;
    reader.within("optimizer.weight_decay", optimizer.weight_decay, 0.0, 1e6, true)?;
    reader.within("optimizer.beta1", optimizer.beta1, 0.0, 1.0, false)?;
    reader.within("optimizer.beta2", optimizer.beta2, 0.0, 1.0, false)?;
    reader.within("optimizer.eps", optimizer.eps, 0.0, 1.0, true)?;
    reader.within("optimizer.momentum", optimizer.momentum, 0.0, 1.0, false)?;
    reader.within("optimizer.clip", optimizer.clip, 0.0, 1e30, true)?;
    reader.at_least_one("parallel", &[("workers", parallel.workers.unwrap_or(1))])?;
    reader.at_least_one("parallel", &[("threads", parallel.threads.unwrap_or(1))])?;
    reader.within("parallel.bucket_mib", parallel.bucket_mib, 0.001, 65536.0, true)?;
    reader.within("parallel.deadline_s", parallel.deadline_s, 0.1, 1e6, true)?;
    check_compress(config, reader)?;
    check_local(config, reader)?;
    check_sync(config, reader)?;
    reader.within("parallel.zero", f64::from(parallel.zero), 0.0, 3.0, true)?;
    reader.within("parallel.memory_mib", parallel.memory_mib.unwrap_or(1.0), 1.0, 1e9, true)?;
    reader.at_least_one("parallel", &[("chunks", parallel.chunks.unwrap_or(1))])?;
    if let Some(Err(error)) = parallel.mesh.as_deref().map(str::parse::<Mesh>) {
        return Err(reader.error("parallel.mesh", error.to_string()));
    }
    let transports = ["thread", "shm", "tcp", "mpi"];
    reader.one_of("parallel.transport", parallel.transport.as_deref(), &transports)?;
    let algorithms: Vec<&str> =
        regatta_comm::Algorithm::ALL.iter().map(|algorithm| algorithm.name()).collect();
    reader.one_of("parallel.algorithm", parallel.algorithm.as_deref(), &algorithms)?;
    reader.within("sample.temperature", config.sample.temperature, 0.0, 100.0, true)
}

/// Checks how gradients are encoded.
fn check_compress(config: &Config, reader: &Reader<'_>) -> Result<()> {
    let Config { compress, train, optimizer, .. } = config;
    reader.within("compress.ratio", compress.ratio, 1e-6, 1.0, true)?;
    reader.within("compress.momentum", compress.momentum, 0.0, 1.0, false)?;
    reader.at_least_one("compress", &[("rank", compress.rank)])?;
    if !matches!(compress.pipeline, CompressKind::None | CompressKind::Bf16 | CompressKind::Int8) {
        let problem = format!(
            "activations do not travel as \"{}\": use \"none\", \"bf16\" or \"int8\"",
            compress.pipeline
        );
        return Err(reader.error("compress.pipeline", problem));
    }
    if compress.kind == CompressKind::Dgc && optimizer.momentum > 0.0 {
        let problem = "\"dgc\" adds gradients up with a momentum of its own: use optimizer.momentum = 0 and compress.momentum";
        return Err(reader.error("compress.kind", problem));
    }
    // What was kept under one scale would be added to gradients under another, and a skipped step would lose it.
    let scaled = train.loss_scale.is_some() || train.precision == Precision::F16;
    if compress.kind.kept() > 0 && scaled {
        let problem = format!(
            "\"{}\" keeps what it has not sent for the next step, which does not go with a loss whose scale changes: use \
             train.precision = \"bf16\" or \"f32\" without train.loss_scale, or an encoding that keeps nothing",
            compress.kind
        );
        return Err(reader.error("compress.kind", problem));
    }
    Ok(())
}

/// Checks how islands come together.
fn check_local(config: &Config, reader: &Reader<'_>) -> Result<()> {
    let Config { local, compress, train, .. } = config;
    reader.within("local.lr", local.lr, 0.0, 1000.0, true)?;
    reader.within("local.momentum", local.momentum, 0.0, 1.0, false)?;
    reader.within("local.mixing", local.mixing, 0.0, 1.0, true)?;
    reader.at_least_one("local", &[("fragments", local.fragments)])?;
    if local.every == 0 {
        return Ok(());
    }
    if !local.every.is_multiple_of(local.fragments) {
        let problem = format!(
            "{} steps are not a multiple of local.fragments = {}: the parts come together one after another, at equal \
             distances",
            local.every, local.fragments
        );
        return Err(reader.error("local.every", problem));
    }
    if local.overlap >= local.every / local.fragments {
        let problem = format!(
            "{} steps under way are as many as from one part to the next, which is local.every / local.fragments = {}: use \
             fewer",
            local.overlap,
            local.every / local.fragments
        );
        return Err(reader.error("local.overlap", problem));
    }
    if local.outer == Outer::Gossip {
        for (key, set) in [
            ("local.fragments", local.fragments > 1),
            ("local.overlap", local.overlap > 0),
            ("compress.kind", compress.kind != CompressKind::None),
        ] {
            if set {
                let problem = "does not go with local.outer = \"gossip\", which sends neighbours all parameters as they are";
                return Err(reader.error(key, problem));
            }
        }
    }
    if compress.kind == CompressKind::Dgc {
        let problem = "\"dgc\" adds up with a momentum, and islands send what they have moved by: use \"topk\", and \
                       local.momentum with local.outer = \"diloco\"";
        return Err(reader.error("compress.kind", problem));
    }
    if train.loss_scale.is_some() || train.precision == Precision::F16 {
        let problem = "islands may not skip a step each for itself, as they would with a loss whose scale changes: use \
                       train.precision = \"bf16\" or \"f32\" without train.loss_scale";
        return Err(reader.error("local.every", problem));
    }
    Ok(())
}

/// Checks that what is set goes with parameter servers.
fn check_sync(config: &Config, reader: &Reader<'_>) -> Result<()> {
    let Config { sync, compress, local, parallel, .. } = config;
    if sync.servers == 0 {
        if sync.mode != SyncMode::Sync {
            let problem = format!(
                "\"{}\" needs parameter servers, which know how far each worker is: give their number with --servers or \
                 sync.servers",
                sync.mode
            );
            return Err(reader.error("sync.mode", problem));
        }
        return Ok(());
    }
    for (key, set, why) in [
        ("local.every", local.every > 0, "islands come together among themselves"),
        ("compress.kind", compress.kind != CompressKind::None, "servers take gradients as they are"),
        ("parallel.zero", parallel.zero > 0, "the servers' shards are what zero would shard"),
    ] {
        if set {
            let problem = format!("does not go with sync.servers = {}: {why}", sync.servers);
            return Err(reader.error(key, problem));
        }
    }
    if parallel.transport.as_deref() == Some("mpi") {
        let problem = "parameter servers do not go over MPI yet: use shm or tcp, which run under mpirun too";
        return Err(reader.error("parallel.transport", problem));
    }
    Ok(())
}

/// Checks that the data consists of samples of the kind that the model learns from.
fn check_samples(config: &Config, reader: &Reader<'_>) -> Result<()> {
    if config.data.kind == DataKind::Own {
        return Ok(());
    }
    let wanted = config.model.samples().image();
    let given = match config.data.kind {
        DataKind::Text | DataKind::Rust | DataKind::Own => None,
        DataKind::Mnist => Some([mnist::SIDE, mnist::SIDE, 1]),
        DataKind::Cifar10 => Some([cifar10::SIDE, cifar10::SIDE, cifar10::CHANNELS]),
        DataKind::Synthetic => wanted.or(Some([0; 3])),
    };
    let problem = match (wanted, given) {
        (None, Some(_)) => "this model learns from text: use \"text\" or \"rust\"".to_string(),
        (Some(_), None) => {
            "this model learns from images: use \"mnist\", \"cifar10\" or \"synthetic\"".to_string()
        }
        (Some(wanted), Some(given)) if wanted != given => {
            let text = |[height, width, channels]: [usize; 3]| {
                format!("{height} x {width} with {channels} channel(s)")
            };
            format!("the model takes images of {}, and these are {}", text(wanted), text(given))
        }
        _ => return Ok(()),
    };
    Err(reader.error("data.kind", problem))
}
