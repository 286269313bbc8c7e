//! `losses.csv`: the training loss of every step. Lines are only appended, so the cost of a checkpoint does not depend
//! on the length of the run.

use crate::error::{Error, Result};
use crate::files::append_after;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

const NAME: &str = "losses.csv";
const HEADER: &str = "step,loss";

/// The file during a run. An error of writing, as a full disk, ends the file but not the run.
pub(super) struct Losses {
    path: PathBuf,
    file: Option<BufWriter<File>>,
}

impl Losses {
    /// Begins the file in `folder`, or continues it after step `done`. The second value is a warning.
    pub(super) fn open(folder: &Path, done: usize) -> (Self, Option<String>) {
        let path = folder.join(NAME);
        let keep = |line: &str| line == HEADER || parse(line).is_some_and(|(step, _)| step <= done);
        let opened = append_after(&path, |line| done > 0 && keep(line)).and_then(|(mut file, lines)| {
            if lines == 0 {
                writeln!(file, "{HEADER}")?;
            }
            Ok((file, lines))
        });
        match opened {
            Ok((file, lines)) => {
                let found = lines.saturating_sub(1);
                let problem = (found < done).then(|| {
                    format!(
                        "{}: the losses of {} of the first {done} steps are missing",
                        path.display(),
                        done - found
                    )
                });
                (Self { path, file: Some(BufWriter::new(file)) }, problem)
            }
            Err(error) => {
                let problem = format!("no {NAME}: {}", Error::io("open", &path)(error));
                (Self { path, file: None }, Some(problem))
            }
        }
    }

    /// Appends the loss of a step. Returns a warning for the first error, after which nothing is written.
    pub(super) fn add(&mut self, step: usize, loss: f64) -> Option<String> {
        self.write(|file| writeln!(file, "{step},{loss}"))
    }

    /// Writes buffered lines to the file. Returns a warning for the first error.
    pub(super) fn flush(&mut self) -> Option<String> {
        self.write(Write::flush)
    }

    fn write(&mut self, write: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>) -> Option<String> {
        let error = write(self.file.as_mut()?).err()?;
        // Without writing the rest of the buffer again.
        drop(self.file.take().map(BufWriter::into_parts));
        Some(format!("{} ends here: {error}", self.path.display()))
    }
}

fn parse(line: &str) -> Option<(usize, f64)> {
    let (step, loss) = line.split_once(',')?;
    Some((step.parse().ok()?, loss.parse().ok()?))
}

/// The training losses in the run folder `folder`, one per step from the first on.
///
/// # Errors
/// The file cannot be read, or a line is malformed.
pub fn read_losses(folder: &Path) -> Result<Vec<f64>> {
    let path = folder.join(NAME);
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let loss = |(index, line): (usize, &str)| {
        let problem = format!("cannot read {}: line {} is not a step and a loss", path.display(), index + 2);
        parse(line).map(|(_, loss)| loss).ok_or(Error::Usage(problem))
    };
    text.lines().skip(1).enumerate().map(loss).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn losses_come_back_to_the_last_bit(bits in prop::collection::vec(any::<u64>(), 1..40), cut in 0usize..40) {
            let place = tempfile::tempdir().unwrap();
            let (mut file, problem) = Losses::open(place.path(), 0);
            prop_assert!(problem.is_none());
            let all: Vec<f64> = bits.iter().map(|&bits| f64::from_bits(bits)).collect();
            for (index, &loss) in all.iter().enumerate() {
                prop_assert!(file.add(index + 1, loss).is_none());
            }
            drop(file);
            // Resumes at an earlier step.
            let done = cut.min(all.len());
            let (mut file, problem) = Losses::open(place.path(), done);
            prop_assert!(problem.is_none(), "{:?}", problem);
            for (index, &loss) in all.iter().enumerate().skip(done) {
                prop_assert!(file.add(index + 1, loss).is_none());
            }
            prop_assert!(file.flush().is_none());
            let back = read_losses(place.path()).unwrap();
            prop_assert_eq!(back.len(), all.len());
            for (a, b) in back.iter().zip(&all) {
                prop_assert!(a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()), "{} {}", a, b);
            }
        }
    }

    #[test]
    fn missing_losses_are_reported() {
        let place = tempfile::tempdir().unwrap();
        let (file, problem) = Losses::open(place.path(), 5);
        assert!(problem.unwrap().contains("the losses of 5 of the first 5 steps are missing"));
        drop(file);
        let (_, problem) = Losses::open(&place.path().join("none"), 0);
        assert!(problem.unwrap().contains("no losses.csv"));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_reported_once() {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut losses = Losses { path: "losses.csv".into(), file: Some(BufWriter::new(full)) };
        assert!(losses.add(1, 0.5).is_none());
        assert!(losses.flush().unwrap().contains("ends here: No space left"));
        assert!(losses.add(2, 0.5).is_none() && losses.flush().is_none());
    }
}
