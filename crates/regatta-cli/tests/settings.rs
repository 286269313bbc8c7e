//! Where settings come from: flags over environment variables over the configuration over defaults; keys without effect,
//! and numbers that no machine holds.

mod common;

use common::{Place, fail, said, succeed};
use std::process::{Child, Command, Stdio};

/// The line on settings that a run began with; empty where there was none.
fn settings(output: &str) -> &str {
    output.lines().find(|line| line.starts_with("settings: ")).unwrap_or("")
}

#[test]
fn flags_win_over_variables_and_these_over_the_file() {
    let place = Place::new();
    let mut file = std::fs::read_to_string(place.path("small.toml")).unwrap();
    file.push_str(
        "[parallel]\nworkers = 2\ndeadline_s = 77\ntransport = \"tcp\"\nthreads = 1\nalgorithm = \"ring\"\n",
    );
    std::fs::write(place.path("small.toml"), file).unwrap();
    let run = |out: &str, more: &[&str], variables: &[(&str, &str)]| {
        let output = said(&succeed(place.train(out, more).envs(variables.iter().copied())));
        (settings(&output).to_string(), output, place.summary(out))
    };
    let (told, _, summary) = run("file", &[], &[]);
    assert_eq!(
        told,
        "settings: parallel.deadline_s = 77.0 (small.toml), parallel.transport = \"tcp\" (small.toml), parallel.algorithm = \
         \"ring\" (small.toml), parallel.threads = 1 (small.toml)"
    );
    assert_eq!((&summary["transport"], &summary["threads"]), (&"tcp".into(), &1.into()));
    let variables = [
        ("REGATTA_DEADLINE_S", "66"),
        ("REGATTA_TRANSPORT", "shm"),
        ("REGATTA_ALGORITHM", "tree"),
        ("REGATTA_THREADS", "2"),
    ];
    let (told, output, summary) = run("environment", &[], &variables);
    assert_eq!(
        told,
        "settings: parallel.deadline_s = 66.0 (REGATTA_DEADLINE_S), parallel.transport = \"shm\" (REGATTA_TRANSPORT), \
         parallel.algorithm = \"tree\" (REGATTA_ALGORITHM), parallel.threads = 2 (REGATTA_THREADS)"
    );
    // Once, though there are two ranks and a launcher.
    assert_eq!(output.matches("settings: ").count(), 1, "{output}");
    assert_eq!((&summary["transport"], &summary["threads"]), (&"shm".into(), &2.into()));
    let flags = ["--transport", "tcp", "--set", "parallel.threads=1", "--set", "parallel.deadline_s=55"];
    let (told, _, summary) = run("flags", &flags, &variables);
    assert!(told.contains("deadline_s = 55.0 (--set), parallel.transport = \"tcp\" (--transport)"), "{told}");
    assert!(
        told.contains("algorithm = \"tree\" (REGATTA_ALGORITHM), parallel.threads = 1 (--set)"),
        "{told}"
    );
    assert_eq!((&summary["transport"], &summary["threads"]), (&"tcp".into(), &1.into()));
    // A flag of a key's own wins over --set, wherever it stands.
    let output = said(&succeed(&mut place.train("steps", &["--set", "train.steps=9", "--steps", "3"])));
    assert!(output.contains("3 steps: "), "{output}");
    // Bad values name their variable.
    let error = fail(place.train("bad", &[]).env("REGATTA_DEADLINE_S", "soon"));
    assert!(error.contains("REGATTA_DEADLINE_S: `parallel.deadline_s`"), "{error}");
    let error = fail(place.train("bad", &[]).env("REGATTA_TRANSPORT", "pigeon"));
    assert!(error.contains("REGATTA_TRANSPORT: `parallel.transport`: unknown value `pigeon`"), "{error}");
    assert!(!place.path("bad").exists());
}

#[test]
fn what_is_the_default_is_not_told() {
    let place = Place::new();
    let output = said(&succeed(&mut place.train("plain", &["--workers", "2"])));
    assert_eq!(settings(&output), "");
    assert!(!output.contains("has no effect"), "{output}");
}

