//! Gradients in fewer bytes: how numbers are encoded for the wire, and decoded and summed where they arrive.
//!
//! - [`half`]: 16 bits a number;
//! - [`blocks`]: 8 or 4 bits a number with a scale for each block, rounded up or down at random;
//! - [`sign`]: one bit a number;
//! - [`sparse`]: the largest numbers, or some at random, with their places;
//! - [`low_rank`]: a matrix as the product of two thin ones.
//!
//! All but the first two lose a part of the numbers for good. Their callers keep what was lost (the error) and add it to the
//! next numbers, so that nothing is lost in the long run (Seide et al. 2014, "1-Bit Stochastic Gradient Descent"; Stich
//! et al. 2018, "Sparsified SGD with Memory").
//!
//! A number that is not finite comes out as one that is not finite, so that whoever looks for such numbers finds it.

pub mod blocks;
pub mod half;
pub mod low_rank;
pub mod sign;
pub mod sparse;
