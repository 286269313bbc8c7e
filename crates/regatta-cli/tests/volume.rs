//! What ranks count of a training step's communication is what the plan says it is: every operation and every byte.

mod common;

use common::{Place, succeed};
use regatta::comm::Kind;
use regatta::config::Config;
use regatta::datasets::Datasets;
use regatta::train::{Collective, Communication, Outline, Purpose, total};

/// A run of which every rank has counted, and what the plan says of it.
struct Run {
    counted: Vec<Vec<Communication>>,
    told: Vec<Vec<Collective>>,
}

impl Run {
    /// Trains over `mesh` around rings, and checks that every rank has counted what the plan tells.
    fn new(place: &Place, transport: &str, mesh: &str, sets: &[&str]) -> Self {
        let name = format!("{transport}-{mesh}-{}", sets.join("-"));
        let out = name.replace(['=', ',', '.', '"'], "-");
        let text = format!("data.path={}", place.path("text.txt").display());
        let cache = format!("data.cache={}", place.path("data").display());
        let mesh_set = format!("parallel.mesh={mesh}");
        let sets: Vec<&str> =
            [&["train.steps=3", "train.eval_batches=1", &text, &cache, &mesh_set], sets].concat();
        let mut arguments = vec!["--transport", transport, "--algorithm", "ring"];
        sets.iter().for_each(|set| arguments.extend(["--set", set]));
        succeed(&mut place.train(&out, &arguments));
        let counted = serde_json::from_value(place.summary(&out)["communication"].clone()).unwrap();

        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        let config = Config::load(&place.path("small.toml"), &sets).unwrap();
        let world = mesh.split(',').map(|axis| axis.split_once('=').unwrap().1.parse::<usize>().unwrap());
        let plan = config.plan(world.product()).unwrap();
        let vocab = Datasets::open(&config).unwrap().vocab;
        let told = |rank| Outline::new(&config, &plan, vocab, rank).unwrap().collectives();
        let run = Self { counted, told: (0..plan.world()).map(told).collect() };
        assert_eq!(run.counted.len(), run.told.len(), "{name}");
        for (rank, told) in run.told.iter().enumerate() {
            // Little goes to all by Bruck's algorithm, in fewer messages and some more bytes than the plan tells.
            let but_short = |mut all: Vec<Communication>| -> Vec<Communication> {
                let short = |one: &&mut Communication| one.kind == Kind::AllToAll.name();
                all.iter_mut().filter(short).for_each(|one| one.sent = 0);
                all
            };
            let sum = but_short(Communication::of(&total(told)));
            assert_eq!(
                but_short(run.counted[rank].clone()),
                sum,
                "{name}: rank {rank} counted (left) what the plan tells (right)\n{told:#?}"
            );
        }
        run
    }

    /// What `rank` counted for a purpose: operations, bytes and bytes sent, of one kind or of all.
    fn of(&self, rank: usize, purpose: Purpose, kind: Option<Kind>) -> (u64, u64, u64) {
        let wanted =
            |one: &&Communication| one.purpose == purpose && kind.is_none_or(|kind| kind.name() == one.kind);
        let add = |sum: (u64, u64, u64), one: &Communication| {
            (sum.0 + one.operations, sum.1 + one.bytes, sum.2 + one.sent)
        };
        self.counted[rank].iter().filter(wanted).fold((0, 0, 0), add)
    }

    /// Bytes that `rank` sent for gradients and parameters.
    fn sharded(&self, rank: usize) -> u64 {
        self.of(rank, Purpose::Gradients, None).2 + self.of(rank, Purpose::Parameters, None).2
    }
}

