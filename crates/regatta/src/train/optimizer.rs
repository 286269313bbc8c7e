//! AdamW and SGD over the flat buckets, in place, one pass over parameter, gradient and moments.

use super::config::{OptimizerConfig, OptimizerKind};
use crate::parallel::{GradientSync, Layout, ParamStore};
use crate::simd::multiversion;
use std::sync::Arc;

/// An optimizer with its state for every parameter, in the layout of the buckets.
pub struct FlatOptimizer {
    config: OptimizerConfig,
    layout: Arc<Layout>,
    /// First moments (AdamW) or velocities (SGD with momentum); empty where the rule has none.
    first: Vec<Vec<f32>>,
    /// Second moments (AdamW).
    second: Vec<Vec<f32>>,
    /// Updates made, for the bias correction.
    updates: u64,
}

impl FlatOptimizer {
    /// State of zeros for the parameters of `layout`.
    pub fn new(config: &OptimizerConfig, layout: Arc<Layout>) -> Self {
        let zeros = |wanted: bool| match wanted {
            true => layout.bucket_lens.iter().map(|&len| vec![0.0; len]).collect(),
            false => vec![],
        };
        let adam = config.kind == OptimizerKind::AdamW;
        let (first, second) = (zeros(adam || config.momentum > 0.0), zeros(adam));
        Self { config: config.clone(), first, second, updates: 0, layout }
    }

    /// The global norm of the averaged gradients: the root of the sum of their squares.
    pub fn gradient_norm(sync: &GradientSync) -> f64 {
        let mut squares = 0.0;
        sync.for_each_bucket(|_, gradients| squares += sum_of_squares(gradients));
        squares.sqrt()
    }

    /// One update with learning rate `lr`; gradients are multiplied by `scale` first (clipping).
    pub fn step(&mut self, store: &mut ParamStore, sync: &GradientSync, lr: f64, scale: f64) {
        self.updates += 1;
        let config = &self.config;
        let correction = |beta: f64| 1.0 - beta.powi(self.updates.min(i32::MAX as u64) as i32);
        let (correction1, correction2) = (correction(config.beta1), correction(config.beta2));
        let (layout, first, second) = (&self.layout, &mut self.first, &mut self.second);
        sync.for_each_bucket(|bucket, gradients| {
            for index in layout.in_bucket(bucket) {
                let range = layout.places[index].range.clone();
                let decays = layout.specs[index].shape.len() >= 2;
                let decay = (1.0 - if decays { lr * config.weight_decay } else { 0.0 }) as f32;
                let parameters = store.param_mut(index);
                let gradients = &gradients[range.clone()];
                match config.kind {
                    OptimizerKind::AdamW => {
                        let rule = AdamW {
                            scale: scale as f32,
                            decay,
                            beta1: config.beta1 as f32,
                            beta2: config.beta2 as f32,
                            step: (lr / correction1) as f32,
                            root: (1.0 / correction2.sqrt()) as f32,
                            eps: config.eps as f32,
                        };
                        let first = &mut first[bucket][range.clone()];
                        adamw(parameters, gradients, first, &mut second[bucket][range], rule);
                    }
                    OptimizerKind::Sgd if config.momentum > 0.0 => {
                        let velocity = &mut first[bucket][range];
                        momentum(
                            parameters,
                            gradients,
                            velocity,
                            scale as f32,
                            decay,
                            config.momentum as f32,
                            lr as f32,
                        );
                    }
                    OptimizerKind::Sgd => sgd(parameters, gradients, scale as f32, decay, lr as f32),
                }
            }
        });
    }

    /// The state tensors by name, each with the parameter's index: `first/PATH` and `second/PATH`.
    pub fn state(&self) -> impl Iterator<Item = (String, usize, &[f32])> {
        let kinds = [("first", &self.first), ("second", &self.second)];
        kinds.into_iter().filter(|(_, buckets)| !buckets.is_empty()).flat_map(move |(kind, buckets)| {
            self.layout.specs.iter().enumerate().map(move |(index, spec)| {
                let place = &self.layout.places[index];
                (format!("{kind}/{}", spec.path), index, &buckets[place.bucket][place.range.clone()])
            })
        })
    }

