//! `metrics.jsonl`, which grows while a run goes on.

use super::evaluate::Score;
use super::run::{Job, Observer, StepReport};
use crate::checkpoint;
use crate::error::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};

/// `metrics.jsonl`: a line a logged step. A disk that is full costs lines, not the run.
pub(super) struct Metrics {
    file: Option<File>,
}

impl Metrics {
    /// Begins the file anew, or keeps the lines up to step `done` of a run that is resumed.
    pub(super) fn open(job: &Job, done: usize, observer: &mut dyn Observer) -> Result<Self> {
        let path = job.out.join("metrics.jsonl");
        let step = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok()?["step"].as_u64();
        let kept: Vec<String> = match File::open(&path) {
            Ok(file) if done > 0 => BufReader::new(file)
                .lines()
                .map_while(std::io::Result::ok)
                .filter(|line| step(line).is_some_and(|step| step <= done as u64))
                .collect(),
            _ => vec![],
        };
        let mut text = kept.join("\n");
        if !text.is_empty() {
            text.push('\n');
        }
        let opened = checkpoint::write_atomically(&path, text.as_bytes())
            .and_then(|()| OpenOptions::new().append(true).open(&path).map_err(Error::io("open", &path)));
        match opened {
            Ok(file) => Ok(Self { file: Some(file) }),
            Err(error) => {
                observer.warning(&format!("no metrics.jsonl: {error}"));
                Ok(Self { file: None })
            }
        }
    }

    pub(super) fn log(&mut self, report: &StepReport, observer: &mut dyn Observer) {
        self.line(serde_json::to_string(report), observer);
    }

    pub(super) fn log_score(&mut self, step: usize, score: Score, observer: &mut dyn Observer) {
        let mut line = serde_json::json!({ "step": step, "val_loss": score.loss });
        if let Some(accuracy) = score.accuracy {
            line["val_accuracy"] = accuracy.into();
        }
        self.line(Ok(line.to_string()), observer);
    }

    fn line(&mut self, line: serde_json::Result<String>, observer: &mut dyn Observer) {
        let Some(file) = &mut self.file else { return };
        let written = line.map_err(std::io::Error::from).and_then(|line| writeln!(file, "{line}"));
        if let Err(error) = written {
            observer.warning(&format!("metrics.jsonl ends here: {error}"));
            self.file = None;
        }
    }
}
