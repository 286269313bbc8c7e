//! Ranks that somebody starts by hand, each with a configuration and data of its own: they train together only where they
//! agree.

mod common;

use common::{Place, said};
use std::process::{Child, Command, Output, Stdio};

/// A job of ranks started by hand, each in a folder of its own.
struct Job<'a> {
    place: &'a Place,
    size: usize,
    port: u16,
}

impl<'a> Job<'a> {
    fn new(place: &'a Place, size: usize) -> Self {
        // A port that was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self { place, size, port }
    }

    fn rank(&self, rank: usize, out: &str, more: &[&str]) -> Command {
        let mut train = self.place.train(out, more);
        train.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
        train.env("WORLD_SIZE", self.size.to_string()).env("LOCAL_WORLD_SIZE", self.size.to_string());
        train.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", self.port.to_string());
        train.env("REGATTA_HOST", format!("host{rank}")).env("REGATTA_TLS", "off");
        train.stdout(Stdio::piped()).stderr(Stdio::piped());
        train
    }
}

fn outcome(ranks: Vec<Command>) -> Vec<Output> {
    let children: Vec<Child> = ranks.into_iter().map(|mut rank| rank.spawn().unwrap()).collect();
    children.into_iter().map(|child| child.wait_with_output().unwrap()).collect()
}

/// Two ranks, of which the second has `more`: what each says.
fn differ(place: &Place, more: &[&str]) -> Vec<String> {
    let job = Job::new(place, 2);
    let outputs = outcome(vec![job.rank(0, "differ", &[]), job.rank(1, "differ", more)]);
    for output in &outputs {
        assert_eq!(output.status.code(), Some(1), "{more:?}: {}", said(output));
    }
    assert!(!place.path("differ/checkpoints").exists(), "{more:?}");
    outputs.iter().map(said).collect()
}

#[test]
fn the_first_key_that_differs_is_named_with_both_values() {
    let place = Place::new();
    for (more, wanted) in [
        (vec!["--set", "model.layers=3"], "differ in model.layers: 2 on rank 0"),
        (vec!["--set", "train.batch=4"], "differ in train.batch: 8 on rank 0"),
        (vec!["--set", "optimizer.lr=0.5"], "differ in optimizer.lr: 0.01 on rank 0"),
        (vec!["--set", "train.seed=7"], "differ in train.seed: 1337 on rank 0"),
        (vec!["--steps", "5"], "differ in train.steps: 12 on rank 0"),
        (vec!["--set", "train.eval_every=2"], "differ in train.eval_every: 0 on rank 0"),
        (vec!["--zero", "1"], "differ in parallel.zero: 0 on rank 0"),
        (vec!["--algorithm", "tree"], "differ in parallel.algorithm: null on rank 0"),
        (vec!["--trace", "t.json"], "differ in train.trace: null on rank 0"),
    ] {
        let said = differ(&place, &more);
        assert!(said.iter().all(|text| text.contains(wanted)), "{more:?}: {said:?}");
        assert!(said[0].contains("on rank 1 (host "), "{said:?}");
    }
}

#[test]
fn other_text_and_another_tokenizer_are_found() {
    let place = Place::new();
    let text = std::fs::read_to_string(place.path("text.txt")).unwrap();
    std::fs::write(place.path("other.txt"), text.replacen("line 5", "line 6", 1)).unwrap();
    let said = differ(&place, &["--set", "data.path=other.txt"]);
    assert!(said.iter().all(|text| text.contains("differ in the data's content: ")), "{said:?}");
    // The same settings, and a tokenizer's file that differs.
    let bpe =
        ["--set", "data.tokenizer=bpe", "--set", "data.vocab_size=300", "--workers", "1", "--steps", "1"];
    common::succeed(&mut place.train("one", &bpe));
    std::fs::copy(place.path("one/tokenizer.json"), place.path("one.json")).unwrap();
    let longer =
        ["--set", "data.tokenizer=bpe", "--set", "data.vocab_size=310", "--workers", "1", "--steps", "1"];
    common::succeed(&mut place.train("longer", &longer));
    std::fs::copy(place.path("longer/tokenizer.json"), place.path("two.json")).unwrap();
    let job = Job::new(&place, 2);
    let rank = |rank: usize, file: &str| {
        let path = format!("data.tokenizer_path={file}");
        job.rank(rank, "differ", &["--set", "data.tokenizer=bpe", "--set", &path])
    };
    let outputs = outcome(vec![rank(0, "one.json"), rank(1, "two.json")]);
    for output in &outputs {
        let text = common::said(output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("content: ") && text.contains("the tokenizer's content"), "{text}");
    }
}

#[test]
fn what_each_host_may_have_for_itself_may_differ() {
    let place = Place::new();
    std::fs::copy(place.path("text.txt"), place.path("copy.txt")).unwrap();
    let job = Job::new(&place, 2);
    let own = [
        "--set",
        "data.path=copy.txt",
        "--set",
        "data.cache=elsewhere",
        "--set",
        "parallel.threads=1",
        "--set",
        "parallel.deadline_s=40",
    ];
    let outputs = outcome(vec![job.rank(0, "same", &[]), job.rank(1, "same", &own)]);
    for output in &outputs {
        assert!(output.status.success(), "{}", said(output));
    }
    assert_eq!(place.summary("same")["world"], 2);
}

#[test]
fn one_rank_of_many_is_named() {
    let place = Place::new();
    let job = Job::new(&place, 8);
    let more = |rank: usize| if rank == 5 { &["--set", "train.seed=5"][..] } else { &[] };
    let outputs = outcome((0..8).map(|rank| job.rank(rank, "many", more(rank))).collect());
    for output in &outputs {
        let text = said(output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("differ in train.seed: 1337 on rank 0"), "{text}");
        assert!(text.contains("and 3 more, 5 on rank 5 (host "), "{text}");
    }
}