#[test]
fn data_parallelism_sends_what_a_ring_must() {
    let place = Place::new();
    for (mesh, ranks) in [("data=2", 2), ("data=4", 4)] {
        for transport in ["tcp", "shm"] {
            let run = Run::new(&place, transport, mesh, &["parallel.bucket_mib=0.02"]);
            for rank in 0..ranks {
                let (operations, bytes, sent) = run.of(rank as usize, Purpose::Gradients, None);
                // All parameters, several units of them.
                assert!(operations > 1 && bytes >= 4 * 25_000, "{operations} {bytes}");
                assert_eq!(sent * ranks, 2 * (ranks - 1) * bytes, "2(n-1)/n of {bytes} bytes");
                assert_eq!(run.of(rank as usize, Purpose::Parameters, None), (0, 0, 0));
            }
        }
    }
    // Micro-batches add up before they are communicated.
    let once = Run::new(&place, "shm", "data=2", &[]);
    let cut = Run::new(&place, "shm", "data=2", &["train.accumulate=2"]);
    assert_eq!(once.of(0, Purpose::Gradients, None), cut.of(0, Purpose::Gradients, None));
}

#[test]
fn servers_take_and_give_each_parameter_once() {
    let place = Place::new();
    for (servers, transport) in [("1", "shm"), ("3", "tcp")] {
        let servers = format!("sync.servers={servers}");
        let run = Run::new(&place, transport, "data=2", &[&servers, "parallel.bucket_mib=0.02"]);
        let (pushes, pushed, sent) = run.of(1, Purpose::Gradients, Some(Kind::Send));
        assert!(pushes > 1 && sent == pushed, "{pushes} {pushed} {sent}");
        assert_eq!(run.of(1, Purpose::Parameters, Some(Kind::Send)), (pushes, pushed, 0));
    }
}

#[test]
fn encoded_gradients_take_the_bytes_that_the_plan_tells() {
    let place = Place::new();
    let plain = Run::new(&place, "tcp", "data=4", &[]).of(0, Purpose::Gradients, None).2;
    for (kind, times) in [
        ("bf16", 1.9),
        ("f16", 1.9),
        ("int8", 3.0),
        ("int4", 5.0),
        ("onebit", 10.0),
        ("topk", 5.0),
        ("randomk", 15.0),
        ("dgc", 5.0),
        ("powersgd", 2.0),
    ] {
        let kind_set = format!("compress.kind={kind}");
        // Without warm-up, which is not told.
        let warms_up = matches!(kind, "dgc" | "onebit");
        let more: &[&str] = if warms_up { &["compress.warmup=0"] } else { &[] };
        let run = Run::new(&place, "tcp", "data=4", &[&[kind_set.as_str()], more].concat());
        let sent = run.of(0, Purpose::Gradients, None).2;
        assert!(times * sent as f64 <= plain as f64, "{kind}: {sent} bytes instead of {plain}");
        assert_eq!(run.of(0, Purpose::Parameters, None), (0, 0, 0), "{kind}");
    }
    Run::new(
        &place,
        "shm",
        "replica=2,data=2",
        &["compress.kind=onebit", "compress.warmup=0", "parallel.bucket_mib=0.02"],
    );
    Run::new(&place, "shm", "data=2,tensor=2", &["compress.kind=powersgd", "parallel.bucket_mib=0.02"]);
}

#[test]
fn encoded_activations_take_the_bytes_that_the_plan_tells() {
    let place = Place::new();
    let sent = |more: &[&str]| {
        let sets = [&["train.accumulate=2"][..], more].concat();
        Run::new(&place, "tcp", "pipe=2", &sets).of(0, Purpose::Pipeline, None).2 as f64
    };
    let plain = sent(&[]);
    assert_eq!(sent(&["compress.pipeline=bf16"]), plain / 2.0);
    // A scale for each 256 numbers.
    assert!((sent(&["compress.pipeline=int8"]) / (plain / 4.0 * 260.0 / 256.0) - 1.0).abs() < 0.01);
}

#[test]
fn islands_send_what_the_plan_tells() {
    let place = Place::new();
    for (mesh, more) in [
        ("replica=3", &["train.batch=12"][..]),
        ("replica=2,data=2", &["parallel.zero=1"]),
        ("replica=2,data=2", &["local.outer=diloco", "parallel.zero=3"]),
        ("replica=2,tensor=2", &["local.outer=diloco", "compress.kind=int8"]),
        ("replica=2", &["compress.kind=powersgd", "parallel.bucket_mib=0.02"]),
    ] {
        let run = Run::new(&place, "tcp", mesh, &[&["local.every=1"], more].concat());
        assert!(run.of(0, Purpose::Gradients, None).2 > 0);
    }
}

