//! Which exchange a plan means.

use crate::compress::{CompressKind, Compressed};
use crate::exchange::{ExchangePlan, Mean, Sharded, ZeroStage};
use crate::local::{Islands, Local};
use crate::servers::Served;
use crate::{Axis, Plan};

impl Plan {
    /// How the workers of this plan combine gradients and keep parameters.
    pub fn exchange(&self) -> Box<dyn ExchangePlan> {
        if self.servers.count > 0 {
            return Box::new(Served);
        }
        let encoded = || -> Box<dyn ExchangePlan> {
            match self.compressed() {
                Some(compressed) => Box::new(compressed),
                None => Box::new(Mean),
            }
        };
        let inner: Box<dyn ExchangePlan> = match (self.sharded(), self.local()) {
            (Some(sharded), _) => Box::new(sharded),
            // What islands exchange is encoded, and not the gradients inside.
            (None, Some(_)) => Box::new(Mean),
            (None, None) => encoded(),
        };
        let Some(local) = self.local() else { return inner };
        let (islands, shards) = (self.mesh.axis(Axis::Replica), self.shards());
        Box::new(Islands { inner, outer: encoded(), local, islands, shards })
    }

    /// How gradients, or what islands have moved by, are encoded; `None` if they are not, or if nobody else gets them.
    pub fn compressed(&self) -> Option<Compressed> {
        let workers =
            if self.local().is_some() { self.mesh.axis(Axis::Replica) } else { self.mesh.workers() };
        let compressed = self.compress.kind != CompressKind::None && workers > 1;
        compressed.then_some(Compressed { compress: self.compress, workers })
    }

    /// Updates after which an optimizer leaves its second moments as they are, because gradients then have no size; `None` if it
    /// never does.
    pub fn learns_scale_for(&self) -> Option<u64> {
        let compress = self.compressed().filter(|_| self.local().is_none())?.compress;
        (compress.kind == CompressKind::Onebit && compress.warm_up > 0).then_some(compress.warm_up)
    }

    /// When islands come together; `None` if they exchange gradients in every step, or if there is only one.
    pub fn local(&self) -> Option<Local> {
        (self.local.every > 0 && self.mesh.axis(Axis::Replica) > 1).then_some(self.local)
    }

    /// What is sharded over `data`; `None` if nothing is, or if `data` has only one rank.
    pub fn sharded(&self) -> Option<Sharded> {
        let stage = match self.zero {
            0 => return None,
            1 => ZeroStage::Optimizer,
            2 => ZeroStage::Gradients,
            _ => ZeroStage::Parameters,
        };
        let shards = self.mesh.axis(Axis::Data);
        (shards > 1).then_some(Sharded { stage, shards })
    }
}