/// Rank `rank` of a job of two that somebody starts by hand; each in a folder of its own, into one run's folder.
#[cfg(target_os = "linux")]
fn by_hand(place: &Place, rank: usize, port: u16) -> Command {
    let mut command = place.train("deadline", &["--steps", "1000000"]);
    command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
    command.env("WORLD_SIZE", "2").env("LOCAL_WORLD_SIZE", "2").env("REGATTA_DEADLINE_S", "3");
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

#[cfg(target_os = "linux")]
#[test]
fn the_deadline_of_the_environment_ends_a_wait() {
    let place = Place::new();
    // Without the variable, the wait would take far longer than any test may.
    let mut file = std::fs::read_to_string(place.path("small.toml")).unwrap();
    file.push_str("[parallel]\ndeadline_s = 86400\ntransport = \"tcp\"\n");
    std::fs::write(place.path("small.toml"), file).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut ranks: Vec<Child> = (0..2).map(|rank| by_hand(&place, rank, port).spawn().unwrap()).collect();
    common::until("the first steps", || {
        std::fs::read_to_string(place.path("deadline/metrics.jsonl"))
            .is_ok_and(|text| text.lines().count() > 3)
    });
    common::signal("-STOP", ranks[1].id());
    let output = ranks.remove(0).wait_with_output().unwrap();
    common::signal("-KILL", ranks[0].id());
    ranks[0].wait().unwrap();
    let output = said(&output);
    assert!(output.contains("REGATTA_DEADLINE_S") || output.contains("rank 1"), "{output}");
}

#[test]
fn keys_that_nothing_reads_are_refused() {
    let place = Place::new();
    let model = "[model]\nkind = \"resnet\"\nstages = [1]\nchannels = 8\n[train]\nbatch = 8\nsteps = 1\n";
    let made_up = format!("{model}[data]\nkind = \"synthetic\"\nclasses = 3\nsamples = 40\n");
    std::fs::write(place.path("images.toml"), made_up).unwrap();
    let small = |sets: &[&str]| {
        let mut arguments = vec!["plan", "show", "small.toml", "--workers", "1"];
        sets.iter().for_each(|set| arguments.extend(["--set", set]));
        place.regatta(&arguments)
    };
    let text = "data.path=text.txt";
    for (sets, wanted) in [
        (vec!["data.kind=rust", text], "`data.path`: has no effect: data.kind = \"rust\" reads the sources"),
        (vec![text, "data.vocab_size=300"], "`data.vocab_size`: has no effect: data.tokenizer = \"chars\""),
        (vec![text, "data.tokenizer=bytes", "data.tokenizer_path=x"], "`data.tokenizer_path`: has no effect"),
        (vec![text, "data.max_mib=3"], "`data.max_mib`: has no effect: data.kind = \"text\" is read whole"),
        (vec![text, "data.classes=3"], "`data.classes`: has no effect"),
        (vec![text, "data.shift=2"], "`data.shift`: has no effect"),
        (vec![text, "optimizer.momentum=0.9"], "`optimizer.momentum`: has no effect"),
        (vec![text, "optimizer.kind=sgd", "optimizer.beta1=0.8"], "`optimizer.beta1`: has no effect"),
        (
            vec![text, "optimizer.min_lr=0.001"],
            "`optimizer.min_lr`: has no effect: optimizer.constant = true",
        ),
        (
            vec![text, "sample.tokens=3"],
            "`sample.tokens`: has no effect: no text is generated without a prompt",
        ),
        (
            vec![text, "sample.prompt=a", "sample.temperature=0", "sample.top_k=3"],
            "`sample.top_k`: has no effect",
        ),
    ] {
        let error = fail(&mut small(&sets));
        assert!(error.contains(wanted), "{sets:?}: {error}");
    }
    for (set, wanted) in [
        ("data.path=x", "`data.path`: has no effect"),
        ("data.tokenizer=bpe", "`data.tokenizer`: has no effect: data.kind = \"synthetic\" has no text"),
        ("data.val_fraction=0.2", "`data.val_fraction`: has no effect"),
        ("sample.prompt=a", "`sample.prompt`: has no effect: a model of kind resnet generates no text"),
    ] {
        let error =
            fail(&mut place.regatta(&["plan", "show", "images.toml", "--workers", "1", "--set", set]));
        assert!(error.contains(wanted), "{set}: {error}");
    }
    // A flag that chooses another kind leaves the file's keys of its own kind alone.
    succeed(&mut place.regatta(&[
        "plan",
        "show",
        "images.toml",
        "--workers",
        "1",
        "--set",
        "data.kind=cifar10",
    ]));
    // What a default says anyway is no mistake.
    succeed(&mut small(&[text, "data.vocab_size=2048", "optimizer.momentum=0"]));
}

#[test]
fn keys_that_the_plan_does_not_read_are_told() {
    let place = Place::new();
    let output =
        said(&succeed(&mut place.train("one", &["--workers", "1", "--zero", "2", "--schedule", "gpipe"])));
    assert!(
        output.contains("warning: parallel.zero has no effect: the mesh data=1 has one rank along data"),
        "{output}"
    );
    assert!(output.contains("warning: parallel.schedule has no effect"), "{output}");
    let output = said(&succeed(&mut place.train("two", &["--mesh", "data=2", "--zero", "2"])));
    assert!(!output.contains("has no effect"), "{output}");
}

#[test]
fn shipped_configurations_are_clean() {
    let place = Place::new();
    let configs = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let mut seen = 0;
    for entry in std::fs::read_dir(configs).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let mut show = place.regatta(&["plan", "show"]);
        show.arg(&path).args(["--mesh", "data=2", "--rank", "0"]);
        if text.contains("kind = \"text\"") {
            show.args(["--set", "data.path=text.txt"]);
        }
        if text.contains("kind = \"rust\"") {
            // The vocabulary is known without the sources.
            show.args(["--set", "data.tokenizer=bytes"]);
        }
        let output = said(&succeed(&mut show));
        assert!(!output.contains("has no effect"), "{output}");
        seen += 1;
    }
    assert!(seen >= 7, "{seen} configurations");
}

