//! Measures the peak rates of the machine: of multiply-adds in registers, and of copying memory.

use pulp::{Arch, Simd, WithSimd};
use std::hint::black_box;
use std::time::Instant;

/// Independent sums. There are more than the latency of a multiply-add times the multiply-adds that start per cycle,
/// and fewer than registers.
const SUMS: usize = 12;

/// Seconds that a measurement of operations takes.
const MEASURING_S: f64 = 0.01;
/// Elements that are copied: 64 MiB.
const COPIED: usize = 16 << 20;

/// `rounds` multiply-adds of [`SUMS`] vectors.
struct MultiplyAdds {
    rounds: usize,
}

impl WithSimd for MultiplyAdds {
    /// The number of floating-point operations, and the time in seconds that they took.
    type Output = (f64, f64);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> (f64, f64) {
        // Sums stay near 1, because infinite and subnormal numbers may be slower.
        let (scale, shift) = (simd.splat_f32s(black_box(0.999)), simd.splat_f32s(black_box(0.001)));
        let mut sums = [simd.splat_f32s(black_box(1.0)); SUMS];
        let begun = Instant::now();
        for _ in 0..self.rounds {
            for sum in &mut sums {
                *sum = simd.mul_add_f32s(*sum, scale, shift);
            }
        }
        let sums = black_box(sums);
        let took = begun.elapsed().as_secs_f64();
        black_box(sums);
        let lanes = size_of::<S::f32s>() / size_of::<f32>();
        ((2 * lanes * SUMS * self.rounds) as f64, took)
    }
}

/// The most f32 operations per second that the current thread reaches. A multiply-add counts as two. The measurement
/// takes about 10 ms.
pub fn flops_per_s_of_thread() -> f64 {
    let mut best = 0.0f64;
    let begun = Instant::now();
    // The best of several short runs, because the clock rate changes and other programs may use the processor.
    while begun.elapsed().as_secs_f64() < MEASURING_S {
        let (flops, took) = Arch::new().dispatch(MultiplyAdds { rounds: 20_000 });
        best = best.max(flops / took.max(1e-9));
    }
    best
}

/// The most f32 operations per second that the threads of the current `rayon` pool reach together. A multiply-add
/// counts as two. The measurement takes about 10 ms.
pub fn flops_per_s() -> f64 {
    match rayon::current_num_threads() {
        1 => flops_per_s_of_thread(),
        _ => rayon::broadcast(|_| flops_per_s_of_thread()).iter().sum(),
    }
}

/// The most bytes per second that the current thread reads and writes, both counted, when it copies more memory than
/// caches hold.
pub fn bytes_per_s() -> f64 {
    let from = vec![1.0f32; COPIED];
    let mut to = vec![0.0f32; from.len()];
    let once = |to: &mut [f32]| {
        let begun = Instant::now();
        to.copy_from_slice(black_box(&from));
        black_box(to);
        begun.elapsed().as_secs_f64()
    };
    let best = (0..5).map(|_| once(&mut to)).fold(f64::INFINITY, f64::min);
    (2 * size_of_val(&from[..])) as f64 / best
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_machine_computes_and_copies() {
        // Every machine that runs this test is faster, also an emulated one.
        assert!(super::flops_per_s() > 1e6);
        assert!(super::bytes_per_s() > 1e6);
    }
}