    /// Replaces the state: calls `read(name, index, target)` for every state tensor.
    pub fn load<E>(
        &mut self,
        updates: u64,
        mut read: impl FnMut(&str, usize, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.updates = updates;
        for (kind, buckets) in [("first", &mut self.first), ("second", &mut self.second)] {
            if buckets.is_empty() {
                continue;
            }
            for (index, spec) in self.layout.specs.iter().enumerate() {
                let place = &self.layout.places[index];
                read(
                    &format!("{kind}/{}", spec.path),
                    index,
                    &mut buckets[place.bucket][place.range.clone()],
                )?;
            }
        }
        Ok(())
    }

    /// Updates made so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The state's buckets, for a broadcast.
    pub fn buckets_mut(&mut self) -> impl Iterator<Item = &mut Vec<f32>> {
        self.first.iter_mut().chain(&mut self.second)
    }

    /// Sets the number of updates made.
    pub fn set_updates(&mut self, updates: u64) {
        self.updates = updates;
    }
}

/// Numbers of one AdamW update (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2).
#[derive(Clone, Copy)]
struct AdamW {
    scale: f32,
    /// `1 - lr * weight_decay`
    decay: f32,
    beta1: f32,
    beta2: f32,
    /// `lr / (1 - beta1^t)`
    step: f32,
    /// `1 / sqrt(1 - beta2^t)`
    root: f32,
    eps: f32,
}

multiversion! {
    fn adamw(parameters: &mut [f32], gradients: &[f32], first: &mut [f32], second: &mut [f32], rule: AdamW) {
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

multiversion! {
    fn sgd(parameters: &mut [f32], gradients: &[f32], scale: f32, decay: f32, lr: f32) {
        for (p, g) in parameters.iter_mut().zip(gradients) {
            *p = *p * decay - lr * (g * scale);
        }
    }
}

multiversion! {
    fn momentum(
        parameters: &mut [f32], gradients: &[f32], velocity: &mut [f32], scale: f32, decay: f32, mu: f32, lr: f32,
    ) {
        for ((p, g), v) in parameters.iter_mut().zip(gradients).zip(velocity) {
            *v = mu * *v + g * scale;
            *p = *p * decay - lr * *v;
        }
    }
}

multiversion! {
    fn sum_of_squares(values: &[f32]) -> f64 {
        // Sixteen sums side by side: vectorises, and loses less precision than one.
        let mut sums = [0.0f64; 16];
        let chunks = values.chunks_exact(16);
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
    use proptest::prelude::*;

    fn plain_adamw(p: &mut f64, g: f64, m: &mut f64, v: &mut f64, t: i32, lr: f64, decay: f64) {
        let (b1, b2, eps) = (0.9, 0.99, 1e-8);
        *m = b1 * *m + (1.0 - b1) * g;
        *v = b2 * *v + (1.0 - b2) * g * g;
        let (mh, vh) = (*m / (1.0 - b1.powi(t)), *v / (1.0 - b2.powi(t)));
        *p -= lr * decay * *p + lr * mh / (vh.sqrt() + eps);
    }

    proptest! {
        #[test]
        fn adamw_agrees_with_the_paper_in_f64(gradients in prop::collection::vec(-3.0f64..3.0, 1..40), start in -2.0f64..2.0) {
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
                plain_adamw(&mut pd, g, &mut md, &mut vd, t, 0.01, 0.1);
            }
            prop_assert!((f64::from(p[2]) - pd).abs() < 2e-4, "{} {pd}", p[2]);
        }

        #[test]
        fn squares_sum_up(values in prop::collection::vec(-10.0f32..10.0, 0..100)) {
            let plain: f64 = values.iter().map(|&x| f64::from(x).powi(2)).sum();
            prop_assert!((sum_of_squares(&values) - plain).abs() <= 1e-9 * plain.max(1.0));
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