#[test]
fn zero_sends_as_much_and_with_sharded_parameters_half_more() {
    let place = Place::new();
    // Widths that need no padding, so that units of another size hold as many bytes.
    for (mesh, ranks, width) in [("data=2", 2, "model.embed=32"), ("data=4", 4, "model.embed=64")] {
        let sets = |zero: &'static str| [zero, "model.tied=false", width];
        let run = |zero: &'static str| Run::new(&place, "tcp", mesh, &sets(zero));
        let none = run("parallel.zero=0");
        let (one, two, three) = (run("parallel.zero=1"), run("parallel.zero=2"), run("parallel.zero=3"));
        for rank in 0..ranks {
            let least = none.sharded(rank);
            assert_eq!((one.sharded(rank), two.sharded(rank)), (least, least));
            assert_eq!(2 * three.sharded(rank), 3 * one.sharded(rank));
            let (scattered, gathered) = (Some(Kind::ReduceScatter), Some(Kind::AllGather));
            let bytes = one.of(rank, Purpose::Gradients, scattered).1;
            assert_eq!(one.of(rank, Purpose::Parameters, gathered).1, bytes);
            assert_eq!(three.of(rank, Purpose::Gradients, scattered).1, bytes);
            assert_eq!(three.of(rank, Purpose::Parameters, gathered).1, 2 * bytes);
            let n = ranks as u64;
            assert_eq!(one.of(rank, Purpose::Gradients, scattered).2 * n, (n - 1) * bytes);
        }
    }
    // Tied, cut into micro-batches, with more and with nothing fetched ahead.
    for sets in [
        &["parallel.zero=2", "train.accumulate=2"][..],
        &["parallel.zero=3", "train.accumulate=2", "parallel.prefetch=3"],
        &["parallel.zero=3", "parallel.prefetch=0", "parallel.recompute=block"],
        &["parallel.zero=1", "train.check_every=1", "train.eval_every=1", "train.checkpoint_every=1"],
    ] {
        Run::new(&place, "shm", "data=2", sets);
    }
}

#[test]
fn split_layers_take_four_all_reduces() {
    let place = Place::new();
    let in_layers = |run: &Run, rank: usize, layer: usize, kind: Kind| -> usize {
        let here = format!("layer {layer}: ");
        let told = run.told[rank].iter();
        told.filter(|one| one.kind == kind && one.place.starts_with(&here)).map(|one| one.count).sum()
    };
    for micro_batches in [1, 2] {
        let accumulate = format!("train.accumulate={micro_batches}");
        let run = Run::new(&place, "tcp", "tensor=2", &[&accumulate]);
        for rank in 0..2 {
            for layer in 0..2 {
                assert_eq!(in_layers(&run, rank, layer, Kind::AllReduce), 4 * micro_batches);
            }
            // Of 2 layers; the embedding's; the output's backward; the largest logits and the sums.
            let (operations, bytes, sent) = run.of(rank, Purpose::Tensor, None);
            let activation = 4 * 8 * 16 * 32;
            assert_eq!(operations, (4 * 2 + 2 + 2) * micro_batches as u64);
            assert_eq!(bytes, (4 * 2 + 2) * activation + 3 * 4 * 8 * 16);
            // 2(n-1)/n for two ranks.
            assert_eq!(sent, bytes);
            assert_eq!(run.of(rank, Purpose::Gradients, None), (0, 0, 0));
        }
    }
    // Computed again, the forward's two of a layer come again.
    let again = Run::new(&place, "shm", "tensor=2", &["parallel.recompute=block"]);
    assert_eq!(in_layers(&again, 0, 1, Kind::AllReduce), 6);
    // A smoothed loss sums the logits too.
    let smooth = Run::new(&place, "shm", "tensor=2", &["model.label_smoothing=0.1", "model.norm=rms"]);
    assert_eq!(smooth.of(0, Purpose::Tensor, None).1, (4 * 2 + 2) * 4 * 8 * 16 * 32 + 4 * 4 * 8 * 16);
    // Along the sequence a reduce-scatter and an all-gather for each.
    let sequence = Run::new(&place, "shm", "tensor=2", &["parallel.sequence=true", "model.bias=true"]);
    assert_eq!(in_layers(&sequence, 0, 1, Kind::ReduceScatter), 4);
    assert_eq!(in_layers(&sequence, 0, 1, Kind::AllGather), 4);
    Run::new(&place, "shm", "tensor=4", &["model.heads=4", "model.bias=true"]);
    Run::new(&place, "shm", "tensor=2", &["parallel.layout.vocab=none", "model.tied=false"]);
}

