//! Convolution of channels-last images, forward and backward, without an intermediate matrix of patches.
//!
//! All three passes keep a register tile of (images or inputs) x (vectors of outputs) and run over taps and channels; the
//! idea is that of direct convolution (Georganas et al. 2018, "Anatomy of High-Performance Deep Learning Convolutions on
//! SIMD Architectures"). A tile takes the same place of several images, so all of it meets the same taps and padding costs
//! nothing: what would be multiplied by zero is left out, and so is what a stride skips in the backward pass.

mod correlate;
mod pooled;
mod reduce;
mod scratch;
#[cfg(test)]
mod tests;

use correlate::{Correlation, Weights};
pub use pooled::{pooled, pooled_backward};

/// Shape of a convolution with a square kernel. Images are `[images, height, width, inputs]`, results
/// `[images, out_height, out_width, outputs]` and weights `[kernel, kernel, inputs, outputs]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Images.
    pub images: usize,
    /// Rows of an image.
    pub height: usize,
    /// Columns of an image.
    pub width: usize,
    /// Channels of an image.
    pub inputs: usize,
    /// Channels of the result.
    pub outputs: usize,
    /// Rows and columns of the kernel.
    pub kernel: usize,
    /// Rows and columns from one place of the kernel to the next.
    pub stride: usize,
    /// Rows and columns of zeros around an image.
    pub padding: usize,
}

impl Shape {
    fn places(&self, len: usize) -> usize {
        (len + 2 * self.padding).checked_sub(self.kernel).map_or(0, |room| room / self.stride + 1)
    }

    /// Rows of the result.
    pub fn out_height(&self) -> usize {
        self.places(self.height)
    }

    /// Columns of the result.
    pub fn out_width(&self) -> usize {
        self.places(self.width)
    }

    /// Numbers of the images.
    pub fn input_len(&self) -> usize {
        self.images * self.height * self.width * self.inputs
    }

    /// Numbers of the result.
    pub fn output_len(&self) -> usize {
        self.images * self.out_height() * self.out_width() * self.outputs
    }

    /// Numbers of the weights.
    pub fn weight_len(&self) -> usize {
        self.kernel * self.kernel * self.inputs * self.outputs
    }

    /// Floating-point operations of a pass, those with padding included.
    pub fn flops(&self) -> f64 {
        2.0 * self.output_len() as f64 * (self.kernel * self.kernel * self.inputs) as f64
    }

    /// For every place of the output along an axis of `len`: the taps that meet the image, and where.
    fn meeting(&self, len: usize) -> Vec<Vec<Meeting>> {
        let meets = |place: usize| {
            let at = |tap: usize| {
                Some(Meeting { tap, at: (place * self.stride + tap).checked_sub(self.padding)? })
            };
            (0..self.kernel).filter_map(at).filter(|meeting| meeting.at < len).collect()
        };
        (0..self.places(len)).map(meets).collect()
    }

    /// For every place of the image along an axis of `len`: the taps that met it, and at which place of the output.
    fn met(&self, len: usize) -> Vec<Vec<Meeting>> {
        let mut met = vec![vec![]; len];
        for (place, meetings) in self.meeting(len).into_iter().enumerate() {
            meetings.into_iter().for_each(|Meeting { tap, at }| met[at].push(Meeting { tap, at: place }));
        }
        met
    }
}

/// Runs `job` on the best vector unit that the machine has.
fn dispatch<J: pulp::WithSimd>(job: J) -> J::Output {
    #[cfg(test)]
    match tests::UNIT.get() {
        tests::Unit::Best => {}
        tests::Unit::None => return job.with_simd(pulp::Scalar::new()),
        #[cfg(target_arch = "x86_64")]
        tests::Unit::Avx2 => {
            if let Some(unit) = pulp::x86::V3::try_new() {
                return pulp::Simd::vectorize(unit, job);
            }
        }
    }
    pulp::Arch::new().dispatch(job)
}

/// A tap of the kernel, and the place that it meets along one axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Meeting {
    tap: usize,
    at: usize,
}

/// What is done with a sum before it is stored.
#[derive(Debug, Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// Added to each output channel, `[outputs]`.
    pub bias: Option<&'a [f32]>,
    /// Whether negative results become 0.
    pub relu: bool,
}

/// The convolution of `x` with `weight`, into `out`.
///
/// # Panics
/// Slices whose lengths are not the shape's.
pub fn forward(shape: &Shape, x: &[f32], weight: &[f32], epilogue: Epilogue, out: &mut [f32]) {
    assert_eq!((x.len(), out.len()), (shape.input_len(), shape.output_len()), "numbers of {shape:?}");
    assert_eq!(weight.len(), shape.weight_len(), "weights of {shape:?}");
    assert!(epilogue.bias.is_none_or(|bias| bias.len() == shape.outputs), "bias of {shape:?}");
    Correlation {
        images: shape.images,
        source: [shape.height, shape.width, shape.inputs],
        target: [shape.out_height(), shape.out_width(), shape.outputs],
        rows: &shape.meeting(shape.height),
        columns: &shape.meeting(shape.width),
        kernel: shape.kernel,
        weights: Weights { values: weight, transposed: false },
        epilogue,
    }
    .run(x, out);
}

/// The gradient of the images, into `out`, from that of the result.
///
/// # Panics
/// Slices whose lengths are not the shape's.
pub fn by_input(shape: &Shape, gradient: &[f32], weight: &[f32], out: &mut [f32]) {
    assert_eq!((out.len(), gradient.len()), (shape.input_len(), shape.output_len()), "numbers of {shape:?}");
    assert_eq!(weight.len(), shape.weight_len(), "weights of {shape:?}");
    Correlation {
        images: shape.images,
        source: [shape.out_height(), shape.out_width(), shape.outputs],
        target: [shape.height, shape.width, shape.inputs],
        rows: &shape.met(shape.height),
        columns: &shape.met(shape.width),
        kernel: shape.kernel,
        weights: Weights { values: weight, transposed: true },
        epilogue: Epilogue::default(),
    }
    .run(gradient, out);
}

/// The gradient of the weights, from the images and the gradient of the result: into `out`, or where `add` is set on top of
/// what is there.
///
/// # Panics
/// Slices whose lengths are not the shape's.
pub fn by_weight(shape: &Shape, x: &[f32], gradient: &[f32], add: bool, out: &mut [f32]) {
    assert_eq!((x.len(), gradient.len()), (shape.input_len(), shape.output_len()), "numbers of {shape:?}");
    assert_eq!(out.len(), shape.weight_len(), "weights of {shape:?}");
    reduce::run(shape, x, gradient, add, out);
}
