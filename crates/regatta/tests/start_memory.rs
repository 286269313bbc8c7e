//! Starting a sharded model takes a rank's share of memory: nobody ever holds the whole model. Each rank is a process of its
//! own, this test's program again.

#![cfg(target_os = "linux")]

use regatta::config::{OptimizerConfig, OptimizerKind};
use regatta::datasets::{Dataset, HostBatch};
use regatta::models::GptConfig;
use regatta::plan::{Batch, Plan};
use regatta::train::{Callback, Job, Trainer, peak_rss_bytes};
use std::io::Write;
use std::process::{Command, Stdio};

/// Tells the program to be a rank, and in which folder.
const RANK: &str = "REGATTA_TEST_START_MEMORY";
const RANKS: usize = 4;
const VOCAB: usize = 16_384;
/// Layers, width, tokens: some 60 million parameters.
const SIZE: (usize, usize, usize) = (4, 1024, 16);

struct Zeros;

impl Dataset for Zeros {
    fn len(&self) -> usize {
        64
    }

    fn batch(&self, _: u64, indices: &[usize]) -> regatta::Result<HostBatch> {
        let ids = vec![0; indices.len() * SIZE.2];
        Ok(HostBatch::Text { inputs: ids.clone(), targets: ids, time: SIZE.2 })
    }
}

/// Says what this process has taken when the model is there, and ends the process.
struct Tell(u64);

impl Callback for Tell {
    fn started(&mut self, job: &Job, _: usize, parameters: usize) {
        println!("parameters {parameters} bytes {}", peak_rss_bytes().saturating_sub(self.0));
        std::io::stdout().flush().unwrap();
        // The ranks end together, before anything is trained.
        job.group.barrier().unwrap();
        std::process::exit(0);
    }
}

/// Not a test by itself: a rank, started by the test below.
#[test]
#[ignore = "a rank of the test below"]
fn a_rank() {
    let Some(folder) = std::env::var_os(RANK) else { return };
    let (layers, embed, context) = SIZE;
    let plan = Plan::new("data=4".parse().unwrap(), Batch::global(4, 1), 25 << 20).unwrap();
    let before = peak_rss_bytes();
    Trainer::new(Plan { zero: 3, ..plan })
        .model(GptConfig { layers, embed, context, ..GptConfig::default() })
        .data(Zeros, Zeros, VOCAB)
        .optimizer(OptimizerConfig { kind: OptimizerKind::Sgd, ..OptimizerConfig::default() })
        .out(folder)
        .callback(Tell(before))
        .fit()
        .unwrap();
}

#[test]
fn a_rank_starts_with_its_share_and_one_tensor() {
    let place = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let rank = |rank: usize| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_rank", "--ignored", "--nocapture", "--test-threads", "1"])
            .env(RANK, place.path().join("run"))
            .envs(
                [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", RANKS), ("LOCAL_WORLD_SIZE", RANKS)]
                    .map(|(name, value)| (name, value.to_string())),
            )
            .envs([("MASTER_ADDR", "127.0.0.1".to_string()), ("MASTER_PORT", port.to_string())])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let ranks: Vec<_> = (0..RANKS).map(rank).collect();
    for (rank, process) in ranks.into_iter().enumerate() {
        let output = process.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text
            .lines()
            .find(|line| line.contains("parameters "))
            .unwrap_or_else(|| panic!("{rank}: {text}"));
        let line = &line[line.find("parameters ").unwrap()..];
        let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let (parameters, bytes) = (numbers[0], numbers[1]);
        let (share, largest) = (4 * parameters / RANKS as u64, 4 * (VOCAB * SIZE.1) as u64);
        println!(
            "rank {rank}: {bytes} bytes at the start, its share is {share}, the largest tensor {largest}"
        );
        // Beside parameters a process takes some megabytes for its connections.
        let bound = (1.2 * share as f64) as u64 + largest;
        assert!(
            bytes < bound,
            "rank {rank} took {bytes} bytes: its share is {share}, the largest tensor {largest}"
        );
        assert!(bytes > share / 2, "rank {rank} took {bytes} bytes, less than its share of {share}");
    }
}
