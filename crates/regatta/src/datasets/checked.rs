//! Checks what a dataset returns before it reaches the model.

use super::dataset::Dataset;
use super::host_batch::HostBatch;
use crate::error::{Error, Result};
use crate::models::{IGNORED, Samples};
use std::sync::Arc;

/// A dataset whose batches are checked: they have the rows that were asked for, the shape that the model takes, and no
/// token or label beyond its classes. Otherwise a wrong batch would train a wrong model, and ranks with different batches
/// would drift apart.
pub(crate) struct Checked {
    inner: Arc<dyn Dataset>,
    samples: Samples,
    classes: usize,
}

impl Checked {
    /// Checks `inner` for a model that takes `samples` of `classes` tokens or classes.
    pub(crate) fn new(inner: Arc<dyn Dataset>, samples: Samples, classes: usize) -> Self {
        Self { inner, samples, classes }
    }
}

impl Dataset for Checked {
    fn len(&self) -> usize {
        self.inner.len()
    }

    fn tokens_per_sample(&self) -> usize {
        self.inner.tokens_per_sample()
    }

    fn batch(&self, epoch: u64, indices: &[usize]) -> Result<HostBatch> {
        let batch = self.inner.batch(epoch, indices)?;
        check(&batch, self.samples, self.classes, indices)
            .map_err(|problem| Error::data("batch", format!("epoch {epoch}: {problem}")))?;
        Ok(batch)
    }

    fn digest(&self) -> Result<u32> {
        self.inner.digest()
    }
}

fn check(batch: &HostBatch, samples: Samples, classes: usize, indices: &[usize]) -> Result<(), String> {
    let rows = indices.len();
    let len = |what: &str, found: usize, row: usize| {
        if found == rows * row {
            return Ok(());
        }
        Err(format!("{found} {what} were returned for {rows} samples of {row} each"))
    };
    let time = |what: &str, found: usize, most: usize| {
        if (1..=most).contains(&found) {
            return Ok(());
        }
        Err(format!("{what} of {found} tokens were returned, and the model takes 1 to {most}"))
    };
    let ids = |what: &str, ids: &[i64], row: usize, may_be_ignored: bool| {
        let known = |id: i64| (0..classes as i64).contains(&id) || (may_be_ignored && id == IGNORED);
        let Some(place) = ids.iter().position(|&id| !known(id)) else { return Ok(()) };
        let ignored = if may_be_ignored {
            format!(", and {IGNORED} where it does not count (models::IGNORED)")
        } else {
            String::new()
        };
        Err(format!(
            "sample {} has the {what} {}: the model takes 0 to {}{ignored}",
            indices[place / row],
            ids[place],
            classes.saturating_sub(1)
        ))
    };
    match (batch, samples) {
        (HostBatch::Text { inputs, targets, time: found }, Samples::Text { time: most }) => {
            time("samples", *found, most)?;
            len("inputs", inputs.len(), *found)?;
            len("targets", targets.len(), *found)?;
            ids("input", inputs, *found, false)?;
            ids("target", targets, *found, true)
        }
        (
            HostBatch::Pairs { sources, inputs, targets, source_time, time: found },
            Samples::Pairs { source_time: most_of_source, time: most },
        ) => {
            time("sources", *source_time, most_of_source)?;
            time("target sequences", *found, most)?;
            len("sources", sources.len(), *source_time)?;
            len("inputs", inputs.len(), *found)?;
            len("targets", targets.len(), *found)?;
            ids("source token", sources, *source_time, false)?;
            ids("input", inputs, *found, false)?;
            ids("target", targets, *found, true)
        }
        (HostBatch::Images { pixels, labels, shape }, Samples::Images { height, width, channels }) => {
            if *shape != [height, width, channels] {
                return Err(format!(
                    "images of {shape:?} (height, width, channels) were returned, and the model takes {:?}",
                    [height, width, channels]
                ));
            }
            len("pixels", pixels.len(), shape.iter().product())?;
            len("labels", labels.len(), 1)?;
            ids("label", labels, 1, true)
        }
        (found, wanted) => {
            let kind = match found {
                HostBatch::Text { .. } => "text",
                HostBatch::Pairs { .. } => "pairs",
                HostBatch::Images { .. } => "images",
            };
            Err(format!("a batch of {kind} was returned, and the model takes {wanted:?}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(inputs: &[i64], targets: &[i64], time: usize) -> HostBatch {
        HostBatch::Text { inputs: inputs.to_vec(), targets: targets.to_vec(), time }
    }

    fn images(labels: &[i64], pixels: usize, shape: [usize; 3]) -> HostBatch {
        HostBatch::Images { pixels: vec![0.0; pixels], labels: labels.to_vec(), shape }
    }

    #[test]
    fn a_batch_that_is_wrong_is_an_error_that_names_the_sample() {
        let samples = Samples::Text { time: 2 };
        let problem = |batch: &HostBatch| check(batch, samples, 10, &[7, 9]).unwrap_err();
        assert_eq!(check(&text(&[0, 1, 2, 9], &[IGNORED, 1, 2, 9], 2), samples, 10, &[7, 9]), Ok(()));
        assert!(
            problem(&text(&[0, 1], &[0, 1], 2)).contains("2 inputs were returned for 2 samples of 2 each")
        );
        assert!(problem(&text(&[0; 4], &[0; 3], 2)).contains("3 targets"));
        assert!(problem(&text(&[0; 6], &[0; 6], 3)).contains("samples of 3 tokens"));
        assert!(problem(&text(&[], &[], 0)).contains("samples of 0 tokens"));
        assert!(
            problem(&text(&[0, 1, 2, 10], &[0; 4], 2))
                .contains("sample 9 has the input 10: the model takes 0 to 9")
        );
        assert!(problem(&text(&[0, -1, 0, 0], &[0; 4], 2)).contains("sample 7 has the input -1"));
        let error = problem(&text(&[0; 4], &[0, -100, 0, 0], 2));
        assert!(
            error.contains("sample 7 has the target -100") && error.contains("-1 where it does not count"),
            "{error}"
        );
        assert!(problem(&images(&[0, 1], 8, [2, 2, 1])).contains("a batch of images was returned"));
    }

    #[test]
    fn images_have_the_shape_of_the_model() {
        let samples = Samples::Images { height: 2, width: 2, channels: 1 };
        let of = |batch: HostBatch| check(&batch, samples, 3, &[1, 2]);
        assert_eq!(of(images(&[2, IGNORED], 8, [2, 2, 1])), Ok(()));
        assert!(of(images(&[2, 3], 8, [2, 2, 1])).unwrap_err().contains("sample 2 has the label 3"));
        assert!(of(images(&[2, 1], 7, [2, 2, 1])).unwrap_err().contains("7 pixels"));
        assert!(of(images(&[2, 1], 8, [1, 2, 2])).unwrap_err().contains("the model takes [2, 2, 1]"));
    }
}
