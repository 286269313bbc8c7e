//! CIFAR-10 in its binary version (Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images").

use crate::error::{Error, Result};
use crate::random::Stream;
use std::fs;
use std::path::{Path, PathBuf};

/// Width and height in pixels.
pub const SIDE: usize = 32;
/// Red, green and blue.
pub const CHANNELS: usize = 3;
/// Classes.
pub const CLASSES: usize = 10;
/// Bytes of an image: the pixels of one channel after the other.
const PIXELS: usize = CHANNELS * SIDE * SIDE;
/// Mean and standard deviation of each channel's training pixels, for normalisation.
const MEAN: [f32; CHANNELS] = [0.4914, 0.4822, 0.4465];
const DEVIATION: [f32; CHANNELS] = [0.2470, 0.2435, 0.2616];

/// Images with their labels.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Images {
    /// The label and the pixels of each image, as in the files.
    records: Vec<u8>,
}

impl Images {
    /// Reads the training images (`data_batch_*.bin`) and the held-out ones (`test_batch.bin`) in `folder`, or in its
    /// folder `cifar-10-batches-bin`, which is the name in the archive.
    ///
    /// # Errors
    /// A file is missing or has other content.
    pub fn read(folder: &Path) -> Result<[Self; 2]> {
        let inner = folder.join("cifar-10-batches-bin");
        let folder = if inner.is_dir() { inner } else { folder.to_path_buf() };
        let missing = |what: &str| {
            let problem =
                format!("has no {what}: unpack CIFAR-10's binary version (cifar-10-binary.tar.gz) there");
            Error::data(&folder, problem)
        };
        let entries = fs::read_dir(&folder).map_err(|_| missing("data_batch_1.bin"))?;
        let name = |path: &PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
        let is_batch = |path: &PathBuf| {
            name(path).is_some_and(|name| name.starts_with("data_batch_") && name.ends_with(".bin"))
        };
        let mut batches: Vec<PathBuf> =
            entries.flatten().map(|entry| entry.path()).filter(is_batch).collect();
        batches.sort();
        if batches.is_empty() {
            return Err(missing("data_batch_1.bin"));
        }
        let test = folder.join("test_batch.bin");
        if !test.is_file() {
            return Err(missing("test_batch.bin"));
        }
        let mut train = vec![];
        for batch in &batches {
            train.extend(read_records(batch)?);
        }
        Ok([Self { records: train }, Self { records: read_records(&test)? }])
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.records.len() / (1 + PIXELS)
    }

    /// The class of the image at `index`.
    pub fn label(&self, index: usize) -> u8 {
        self.records[index * (1 + PIXELS)]
    }

    /// Appends the image at `index`, `[32, 32, 3]` and normalised, to `out`. With `shift` above 0, `noise` decides by
    /// how many pixels, up to `shift` in each direction, the image is moved, and whether it is mirrored.
    pub fn fill(&self, index: usize, shift: usize, noise: Stream, out: &mut Vec<f32>) {
        let pixels = &self.records[index * (1 + PIXELS) + 1..][..PIXELS];
        let moved = |n: u64| (noise.bits(n) % (2 * shift as u64 + 1)) as usize;
        let (dx, dy, mirrored) =
            if shift > 0 { (moved(0), moved(1), noise.bits(2) % 2 == 1) } else { (0, 0, false) };
        for y in 0..SIDE {
            for x in 0..SIDE {
                let x = if mirrored { SIDE - 1 - x } else { x };
                // Shifted by dx - shift and dy - shift; pixels from outside have the mean value.
                let (from_x, from_y) = ((x + shift).wrapping_sub(dx), (y + shift).wrapping_sub(dy));
                let inside = from_x < SIDE && from_y < SIDE;
                for channel in 0..CHANNELS {
                    let value = || f32::from(pixels[(channel * SIDE + from_y) * SIDE + from_x]) / 255.0;
                    let centred = if inside { value() - MEAN[channel] } else { 0.0 };
                    out.push(centred / DEVIATION[channel]);
                }
            }
        }
    }
}

fn read_records(path: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    check_records(&bytes).map_err(|problem| Error::data(path, problem))?;
    Ok(bytes)
}

pub(crate) fn check_records(bytes: &[u8]) -> Result<(), String> {
    if bytes.is_empty() || !bytes.len().is_multiple_of(1 + PIXELS) {
        return Err(format!(
            "is truncated or not binary CIFAR-10: {} bytes are not a multiple of the {} bytes of a record",
            bytes.len(),
            1 + PIXELS
        ));
    }
    let labels = bytes.iter().step_by(1 + PIXELS);
    match labels.into_iter().find(|label| usize::from(**label) >= CLASSES) {
        Some(label) => Err(format!("has a label {label}, but CIFAR-10 has {CLASSES} classes")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(label: u8, first: u8) -> Vec<u8> {
        std::iter::once(label).chain((0..PIXELS).map(|i| first.wrapping_add((i % 7) as u8))).collect()
    }

    #[test]
    fn files_are_sorted_and_pixels_are_channels_last() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("cifar-10-batches-bin");
        fs::create_dir(&inner).unwrap();
        fs::write(inner.join("data_batch_2.bin"), record(3, 0)).unwrap();
        fs::write(inner.join("data_batch_1.bin"), [record(1, 9), record(2, 8)].concat()).unwrap();
        fs::write(inner.join("test_batch.bin"), record(4, 0)).unwrap();
        let [train, test] = Images::read(folder.path()).unwrap();
        assert_eq!((train.len(), test.len()), (3, 1));
        assert_eq!([0, 1, 2].map(|i| train.label(i)), [1, 2, 3]);
        let mut out = vec![];
        test.fill(0, 0, Stream::new(0), &mut out);
        assert_eq!(out.len(), PIXELS);
        // The second pixel consists of the second value of each channel's plane.
        for channel in 0..CHANNELS {
            let value = ((channel * SIDE * SIDE + 1) % 7) as f32 / 255.0;
            let wanted = (value - MEAN[channel]) / DEVIATION[channel];
            assert!((out[CHANNELS + channel] - wanted).abs() < 1e-6);
        }
    }

    #[test]
    fn damaged_files_say_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let problem = || Images::read(folder.path()).unwrap_err().to_string();
        assert!(problem().contains("has no data_batch_1.bin"), "{}", problem());
        let batch = folder.path().join("data_batch_1.bin");
        fs::write(&batch, record(1, 0)).unwrap();
        assert!(problem().contains("has no test_batch.bin"));
        fs::write(folder.path().join("test_batch.bin"), record(1, 0)).unwrap();
        fs::write(&batch, &record(1, 0)[1..]).unwrap();
        assert!(problem().contains("truncated") && problem().contains("data_batch_1.bin"));
        fs::write(&batch, record(10, 0)).unwrap();
        assert!(problem().contains("label 10"));
        assert!(Images::read(&folder.path().join("nowhere")).is_err());
    }

    #[test]
    fn shifts_and_mirrors_keep_the_size() {
        let images = Images { records: record(0, 100) };
        let mut seen = std::collections::BTreeSet::new();
        for n in 0..50 {
            let mut out = vec![];
            images.fill(0, 2, Stream::new(n), &mut out);
            assert_eq!(out.len(), PIXELS);
            seen.insert(out.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
        }
        assert!(seen.len() > 20);
    }
}
