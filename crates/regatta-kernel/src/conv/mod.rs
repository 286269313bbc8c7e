//! Convolution of channels-last images, forward and backward, without an intermediate matrix of patches (im2col).
//!
//! The forward pass and both backward passes keep a tile of (images or inputs) x (vectors of outputs) in registers
//! and loop over taps and channels, as direct convolution does (Georganas et al. 2018, "Anatomy of High-Performance
//! Deep Learning Convolutions on SIMD Architectures"). A tile has the same position of several images, so the same
//! taps apply to all of it. Products with padding are therefore skipped, and so are positions that a stride skips in
//! the backward pass.
//!
//! ```
//! use regatta_kernel::conv::{Epilogue, Shape, forward};
//! // A 3x3 kernel of ones over one 2x2 image with one channel and a padding of 1.
//! let shape =
//!     Shape { images: 1, height: 2, width: 2, inputs: 1, outputs: 1, kernel: 3, stride: 1, padding: 1 };
//! let mut out = vec![0.0; shape.output_len()];
//! forward(&shape, &[1.0, 2.0, 3.0, 4.0], &[1.0; 9], Epilogue::default(), &mut out);
//! assert_eq!(out, [10.0; 4]);
//! ```

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
    /// Number of images.
    pub images: usize,
    /// Rows per image.
    pub height: usize,
    /// Columns per image.
    pub width: usize,
    /// Input channels.
    pub inputs: usize,
    /// Output channels.
    pub outputs: usize,
    /// Rows of the kernel, and its columns.
    pub kernel: usize,
    /// Distance between positions of the kernel, in rows and in columns; at least 1.
    pub stride: usize,
    /// Rows and columns of zeros around an image.
    pub padding: usize,
}

impl Shape {
    /// Positions of the kernel along an axis of `len`.
    fn positions(&self, len: usize) -> usize {
        (len + 2 * self.padding).checked_sub(self.kernel).map_or(0, |last| last / self.stride + 1)
    }

    /// Rows of the result.
    pub fn out_height(&self) -> usize {
        self.positions(self.height)
    }

    /// Columns of the result.
    pub fn out_width(&self) -> usize {
        self.positions(self.width)
    }

    /// Elements of the images.
    pub fn input_len(&self) -> usize {
        self.images * self.height * self.width * self.inputs
    }

    /// Elements of the result.
    pub fn output_len(&self) -> usize {
        self.images * self.out_height() * self.out_width() * self.outputs
    }

    /// Elements of the weights.
    pub fn weight_len(&self) -> usize {
        self.kernel * self.kernel * self.inputs * self.outputs
    }

    /// Floating-point operations of one pass, including those with padding.
    pub fn flops(&self) -> f64 {
        2.0 * self.output_len() as f64 * (self.kernel * self.kernel * self.inputs) as f64
    }

    /// For every position of the output along an image axis of `len`: the taps that are within the image, and the
    /// positions of the image that they multiply.
    fn taps_of_outputs(&self, len: usize) -> Vec<Vec<TapAt>> {
        let taps = |position: usize| {
            let at = |tap: usize| {
                Some(TapAt { tap, at: (position * self.stride + tap).checked_sub(self.padding)? })
            };
            (0..self.kernel).filter_map(at).filter(|tap| tap.at < len).collect()
        };
        (0..self.positions(len)).map(taps).collect()
    }

    /// For every position of the image along an axis of `len`: the taps that multiply it, and the positions of the
    /// output that they add to.
    fn taps_of_inputs(&self, len: usize) -> Vec<Vec<TapAt>> {
        let mut all = vec![vec![]; len];
        for (position, taps) in self.taps_of_outputs(len).into_iter().enumerate() {
            taps.into_iter().for_each(|TapAt { tap, at }| all[at].push(TapAt { tap, at: position }));
        }
        all
    }
}

/// Runs `job` on the best vector unit of the machine.
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

/// A tap of the kernel along one axis, and the position of the source that it multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct TapAt {
    tap: usize,
    at: usize,
}

/// What is done with each sum before it is stored: bias, then ReLU.
#[derive(Debug, Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// Added to each output channel, `[outputs]`.
    pub bias: Option<&'a [f32]>,
    /// Whether negative results become 0.
    pub relu: bool,
}

/// Writes the convolution of the images `x` with `weight` to `out`. [`Shape`] gives the layouts.
///
/// # Panics
/// If a slice does not have the length of the shape.
pub fn forward(shape: &Shape, x: &[f32], weight: &[f32], epilogue: Epilogue, out: &mut [f32]) {
    assert_eq!(
        (x.len(), out.len()),
        (shape.input_len(), shape.output_len()),
        "the number of elements for {shape:?}"
    );
    assert_eq!(weight.len(), shape.weight_len(), "the number of weights for {shape:?}");
    assert!(
        epilogue.bias.is_none_or(|bias| bias.len() == shape.outputs),
        "the length of the bias for {shape:?}"
    );
    Correlation {
        images: shape.images,
        source: [shape.height, shape.width, shape.inputs],
        target: [shape.out_height(), shape.out_width(), shape.outputs],
        rows: &shape.taps_of_outputs(shape.height),
        columns: &shape.taps_of_outputs(shape.width),
        kernel: shape.kernel,
        weights: Weights { values: weight, transposed: false },
        epilogue,
    }
    .run(x, out);
}

/// Backward: writes the gradient of the images to `out`, from the `gradient` of the result and `weight`.
///
/// # Panics
/// If a slice does not have the length of the shape.
pub fn by_input(shape: &Shape, gradient: &[f32], weight: &[f32], out: &mut [f32]) {
    assert_eq!(
        (out.len(), gradient.len()),
        (shape.input_len(), shape.output_len()),
        "the number of elements for {shape:?}"
    );
    assert_eq!(weight.len(), shape.weight_len(), "the number of weights for {shape:?}");
    Correlation {
        images: shape.images,
        source: [shape.out_height(), shape.out_width(), shape.outputs],
        target: [shape.height, shape.width, shape.inputs],
        rows: &shape.taps_of_inputs(shape.height),
        columns: &shape.taps_of_inputs(shape.width),
        kernel: shape.kernel,
        weights: Weights { values: weight, transposed: true },
        epilogue: Epilogue::default(),
    }
    .run(gradient, out);
}

/// Backward: writes the gradient of the weights to `out`, from the images `x` and the `gradient` of the result. With
/// `add` the gradient is added to `out`.
///
/// # Panics
/// If a slice does not have the length of the shape.
pub fn by_weight(shape: &Shape, x: &[f32], gradient: &[f32], add: bool, out: &mut [f32]) {
    assert_eq!(
        (x.len(), gradient.len()),
        (shape.input_len(), shape.output_len()),
        "the number of elements for {shape:?}"
    );
    assert_eq!(out.len(), shape.weight_len(), "the number of weights for {shape:?}");
    reduce::run(shape, x, gradient, add, out);
}
