//! Dynamic loss scaling: gradients of 16-bit numbers are kept within their range by a factor on the loss (Micikevicius
//! et al. 2018, "Mixed Precision Training", section 3.2).

use super::config::TrainConfig;
use crate::autograd::Precision;
use serde::{Deserialize, Serialize};

/// Where the scale begins under f16.
const FIRST: f64 = 65536.0;
/// Steps with finite gradients after which the scale is doubled.
const PATIENCE: usize = 2000;
/// Skipped steps in a row after which it is not the scale: more than take [`FIRST`] to the smallest f16.
const MOST: usize = 48;

/// The factor on the loss, and the steps that it cost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// What the loss is multiplied by.
    #[serde(with = "crate::json::float")]
    pub scale: f64,
    /// Whether it changes.
    dynamic: bool,
    /// Steps with finite gradients since it last changed.
    good: usize,
    /// Steps skipped in a row.
    row: usize,
    /// Steps skipped so far, because their gradients were not finite.
    pub skipped: usize,
}

impl LossScale {
    /// As the configuration says; none in plain f32, where a step that is not finite is an error.
    pub fn new(config: &TrainConfig) -> Option<Self> {
        let first = config.loss_scale.or((config.precision == Precision::F16).then_some(FIRST));
        let wanted = first.is_some() || config.precision != Precision::F32;
        let (scale, dynamic) = (first.unwrap_or(1.0), first.is_some());
        wanted.then_some(Self { scale, dynamic, good: 0, row: 0, skipped: 0 })
    }

    /// A step's gradients were finite, or not: then its update is skipped. Whether training can go on.
    pub fn stepped(&mut self, finite: bool) -> bool {
        if finite {
            (self.row, self.good) = (0, self.good + 1);
            if self.dynamic && self.good >= PATIENCE {
                (self.scale, self.good) = (2.0 * self.scale, 0);
            }
            return true;
        }
        (self.row, self.good, self.skipped) = (self.row + 1, 0, self.skipped + 1);
        if self.dynamic {
            self.scale /= 2.0;
        }
        self.row < MOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_at_once_and_doubles_in_time() {
        let config = TrainConfig { precision: Precision::F16, ..TrainConfig::default() };
        let mut scale = LossScale::new(&config).unwrap();
        assert!(scale.stepped(false) && scale.stepped(false));
        assert_eq!((scale.scale, scale.skipped), (FIRST / 4.0, 2));
        (0..PATIENCE - 1).for_each(|_| assert!(scale.stepped(true)));
        assert_eq!(scale.scale, FIRST / 4.0);
        scale.stepped(true);
        assert_eq!((scale.scale, scale.skipped), (FIRST / 2.0, 2));
        assert!((1..MOST).all(|_| scale.stepped(false)) && !scale.stepped(false));
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
