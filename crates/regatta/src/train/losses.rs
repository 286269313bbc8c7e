//! `losses.csv`: the training loss of every step. It only grows, so that a checkpoint costs the same however long a run is.

use crate::error::{Error, Result};
use crate::files::append_after;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

const NAME: &str = "losses.csv";
const HEAD: &str = "step,loss";

/// The file while a run writes it. A disk that is full costs lines, not the run.
pub(super) struct Losses {
    path: PathBuf,
    file: Option<BufWriter<File>>,
}

impl Losses {
    /// Begins the file in `folder`, or goes on after step `done`. What is wrong is said in the second part.
    pub(super) fn open(folder: &Path, done: usize) -> (Self, Option<String>) {
        let path = folder.join(NAME);
        let keep = |line: &str| line == HEAD || parse(line).is_some_and(|(step, _)| step <= done);
        let opened = append_after(&path, |line| done > 0 && keep(line)).and_then(|(mut file, lines)| {
            if lines == 0 {
                writeln!(file, "{HEAD}")?;
            }
            Ok((file, lines))
        });
        match opened {
            Ok((file, lines)) => {
                let there = lines.saturating_sub(1);
                let problem = (there < done).then(|| {
                    format!(
                        "{}: the losses of {} of the first {done} steps are not there",
                        path.display(),
                        done - there
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

    /// Adds the loss of a step. What is wrong is said once; then the file ends.
    pub(super) fn add(&mut self, step: usize, loss: f64) -> Option<String> {
        self.write(|file| writeln!(file, "{step},{loss}"))
    }

    /// Gives what was added to the system.
    pub(super) fn flush(&mut self) -> Option<String> {
        self.write(Write::flush)
    }

    fn write(&mut self, write: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>) -> Option<String> {
        let error = write(self.file.as_mut()?).err()?;
        // What is still in the buffer is not tried again.
        drop(self.file.take().map(BufWriter::into_parts));
        Some(format!("{} ends here: {error}", self.path.display()))
    }
}

fn parse(line: &str) -> Option<(usize, f64)> {
    let (step, loss) = line.split_once(',')?;
    Some((step.parse().ok()?, loss.parse().ok()?))
}

/// The training losses in the run folder `folder`, from the first step on, as far as they are there.
///
/// # Errors
/// A file that cannot be read, or that holds something else.
pub fn read_losses(folder: &Path) -> Result<Vec<f64>> {
    let path = folder.join(NAME);
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let loss = |(index, line): (usize, &str)| {
        let problem = format!("cannot read {}: line {} is no step and loss", path.display(), index + 2);
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
            // Taken back to an earlier step, and gone on from there.
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
    fn what_is_missing_is_told() {
        let place = tempfile::tempdir().unwrap();
        let (file, problem) = Losses::open(place.path(), 5);
        assert!(problem.unwrap().contains("the losses of 5 of the first 5 steps are not there"));
        drop(file);
        let (_, problem) = Losses::open(&place.path().join("none"), 0);
        assert!(problem.unwrap().contains("no losses.csv"));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_told_once() {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut losses = Losses { path: "losses.csv".into(), file: Some(BufWriter::new(full)) };
        assert!(losses.add(1, 0.5).is_none());
        assert!(losses.flush().unwrap().contains("ends here: No space left"));
        assert!(losses.add(2, 0.5).is_none() && losses.flush().is_none());
    }
}
