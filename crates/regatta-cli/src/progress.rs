//! Shows the progress of a run: a bar on a terminal, a line from time to time elsewhere.

use crate::out::{self, say};
use indicatif::{ProgressBar, ProgressStyle};
use regatta::train::{Callback, Flow, Job, Score, StepReport};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Time between lines if standard error is not a terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows a run on standard error.
pub struct Progress {
    bar: Option<ProgressBar>,
    steps: usize,
    begun: Instant,
    resumed_at: usize,
    last_line: Option<Instant>,
    unit: &'static str,
}

impl Progress {
    /// For a run of `steps` steps; `unit` is what its speed is counted in, tokens or samples.
    pub fn new(steps: usize, unit: &'static str) -> Self {
        Self { bar: None, steps, begun: Instant::now(), resumed_at: 0, last_line: None, unit }
    }

    /// Stops drawing the bar and leaves it on the terminal.
    pub fn finish(&self) {
        out::set_bar(None);
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}

impl Callback for Progress {
    fn announced(&mut self, message: &str) {
        say!("{message}");
    }

    fn started(&mut self, job: &Job, done: usize, parameters: usize) {
        let threads = if job.threads == 1 { "1 thread".into() } else { format!("{} threads", job.threads) };
        say!(
            "{:.2} M parameters, {} worker(s) over {} with {threads} each, {}",
            parameters as f64 / 1e6,
            job.plan.world(),
            job.world().transport(),
            job.plan
        );
        if done > 0 {
            say!("resuming after step {done}");
        }
        (self.resumed_at, self.begun) = (done, Instant::now());
        if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new(self.steps as u64).with_position(done as u64);
            // 80 columns leave room for the `^C` of Ctrl-C: a line that wraps would be drawn once more below.
            if let Ok(style) = ProgressStyle::with_template("{bar:16} {pos}/{len} {msg}") {
                bar.set_style(style);
            }
            out::set_bar(Some(bar.clone()));
            self.bar = Some(bar);
        }
    }

    fn step(&mut self, report: &StepReport) -> Flow {
        let pace = self.begun.elapsed().as_secs_f64() / (report.step - self.resumed_at).max(1) as f64;
        let left = pace * (self.steps - report.step) as f64;
        let message = format!(
            "loss {:.4}  {:.0} {}/s  {}:{:02} left",
            report.loss,
            report.tokens_per_s,
            self.unit,
            left as u64 / 60,
            left as u64 % 60
        );
        if let Some(bar) = &self.bar {
            bar.set_message(message);
            bar.set_position(report.step as u64);
        } else if self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY) || report.step == self.steps {
            self.last_line = Some(Instant::now());
            say!("step {}/{}  {message}", report.step, self.steps);
        }
        Flow::Continue
    }

    fn evaluated(&mut self, step: usize, score: &Score) -> Flow {
        let accuracy = score.accuracy.map_or(String::new(), |a| format!(", accuracy {:.2} %", 100.0 * a));
        let metrics = score.metrics.iter().map(|(name, value)| format!(", {name} {value:.4}"));
        say!("step {step}: validation loss {:.4}{accuracy}{}", score.loss, metrics.collect::<String>());
        Flow::Continue
    }

    fn warning(&mut self, message: &str) {
        say!("warning: {message}");
    }
}
