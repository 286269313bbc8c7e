//! Fused training kernels: forward and backward passes of the operations of a model, on slices of `f32`.
//!
//! The crate has no tensor type, no computation graph and no models: a caller passes slices and sizes. Every kernel
//! makes one pass over its data, or a few. It is compiled for several vector units, and the best that the processor
//! has is chosen at run time. Large inputs are divided among the threads of the current `rayon` pool. The order of
//! summation depends only on the sizes, so results do not depend on the number of threads.
//!
//! Tensors are row-major. A shape in the documentation, as `[rows, width]`, gives the order of the slice's elements.
//! Slices must have the lengths of their shapes; kernels that check this panic if they do not.
//!
//! ```
//! use regatta_kernel::norm::{Norm, forward};
//! // Layer norm of one row of two elements.
//! let norm = Norm { centred: true, eps: 0.0 };
//! let (y, moments) = forward(norm, &[1.0, 3.0], &[1.0, 1.0], None);
//! assert_eq!((y, moments), (vec![-1.0, 1.0], vec![[2.0, 1.0]]));
//! ```

pub mod activation;
pub mod attention;
pub mod batch_norm;
pub mod bias;
pub mod compress;
pub mod conv;
pub mod dropout;
pub mod embedding;
pub mod loss;
pub mod math;
pub mod matmul;
pub mod norm;
pub mod optimizer;
mod parallel;
pub mod peak;
pub mod pool;
pub mod random;
mod simd;
mod uninit;

#[cfg(test)]
mod testing;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;
