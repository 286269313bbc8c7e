//! What a person sees while data is prepared: warnings, and how far a long step is.

use crate::out::{self, say};
use indicatif::{ProgressBar, ProgressStyle};
use regatta::data::notice::Notice;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Time between lines where there is no terminal; nothing is said of what takes less.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows the preparation of data on standard error.
pub struct Preparing {
    bar: Option<ProgressBar>,
    step: &'static str,
    said: Instant,
}

impl Preparing {
    pub fn new() -> Self {
        Self { bar: None, step: "", said: Instant::now() }
    }

    /// Tells what `notice` is about.
    pub fn hear(&mut self, notice: Notice<'_>) {
        match notice {
            Notice::Warning(warning) => say!("warning: {warning}"),
            Notice::Waiting { folder } => {
                say!("waiting for another process that prepares {}", folder.display());
            }
            Notice::Preparing { folder, others: 0 } => say!("preparing {}", folder.display()),
            Notice::Preparing { folder, others } => say!(
                "preparing {} beside {others} of other versions or settings; `regatta data list` shows them, `regatta \
                 data clean` removes what is out of date",
                folder.display()
            ),
            Notice::Progress { step, done, of } => self.progress(step, done, of),
        }
    }

    fn progress(&mut self, step: &'static str, done: u64, of: u64) {
        if self.step != step {
            self.finish();
            (self.step, self.said) = (step, Instant::now());
            if std::io::stderr().is_terminal() {
                let bar = ProgressBar::new(of).with_message(step);
                if let Ok(style) = ProgressStyle::with_template("{bar:28} {percent} % {msg}") {
                    bar.set_style(style);
                }
                out::above(Some(bar.clone()));
                self.bar = Some(bar);
            }
        }
        match &self.bar {
            Some(bar) => bar.set_position(done),
            None if self.said.elapsed() >= LINE_EVERY => {
                self.said = Instant::now();
                say!("{step}: {} %", 100 * done / of.max(1));
            }
            None => {}
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            out::above(None);
            bar.finish_and_clear();
        }
    }
}

impl Drop for Preparing {
    fn drop(&mut self) {
        self.finish();
    }
}
