//! What a person sees while data is prepared: warnings, and how far a long step is.

use indicatif::{ProgressBar, ProgressStyle};
use regatta::data::notice::Notice;
use std::io::{IsTerminal, Write};
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
            Notice::Warning(warning) => self.say(&format!("warning: {warning}")),
            Notice::Waiting { folder } => {
                self.say(&format!("waiting for another process that prepares {}", folder.display()));
            }
            Notice::Preparing { folder, others: 0 } => self.say(&format!("preparing {}", folder.display())),
            Notice::Preparing { folder, others } => self.say(&format!(
                "preparing {} beside {others} of other versions or settings; `regatta data list` shows them, `regatta data \
                 clean` removes what is out of date",
                folder.display()
            )),
            Notice::Progress { step, done, of } => self.progress(step, done, of),
        }
    }

    fn say(&self, line: &str) {
        // Nobody may be there to read it, which is no reason to stop.
        let write = || drop(writeln!(std::io::stderr(), "{line}"));
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
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
                self.bar = Some(bar);
            }
        }
        match &self.bar {
            Some(bar) => bar.set_position(done),
            None if self.said.elapsed() >= LINE_EVERY => {
                self.said = Instant::now();
                self.say(&format!("{step}: {} %", 100 * done / of.max(1)));
            }
            None => {}
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Preparing {
    fn drop(&mut self) {
        self.finish();
    }
}