#[test]
fn values_of_flags_are_text_where_text_is_wanted() {
    let place = Place::new();
    std::fs::copy(place.path("text.txt"), place.path("1984")).unwrap();
    let mut train =
        place.regatta(&["train", "small.toml", "--workers", "1", "--out", "number", "--steps", "1"]);
    succeed(train.args(["--set", "data.path=1984"]));
    for (value, name) in [("true", "true"), ("1e5", "1e5"), ("2024-01-01", "2024-01-01"), ("[1]", "[1]")] {
        let arguments = ["train", "small.toml", "--workers", "1", "--set", &format!("data.path={value}")];
        let error = fail(&mut place.regatta(&arguments));
        assert!(
            error.contains(&format!("{name}: cannot be read")) || error.contains(&format!("{name}: ")),
            "{error}"
        );
        assert!(!error.contains("invalid type"), "{error}");
    }
    let file = std::fs::read_to_string(place.path("small.toml")).unwrap();
    std::fs::write(place.path("year.toml"), file.replace("[data]", "[data]\npath = 1984")).unwrap();
    let error = fail(&mut place.regatta(&["train", "year.toml"]));
    assert!(error.contains("`data.path`: invalid type: integer `1984`"), "{error}");
    assert!(error.contains("write text in quotes, as in path = \"1984\""), "{error}");
}

#[test]
fn numbers_without_bound_end_in_a_sentence() {
    let place = Place::new();
    for arguments in [
        "--set train.accumulate=4611686018427387904 --mesh data=4",
        "--set train.accumulate=250000000000 --set train.batch=250000000000",
        "--set train.batch=1000000000000",
        "--set model.embed=4611686018427387904",
        "--set model.layers=4611686018427387904",
        "--set model.block=4611686018427387904",
        "--mesh data=4294967296,pipe=4294967296",
        "--workers 4611686018427387904",
        "--micro-batches 65536 --set train.batch=1048576 --mesh pipe=32",
    ] {
        // With little address space: what allocates without bound aborts.
        let mut command = Command::new("sh");
        let script = "ulimit -v 4000000; exec \"$0\" plan show small.toml --set data.path=text.txt \"$@\"";
        command.args(["-c", script, env!("CARGO_BIN_EXE_regatta")]).args(arguments.split_whitespace());
        command.current_dir(place.path(".")).stdin(Stdio::null());
        let output = command.output().unwrap();
        let text = said(&output);
        // 2: the value of a flag.
        assert!(matches!(output.status.code(), Some(1 | 2)), "{arguments}: {text}");
        assert!(text.contains("error: ") && text.lines().count() < 4, "{arguments}: {text}");
    }
}

/// Trains with at most so many KiB of address space.
#[cfg(target_os = "linux")]
fn limited(place: &Place, kib: u64, arguments: &str) -> Command {
    let mut command = Command::new("sh");
    let script = format!(
        "ulimit -v {kib}; exec \"$0\" train small.toml --set data.path=text.txt --out limited \"$@\""
    );
    command.args(["-c", &script, env!("CARGO_BIN_EXE_regatta")]).args(arguments.split_whitespace());
    command.current_dir(place.path(".")).stdin(Stdio::null());
    command
}

#[cfg(target_os = "linux")]
#[test]
fn a_model_that_memory_cannot_hold_is_refused_before_it_is_made() {
    let place = Place::new();
    for arguments in ["--workers 1 --set model.embed=16384", "--workers 2 --set model.embed=16384"] {
        let error = fail(&mut limited(&place, 8_000_000, arguments));
        assert!(error.contains("error: ") && error.contains("at least"), "{error}");
        assert!(error.contains("the limit of address space (ulimit -v) is 7812.50 MiB"), "{error}");
        assert!(!place.path("limited").exists(), "{error}");
    }
    // What fits is trained.
    succeed(&mut limited(&place, 8_000_000, "--workers 1 --steps 1"));
    // Numbers that no machine has.
    let mut command = place
        .train("large", &["--workers", "1", "--set", "model.embed=131072", "--set", "model.layers=1000"]);
    let error = fail(&mut command);
    assert!(
        error.contains("the 1 rank(s) of this machine take at least") || error.contains("ulimit"),
        "{error}"
    );
}
