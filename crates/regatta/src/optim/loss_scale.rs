//! Dynamic loss scaling: a factor on the loss keeps 16-bit gradients within their range (Micikevicius et al. 2018, "Mixed
//! Precision Training", section 3.2).

use crate::autograd::Precision;
use crate::config::TrainConfig;
use serde::{Deserialize, Serialize};

/// The initial scale under f16.
const INITIAL_SCALE: f64 = 65536.0;
/// Steps with finite gradients after which the scale is doubled.
const GROWTH_STEPS: usize = 2000;
/// Skipped steps in a row after which training fails. Halving [`INITIAL_SCALE`] so often makes it smaller than the smallest
/// f16, so the scale cannot be the cause.
const MAX_SKIPPED_IN_A_ROW: usize = 48;

/// The factor on the loss, and the number of steps that were skipped because of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// The factor on the loss.
    #[serde(with = "crate::json::float")]
    pub scale: f64,
    /// Whether the scale changes during training.
    dynamic: bool,
    /// Steps with finite gradients since the scale last changed.
    #[serde(rename = "good")]
    finite_steps: usize,
    /// Steps that were skipped in a row.
    #[serde(rename = "row")]
    skipped_in_a_row: usize,
    /// Steps that were skipped so far, because their gradients were not finite.
    pub skipped: usize,
}

impl LossScale {
    /// The loss scale of the configuration; none in f32 without a configured scale, where gradients that are not finite are
    /// an error.
    pub fn new(config: &TrainConfig) -> Option<Self> {
        let initial = config.loss_scale.or((config.precision == Precision::F16).then_some(INITIAL_SCALE));
        let wanted = initial.is_some() || config.precision != Precision::F32;
        let (scale, dynamic) = (initial.unwrap_or(1.0), initial.is_some());
        wanted.then_some(Self { scale, dynamic, finite_steps: 0, skipped_in_a_row: 0, skipped: 0 })
    }

    /// Adjusts the scale after a step. `finite` says whether the step's gradients were finite; if not, the caller skips the
    /// update. Returns whether training can continue.
    pub fn stepped(&mut self, finite: bool) -> bool {
        if finite {
            (self.skipped_in_a_row, self.finite_steps) = (0, self.finite_steps + 1);
            if self.dynamic && self.finite_steps >= GROWTH_STEPS {
                (self.scale, self.finite_steps) = (2.0 * self.scale, 0);
            }
            return true;
        }
        self.skipped_in_a_row += 1;
        self.finite_steps = 0;
        self.skipped += 1;
        if self.dynamic {
            self.scale /= 2.0;
        }
        self.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_after_a_skipped_step_and_doubles_after_many_finite_ones() {
        let config = TrainConfig { precision: Precision::F16, ..TrainConfig::default() };
        let mut scale = LossScale::new(&config).unwrap();
        assert!(scale.stepped(false) && scale.stepped(false));
        assert_eq!((scale.scale, scale.skipped), (INITIAL_SCALE / 4.0, 2));
        (0..GROWTH_STEPS - 1).for_each(|_| assert!(scale.stepped(true)));
        assert_eq!(scale.scale, INITIAL_SCALE / 4.0);
        scale.stepped(true);
        assert_eq!((scale.scale, scale.skipped), (INITIAL_SCALE / 2.0, 2));
        assert!((1..MAX_SKIPPED_IN_A_ROW).all(|_| scale.stepped(false)) && !scale.stepped(false));
    }

    #[test]
    fn f32_has_none_unless_asked_and_bf16_stays_at_one() {
        let with = |precision, loss_scale| {
            LossScale::new(&TrainConfig { precision, loss_scale, ..TrainConfig::default() })
        };
        assert_eq!(with(Precision::F32, None), None);
        assert_eq!(with(Precision::F32, Some(8.0)).unwrap().scale, 8.0);
        let mut scale = with(Precision::Bf16, None).unwrap();
        scale.stepped(false);
        assert_eq!((scale.scale, scale.skipped), (1.0, 1));
    }
}
