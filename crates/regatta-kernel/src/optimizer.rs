//! Optimizer updates, each in one pass over parameters, gradients and moments, in place.
//!
//! The slices of a call must have the same length; elements that only some of them have are not updated.

use crate::simd::vectorized;

/// The constants of one AdamW update, at step `t` (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization",
/// algorithm 2).
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Factor for the gradients, applied first (for clipping).
    pub scale: f32,
    /// Factor for the parameters: `1 - lr * weight_decay`.
    pub decay: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Step size with bias correction: `lr / (1 - beta1^t)`.
    pub step: f32,
    /// Bias correction of the root of the second moment: `1 / sqrt(1 - beta2^t)`.
    pub root: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
}

vectorized! {
    /// An AdamW update of `parameters` and of the moments `first` and `second`.
    pub fn adamw(parameters: &mut [f32], gradients: &[f32], first: &mut [f32], second: &mut [f32], rule: AdamW) {
        let rest1 = 1.0 - rule.beta1;
        let rest2 = 1.0 - rule.beta2;
        let state = first.iter_mut().zip(second);
        for ((p, g), (m, v)) in parameters.iter_mut().zip(gradients).zip(state) {
            let g = g * rule.scale;
            *m = rule.beta1 * *m + rest1 * g;
            *v = rule.beta2 * *v + rest2 * g * g;
            *p = *p * rule.decay - rule.step * *m / (v.sqrt() * rule.root + rule.eps);
        }
    }
}

vectorized! {
    /// An update of stochastic gradient descent: `p = p * decay - lr * scale * g`.
    pub fn sgd(parameters: &mut [f32], gradients: &[f32], scale: f32, decay: f32, lr: f32) {
        for (p, g) in parameters.iter_mut().zip(gradients) {
            *p = *p * decay - lr * (g * scale);
        }
    }
}

vectorized! {
    /// An update of gradient descent with momentum `mu`: `v = mu * v + scale * g`, then `p = p * decay - lr * v`.
    pub fn momentum(
        parameters: &mut [f32], gradients: &[f32], velocity: &mut [f32], scale: f32, decay: f32, mu: f32, lr: f32,
    ) {
        for ((p, g), v) in parameters.iter_mut().zip(gradients).zip(velocity) {
            *v = mu * *v + g * scale;
            *p = *p * decay - lr * *v;
        }
    }
}

