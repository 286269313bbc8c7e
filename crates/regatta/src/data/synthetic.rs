//! Images that need no files. Each is a smooth pattern of its class with noise, generated on demand from (seed,
//! index).

use crate::random::Stream;

/// Waves in a channel of a pattern.
const WAVES: u64 = 4;
/// Amplitude of the uniform noise; the standard deviation of a pattern is about 1.
const NOISE: f32 = 2.0;
/// Most periods of a wave along a side.
const MOST_PERIODS: f32 = 3.0;

/// The patterns of all classes.
#[derive(Debug, Clone)]
pub struct Patterns {
    /// `[classes, side, side, channels]`
    patterns: Vec<f32>,
    pixels: usize,
    classes: usize,
    stream: Stream,
}

impl Patterns {
    /// `classes` patterns of `side` x `side` pixels.
    pub fn new(seed: u64, classes: usize, side: usize, channels: usize) -> Self {
        let stream = Stream::new(seed).named("synthetic");
        let mut patterns = Vec::with_capacity(classes * side * side * channels);
        for class in 0..classes {
            let waves = stream.named("waves").at(class as u64);
            for y in 0..side {
                for x in 0..side {
                    for channel in 0..channels {
                        let wave = |index: u64| {
                            let wave = waves.at(channel as u64).at(index);
                            // Periods per pixel, in either direction.
                            let frequency =
                                |n: u64| (2.0 * MOST_PERIODS * wave.uniform(n) - MOST_PERIODS) / side as f32;
                            let phase = frequency(0) * x as f32 + frequency(1) * y as f32 + wave.uniform(2);
                            (std::f32::consts::TAU * phase).sin()
                        };
                        patterns.push((0..WAVES).map(wave).sum::<f32>() / (WAVES as f32 / 2.0).sqrt());
                    }
                }
            }
        }
        Self { patterns, pixels: side * side * channels, classes, stream }
    }

    /// The class of sample `index` of the set `name`.
    pub fn label(&self, name: &str, index: usize) -> usize {
        (self.stream.named(name).named("label").bits(index as u64) % self.classes.max(1) as u64) as usize
    }

    /// Appends the image of sample `index` of the set `name`, `[side, side, channels]`, to `out`.
    pub fn fill(&self, name: &str, index: usize, out: &mut Vec<f32>) {
        let pattern = &self.patterns[self.label(name, index) * self.pixels..][..self.pixels];
        let noise = self.stream.named(name).at(index as u64);
        for (block, pattern) in pattern.chunks(4).enumerate() {
            let bits = noise.bits(block as u64);
            // Four values, uniform in [-1, 1).
            out.extend(pattern.iter().enumerate().map(|(i, value)| {
                let number = (bits >> (16 * i)) as u16;
                value + NOISE * (f32::from(number) / 32768.0 - 1.0)
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_depend_on_seed_set_and_index_alone() {
        let patterns = Patterns::new(7, 5, 6, 3);
        let image = |patterns: &Patterns, name: &str, index: usize| {
            let mut out = vec![];
            patterns.fill(name, index, &mut out);
            out
        };
        let one = image(&patterns, "train", 3);
        assert_eq!(one.len(), 108);
        assert_eq!(one, image(&Patterns::new(7, 5, 6, 3), "train", 3));
        assert_ne!(one, image(&patterns, "train", 4));
        assert_ne!(one, image(&patterns, "val", 3));
        assert_ne!(one, image(&Patterns::new(8, 5, 6, 3), "train", 3));
    }

    #[test]
    fn an_image_is_nearest_to_its_own_pattern() {
        let patterns = Patterns::new(1, 10, 16, 3);
        let mut counts = [0; 10];
        for index in 0..200 {
            let mut out = vec![];
            patterns.fill("train", index, &mut out);
            let distance = |class: usize| -> f32 {
                let pattern = &patterns.patterns[class * out.len()..][..out.len()];
                pattern.iter().zip(&out).map(|(a, b)| (a - b).powi(2)).sum()
            };
            let nearest = (0..10).min_by(|a, b| distance(*a).total_cmp(&distance(*b))).unwrap();
            assert_eq!(nearest, patterns.label("train", index));
            counts[nearest] += 1;
        }
        assert!(counts.iter().all(|count| *count > 5), "{counts:?}");
    }
}
