//! Fused training kernels: forward and backward of what a model does beside its matrix products, on slices of `f32`.
//!
//! Knows numbers and their layout; no tensors, no graphs, no models. Every kernel is one pass (or few) over its data,
//! compiled for several vector units, of which the machine's best is taken at run time. Large inputs are
//! shared out among the threads of the current `rayon` pool in parts whose bounds depend on the sizes alone, so results
//! do not depend on the number of threads.
//!
//! Tensors are row-major; a shape in the documentation as `[rows, width]` is the order of the slice's elements.

pub mod activation;
pub mod attention;
pub mod batch_norm;
pub mod bias;
pub mod conv;
pub mod dropout;
pub mod embedding;
mod fresh;
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

#[cfg(test)]
mod testing;