#[test]
fn stages_hand_on_activations_and_gradients() {
    let place = Place::new();
    let sets = |schedule: &'static str| [schedule, "train.accumulate=4"];
    for schedule in ["gpipe", "1f1b", "zero-bubble"] {
        let schedule = match schedule {
            "gpipe" => "parallel.schedule=gpipe",
            "1f1b" => "parallel.schedule=1f1b",
            _ => "parallel.schedule=zero-bubble",
        };
        let run = Run::new(&place, "tcp", "pipe=2", &sets(schedule));
        let message = 4 * 2 * 16 * 32;
        for rank in 0..2 {
            // Four micro-batches one way and their gradients the other.
            assert_eq!(run.of(rank, Purpose::Pipeline, None), (8, 8 * message, 4 * message));
            // The tied embedding's gradient is summed over its stages.
            assert_eq!(run.of(rank, Purpose::Gradients, None).0, 1);
        }
    }
    Run::new(&place, "shm", "pipe=2", &sets("parallel.schedule=interleaved"));
    Run::new(&place, "shm", "pipe=4", &["train.accumulate=4", "model.tied=false"]);
}

#[test]
fn products_of_axes_add_up() {
    let place = Place::new();
    for (mesh, sets) in [
        ("data=2,tensor=2", &[][..]),
        ("data=2,tensor=2", &["parallel.zero=3", "parallel.sequence=true", "train.accumulate=2"]),
        ("data=2,tensor=2", &["parallel.zero=2", "parallel.sequence=true", "train.accumulate=2"]),
        ("data=2,pipe=2", &["parallel.zero=1", "train.accumulate=2"]),
        ("data=2,pipe=2", &["parallel.zero=3", "train.accumulate=2", "parallel.schedule=interleaved"]),
        ("pipe=2,tensor=2", &["train.accumulate=2", "parallel.recompute=block", "parallel.sequence=true"]),
        ("data=2,pipe=2", &["parallel.zero=3", "train.accumulate=2", "parallel.recompute=all"]),
        ("pipe=2,tensor=2", &["train.accumulate=2", "parallel.recompute=all", "parallel.sequence=true"]),
        ("replica=2,data=2", &["parallel.zero=1"]),
        ("replica=2,data=2", &[]),
    ] {
        Run::new(&place, "shm", mesh, sets);
    }
}

#[test]
fn the_encoder_decoder_counts_its_cross_attention() {
    let place = Place::new();
    let small = std::fs::read_to_string(place.path("small.toml")).unwrap();
    let pairs = small.replace(
        "kind = \"gpt\"\nlayers = 2",
        "kind = \"encoder-decoder\"\nencoder_layers = 2\ndecoder_layers = 2",
    );
    std::fs::write(place.path("small.toml"), pairs).unwrap();
    Run::new(&place, "shm", "tensor=2", &["model.bias=true"]);
    Run::new(&place, "shm", "tensor=2", &["parallel.sequence=true", "parallel.recompute=block"]);
    Run::new(&place, "shm", "data=2,pipe=2", &["train.accumulate=2", "parallel.zero=1"]);
}
