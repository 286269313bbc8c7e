//! Shows warnings and progress while data is prepared.

use crate::out::{self, say};
use indicatif::{ProgressBar, ProgressStyle};
use regatta::data::notice::Notice;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Time between lines if standard error is not a terminal. Shorter steps print no line.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows the preparation of data on standard error.
pub struct Preparing {
    bar: Option<ProgressBar>,
    step: &'static str,
    last_line: Instant,
}

impl Preparing {
    pub fn new() -> Self {
        Self { bar: None, step: "", last_line: Instant::now() }
    }

    /// Shows `notice`.
    pub fn show(&mut self, notice: Notice<'_>) {
        match notice {
            Notice::Warning(warning) => say!("warning: {warning}"),
            Notice::Waiting { folder } => {
                say!("waiting for another process that prepares {}", folder.display());
            }
            Notice::Preparing { folder, others: 0 } => say!("preparing {}", folder.display()),
            Notice::Preparing { folder, others } => say!(
                "preparing {}; {others} folder(s) of other versions or settings exist: `regatta data list` shows them, \
                 `regatta data clean` removes what is out of date",
                folder.display()
            ),
            Notice::Progress { step, done, of } => self.progress(step, done, of),
        }
    }

    fn progress(&mut self, step: &'static str, done: u64, of: u64) {
        if self.step != step {
            self.finish();
            (self.step, self.last_line) = (step, Instant::now());
            if std::io::stderr().is_terminal() {
                let bar = ProgressBar::new(of).with_message(step);
                if let Ok(style) = ProgressStyle::with_template("{bar:28} {percent} % {msg}") {
                    bar.set_style(style);
                }
                out::set_bar(Some(bar.clone()));
                self.bar = Some(bar);
            }
        }
        match &self.bar {
            Some(bar) => bar.set_position(done),
            None if self.last_line.elapsed() >= LINE_EVERY => {
                self.last_line = Instant::now();
                say!("{step}: {} %", 100 * done / of.max(1));
            }
            None => {}
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            out::set_bar(None);
            bar.finish_and_clear();
        }
    }
}

impl Drop for Preparing {
    fn drop(&mut self) {
        self.finish();
    }
}
