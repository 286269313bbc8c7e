//! Plans on paper.

mod common;

use common::{Place, fail, said, succeed};

fn show(place: &Place, more: &[&str]) -> std::process::Command {
    let arguments = ["plan", "show", "small.toml", "--set", "data.path=text.txt"];
    place.regatta(&[&arguments[..], more].concat())
}

#[test]
fn slices_and_collectives_of_every_rank() {
    let place = Place::new();
    let text = said(&succeed(&mut show(&place, &["--mesh", "data=2,tensor=2", "--zero", "1"])));
    assert!(text.starts_with("mesh data=2,tensor=2, batch 4 per worker (8 in all), zero 1"), "{text}");
    assert!(
        text.contains("layout: batch -> data, heads -> tensor, mlp -> tensor, vocab -> tensor"),
        "{text}"
    );
    for rank in ["rank 0 at data 0, tensor 0", "rank 1 at data 0, tensor 1", "rank 3 at data 1, tensor 1"] {
        assert!(text.contains(rank), "{text}");
    }
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    let up: Vec<String> = lines
        .iter()
        .filter(|line| line.first() == Some(&"layers.0.up.weight"))
        .map(|line| line[1..7].join(" "))
        .collect();
    assert_eq!(up, ["[32, 128] embed 0..32, mlp 0..64", "[32, 128] embed 0..32, mlp 64..128"].repeat(2));
    // 4 samples of 16 tokens, 32 wide, in f32; a ring of two sends as much as there is.
    let reduced = "tensor all_reduce tensor 2 1 8192 8192 layer 0: feed-forward out, forward";
    assert_eq!(lines.iter().filter(|line| line.join(" ") == reduced).count(), 4, "{text}");
    assert!(text.contains("gradients   reduce_scatter") && text.contains("parameters  all_gather"), "{text}");
    let one = said(&succeed(&mut show(&place, &["--mesh", "data=2,tensor=2", "--rank", "2"])));
    assert!(one.contains("rank 2 at data 1") && !one.contains("rank 1 at"), "{one}");
}

#[test]
fn stages_and_their_messages() {
    let place = Place::new();
    let flags = ["--mesh", "pipe=2", "--schedule", "gpipe", "--micro-batches", "4"];
    let text = said(&succeed(&mut show(&place, &flags)));
    assert!(text.contains("schedule gpipe: 4 micro-batches, the stages wait 20.0 % of the time"), "{text}");
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let messages: Vec<String> = text.lines().map(words).filter(|line| line.starts_with("pipeline")).collect();
    assert_eq!(
        messages,
        [
            "pipeline send/recv pipe 2 4 4096 4096 activations, sent to stage 1",
            "pipeline send/recv pipe 2 4 4096 0 their gradients, received from stage 1",
            "pipeline send/recv pipe 2 4 4096 0 activations, received from stage 0",
            "pipeline send/recv pipe 2 4 4096 4096 their gradients, sent to stage 0",
        ]
    );
    assert!(text.contains("shared by embedding and output: gradients of all stages"), "{text}");
    let few = said(&succeed(&mut show(&place, &["--mesh", "pipe=2", "--micro-batches", "1"])));
    assert!(few.contains("warning: 1 micro-batches do not fill a pipeline of 2 stages"), "{few}");
    let alone = said(&succeed(&mut show(&place, &["--workers", "1"])));
    assert!(alone.contains("a step communicates nothing"), "{alone}");
}

#[test]
fn plans_that_cannot_be_say_why() {
    let place = Place::new();
    let problem = |more: &[&str]| fail(&mut show(&place, more));
    let error = problem(&["--mesh", "data=2,tensor=2", "--workers", "2"]);
    assert!(error.contains("is for 4 ranks, but the job has 2"), "{error}");
    let error = problem(&["--mesh", "tensor=4"]);
    assert!(
        error.contains("layers.0.attention.qkv.weight: its dimension heads of 2 does not divide"),
        "{error}"
    );
    let error = problem(&["--mesh", "tensor=2", "--set", "parallel.layout.embed=tensor"]);
    assert!(
        error.contains("tokens: its dimensions vocab and embed are both split over the axis tensor"),
        "{error}"
    );
    let error = problem(&["--mesh", "data=3"]);
    assert!(error.contains("a batch of 8 does not divide among 3"), "{error}");
    let error = problem(&["--mesh", "pipe=8"]);
    assert!(error.contains("the model has 4 blocks"), "{error}");
    let error = problem(&["--mesh", "data=2", "--rank", "2"]);
    assert!(error.contains("there is no rank 2; mesh data=2 has ranks 0 to 1"), "{error}");
    assert!(problem(&["--mesh", "date=2"]).contains("has no axis `date`"));
    assert!(problem(&["--zero", "4"]).contains("parallel.zero"));
    assert!(problem(&["--schedule", "2f2b"]).contains("there is no schedule '2f2b'"));
}

#[test]
fn a_vocabulary_that_is_known_needs_no_data() {
    let place = Place::new();
    let missing = ["--set", "data.path=nowhere.txt", "--set", "data.tokenizer=bytes", "--mesh", "data=2"];
    let text = said(&succeed(&mut show(&place, &missing)));
    assert!(text.contains("[256, 32]"), "{text}");
}

#[test]
fn what_goes_between_workers_and_over_which_links_an_encoding_is_faster() {
    let place = Place::new();
    let shown = |more: &[&str]| said(&succeed(&mut show(&place, more)));
    let line = |text: &str| -> String {
        text.lines().find(|line| line.starts_with("a rank sends")).unwrap_or_default().to_string()
    };
    let plain = line(&shown(&["--mesh", "data=2"]));
    assert!(plain.ends_with("bytes a step to other workers"), "{plain}");
    let told = line(&shown(&["--mesh", "data=2", "--step-ms", "5"]));
    assert!(told.starts_with(&plain) && told.contains("would be faster"), "{told}");
    assert!(told.contains("over links of less than") && told.contains("compress.kind = \""), "{told}");
    // Islands send their part of that in each of many steps.
    let bytes = |line: &str| line.split_whitespace().nth(3).unwrap().parse::<f64>().unwrap();
    let rare = ["--mesh", "replica=2", "--set", "local.every=20", "--step-ms", "5"];
    let told = line(&shown(&rare));
    assert!((bytes(&told) * 20.0 - bytes(&plain)).abs() <= 20.0, "{told} {plain}");
    assert!(!told.contains("faster"), "{told}");
    assert_eq!(line(&shown(&["--mesh", "pipe=2"])), "");
    for wrong in ["0", "-3", "nan", "1e300"] {
        let error = fail(&mut show(&place, &["--mesh", "data=2", &format!("--step-ms={wrong}")]));
        assert!(error.contains("--step-ms"), "{error}");
    }
}