vectorized! {
    /// The sum of the squares of `values`, in f64.
    pub fn sum_of_squares(values: &[f32]) -> f64 {
        // Several independent sums can be vectorised, and are more precise than one.
        const LANES: usize = 16;
        let mut sums = [0.0f64; LANES];
        let chunks = values.chunks_exact(LANES);
        let rest: f64 = chunks.remainder().iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        for chunk in chunks {
            for (sum, &x) in sums.iter_mut().zip(chunk) {
                *sum += f64::from(x) * f64::from(x);
            }
        }
        sums.iter().sum::<f64>() + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{close, to_f64, values};
    use proptest::prelude::*;

    fn reference_adamw(p: &mut f64, g: f64, m: &mut f64, v: &mut f64, t: i32, lr: f64, decay: f64) {
        let (b1, b2, eps) = (0.9, 0.99, 1e-8);
        *m = b1 * *m + (1.0 - b1) * g;
        *v = b2 * *v + (1.0 - b2) * g * g;
        let (mh, vh) = (*m / (1.0 - b1.powi(t)), *v / (1.0 - b2.powi(t)));
        *p -= lr * decay * *p + lr * mh / (vh.sqrt() + eps);
    }

    proptest! {
        #[test]
        fn adamw_agrees_with_the_paper_in_f64(
            gradients in prop::collection::vec(-3.0f64..3.0, 1..40), start in -2.0f64..2.0,
        ) {
            let (mut p, mut m, mut v) = (vec![start as f32; 3], vec![0.0f32; 3], vec![0.0f32; 3]);
            let (mut pd, mut md, mut vd) = (start, 0.0, 0.0);
            for (t, &g) in gradients.iter().enumerate() {
                let t = t as i32 + 1;
                let rule = AdamW {
                    scale: 1.0, decay: 1.0 - 0.01 * 0.1, beta1: 0.9, beta2: 0.99,
                    step: (0.01 / (1.0 - 0.9f64.powi(t))) as f32,
                    root: (1.0 / (1.0 - 0.99f64.powi(t)).sqrt()) as f32, eps: 1e-8,
                };
                adamw(&mut p, &[g as f32; 3], &mut m, &mut v, rule);
                reference_adamw(&mut pd, g, &mut md, &mut vd, t, 0.01, 0.1);
            }
            prop_assert!((f64::from(p[2]) - pd).abs() < 2e-4, "{} {pd}", p[2]);
        }

        #[test]
        fn one_update_agrees_with_f64(len in 1usize..100, t in 1i32..1000, seed: u64) {
            let [p, g, m] = [0, 1, 2].map(|n| values(seed ^ n, len, 1.0));
            let v: Vec<f32> = values(seed ^ 3, len, 1.0).iter().map(|v| v * v).collect();
            let (scale, lr, decay, mu) = (0.7f64, 0.01, 0.1, 0.9);
            let [mut pd, mut md, mut vd] = [&p, &m, &v].map(|x| to_f64(x));
            for i in 0..len {
                reference_adamw(&mut pd[i], scale * f64::from(g[i]), &mut md[i], &mut vd[i], t, lr, decay);
            }
            let rule = AdamW {
                scale: scale as f32, decay: (1.0 - lr * decay) as f32, beta1: 0.9, beta2: 0.99,
                step: (lr / (1.0 - 0.9f64.powi(t))) as f32,
                root: (1.0 / (1.0 - 0.99f64.powi(t)).sqrt()) as f32, eps: 1e-8,
            };
            let (mut pf, mut mf, mut vf) = (p.clone(), m.clone(), v.clone());
            adamw(&mut pf, &g, &mut mf, &mut vf, rule);
            close(&pf, pd, 1e-5);
            close(&mf, md, 1e-5);
            close(&vf, vd, 1e-5);
            let kept = 1.0 - lr * decay;
            let (reference, old) = (to_f64(&p), to_f64(&m));
            let mut pf = p.clone();
            sgd(&mut pf, &g, scale as f32, kept as f32, lr as f32);
            close(&pf, (0..len).map(|i| reference[i] * kept - lr * scale * f64::from(g[i])), 1e-5);
            let (mut pf, mut velocity) = (p.clone(), m.clone());
            momentum(&mut pf, &g, &mut velocity, scale as f32, kept as f32, mu as f32, lr as f32);
            let speed: Vec<f64> = (0..len).map(|i| mu * old[i] + scale * f64::from(g[i])).collect();
            close(&pf, (0..len).map(|i| reference[i] * kept - lr * speed[i]), 1e-5);
            close(&velocity, speed, 1e-5);
        }

        #[test]
        fn squares_sum_up(values in prop::collection::vec(-10.0f32..10.0, 0..100)) {
            let reference: f64 = values.iter().map(|&x| f64::from(x).powi(2)).sum();
            prop_assert!((sum_of_squares(&values) - reference).abs() <= 1e-9 * reference.max(1.0));
        }
    }

    #[test]
    fn sgd_and_momentum_by_hand() {
        let mut p = [1.0f32, 2.0];
        sgd(&mut p, &[0.5, -1.0], 2.0, 1.0, 0.1);
        assert_eq!(p, [0.9, 2.2]);
        let (mut p, mut v) = ([1.0f32], [1.0f32]);
        momentum(&mut p, &[1.0], &mut v, 1.0, 1.0, 0.5, 0.1);
        assert_eq!((p, v), ([0.85], [1.5]));
    }
}
