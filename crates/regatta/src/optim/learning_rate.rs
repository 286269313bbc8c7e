//! The schedule of the learning rate: linear warm-up, then cosine decay to the minimum (Loshchilov & Hutter 2017,
//! "SGDR: Stochastic Gradient Descent with Warm Restarts", equation 5, without restarts).

use crate::config::OptimizerConfig;

/// The default minimum is the learning rate divided by this.
const MIN_LR_DIVISOR: f64 = 10.0;

/// The learning rate of optimizer step `step`, counted from 0, in a run of `steps` steps.
pub fn learning_rate(config: &OptimizerConfig, step: usize, steps: usize) -> f64 {
    if step < config.warmup {
        return config.lr * (step + 1) as f64 / config.warmup as f64;
    }
    if config.constant {
        return config.lr;
    }
    let min = config.min_lr.unwrap_or(config.lr / MIN_LR_DIVISOR);
    let end = config.decay_steps.unwrap_or(steps).max(config.warmup + 1);
    let progress = (step - config.warmup) as f64 / (end - config.warmup) as f64;
    min + 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos()) * (config.lr - min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_and_decays_to_the_minimum() {
        let config = OptimizerConfig { lr: 1.0, min_lr: Some(0.1), warmup: 10, ..Default::default() };
        let lr = |step| learning_rate(&config, step, 100);
        assert_eq!((lr(0), lr(9), lr(10)), (0.1, 1.0, 1.0));
        assert!((lr(55) - 0.55).abs() < 1e-9);
        assert!((lr(100) - 0.1).abs() < 1e-9 && (lr(500) - 0.1).abs() < 1e-9);
        assert!((10..100).all(|step| lr(step + 1) <= lr(step)));
        let constant = OptimizerConfig { constant: true, ..config };
        assert_eq!(learning_rate(&constant, 90, 100), 1.0);
    }
}
