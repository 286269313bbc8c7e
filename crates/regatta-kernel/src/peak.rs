//! What the machine could do at best: the rate of multiply-adds that never leave their registers, and of copying.

use pulp::{Arch, Simd, WithSimd};
use std::hint::black_box;
use std::time::Instant;

/// Sums side by side: more than the latency of a multiply-add times those begun in a cycle, less than the registers.
const SUMS: usize = 12;

struct MultiplyAdds {
    rounds: usize,
}

impl WithSimd for MultiplyAdds {
    /// Floating-point operations done, and the time that they took in seconds.
    type Output = (f64, f64);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> (f64, f64) {
        // Near 1 for ever, so that no sum becomes infinite or too small to be fast.
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

/// Most f32 operations a second that this thread reaches, a multiply-add counted as two. Takes about 10 ms.
pub fn flops_per_s_of_thread() -> f64 {
    let mut best = 0.0f64;
    let begun = Instant::now();
    // The best of short runs: the processor changes its pace, and others may use it.
    while begun.elapsed().as_secs_f64() < 0.01 {
        let (flops, took) = Arch::new().dispatch(MultiplyAdds { rounds: 20_000 });
        best = best.max(flops / took.max(1e-9));
    }
    best
}

/// Most f32 operations a second that the threads of the current pool reach together.
pub fn flops_per_s() -> f64 {
    match rayon::current_num_threads() {
        1 => flops_per_s_of_thread(),
        _ => rayon::broadcast(|_| flops_per_s_of_thread()).iter().sum(),
    }
}

/// Most bytes a second that this thread reads and writes, counted both, when it copies more than caches hold.
pub fn bytes_per_s() -> f64 {
    let from = vec![1.0f32; 16 << 20];
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
        // Anything that runs this does more than a hundred million of each a second.
        assert!(super::flops_per_s() > 1e8);
        assert!(super::bytes_per_s() > 1e8);
    }
}
