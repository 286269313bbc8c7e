//! The groups of one rank, by their axes of the mesh and their role.

use super::carried::{Carried, Purpose};
use crate::autograd::AxisGroup;
use crate::error::Result;
use regatta_comm::{Group, Kind};
use regatta_plan::{Axis, AxisSet, Mesh, Plan};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The role of a group. Each role has its own groups, so that operations of one role do not wait for those of another, and
/// are counted separately.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Workers exchange gradients and parameters.
    Exchange,
    /// Workers exchange encoded gradients.
    Encoded,
    /// Islands exchange what they have moved by, or their parameters.
    Islands,
    /// Ranks that share the work of a layer sum their gradients.
    Partial,
    /// Layers that are split over ranks exchange activations.
    Layers,
    /// Ranks sum the squares of gradients, for the norm.
    Norm,
    /// Ranks agree on the loss and on whether to continue.
    Agreement,
}

impl Role {
    fn purpose(self, kind: Kind) -> Purpose {
        match self {
            Self::Exchange if kind == Kind::AllGather => Purpose::Parameters,
            Self::Islands if kind == Kind::Send => Purpose::Parameters,
            Self::Exchange | Self::Encoded | Self::Islands | Self::Partial => Purpose::Gradients,
            Self::Layers => Purpose::Tensor,
            Self::Norm | Self::Agreement => Purpose::Control,
        }
    }
}

/// The groups of one rank. Clones share the groups.
#[derive(Clone)]
pub struct Groups {
    world: Group,
    mesh: Mesh,
    model_axes: AxisSet,
    tensor: Option<AxisGroup>,
    connected: Arc<Mutex<BTreeMap<(AxisSet, Role), Group>>>,
}

impl Groups {
    /// Connects the groups that a step of `plan` uses. All ranks of `world` must call it.
    ///
    /// # Errors
    /// The mesh does not have as many ranks as `world`, or communication fails.
    pub fn connect(world: &Group, plan: &Plan) -> Result<Self> {
        plan.mesh.check_world(world.size())?;
        let mut groups = Self {
            world: world.clone(),
            mesh: plan.mesh.clone(),
            model_axes: model_axes(plan),
            tensor: None,
            connected: Arc::default(),
        };
        // The order is the same on all ranks, so that no two of them wait for each other.
        for axes in [AxisSet::from(Axis::Data), Axis::Replica.into(), AxisSet::WORKERS] {
            groups.over(axes, Role::Exchange)?;
        }
        groups.tensor = groups.over_several(Axis::Tensor.into(), Role::Layers)?.map(AxisGroup::new);
        groups.over(Axis::Tensor.into(), Role::Partial)?;
        groups.over(groups.model_axes, Role::Norm)?;
        groups.over(AxisSet::ALL, Role::Agreement)?;
        if plan.local().is_some() {
            groups.island()?;
        }
        Ok(groups)
    }

    /// The group of all ranks, for communication between steps.
    pub fn world(&self) -> &Group {
        &self.world
    }

    /// The mesh.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// The group of the ranks that differ from this one only along axes of `set`. The first call connects the group, so all of
    /// its ranks must make it.
    ///
    /// # Errors
    /// Communication fails.
    pub fn over(&self, set: AxisSet, role: Role) -> Result<Group> {
        let set = self.mesh.longer_than_one(set);
        let mut connected = self.connected.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(group) = connected.get(&(set, role)) {
            return Ok(group.clone());
        }
        let ranks = self.mesh.ranks_over(self.world.rank(), set);
        let group = if ranks.len() == 1 { Group::solo() } else { self.world.subgroup(&ranks)? };
        connected.insert((set, role), group.clone());
        Ok(group)
    }

    /// As [`over`](Self::over); none if this rank is the only one of the group.
    ///
    /// # Errors
    /// As [`over`](Self::over).
    pub fn over_several(&self, set: AxisSet, role: Role) -> Result<Option<Group>> {
        Ok(Some(self.over(set, role)?).filter(|group| group.size() > 1))
    }

    /// The ranks that layers are split over; none if layers are not split.
    pub fn tensor(&self) -> Option<&AxisGroup> {
        self.tensor.as_ref()
    }

    /// The group of the ranks that together hold one copy of the model, or of its shards.
    ///
    /// # Errors
    /// As [`over`](Self::over).
    pub fn model(&self) -> Result<Group> {
        self.over(self.model_axes, Role::Norm)
    }

    /// The group of all ranks for their agreement at the end of a step.
    ///
    /// # Errors
    /// As [`over`](Self::over).
    pub fn agreement(&self) -> Result<Group> {
        self.over(AxisSet::ALL, Role::Agreement)
    }

    /// The group of the ranks of this rank's island for their agreement.
    ///
    /// # Errors
    /// As [`over`](Self::over).
    pub fn island(&self) -> Result<Group> {
        self.over(AxisSet::ALL.without(Axis::Replica.into()), Role::Agreement)
    }

    /// This rank's index along an axis.
    pub fn coordinate(&self, axis: Axis) -> usize {
        self.mesh.coordinate(self.world.rank(), axis)
    }

    /// Whether this rank is the first along every axis of `set`.
    pub fn is_first_along(&self, set: AxisSet) -> bool {
        set.iter().all(|axis| self.coordinate(axis) == 0)
    }

    /// The worker that this rank belongs to. The ranks of one worker compute on the same samples.
    pub fn worker(&self) -> usize {
        self.mesh.worker(self.world.rank())
    }

    /// Connects a group of the ranks at `stages` of this rank's pipeline. This rank must be one of them.
    ///
    /// # Errors
    /// Communication fails.
    pub fn stages(&self, stages: &[usize]) -> Result<Group> {
        let pipe = self.mesh.ranks_over(self.world.rank(), Axis::Pipe.into());
        let ranks: Vec<usize> = stages.iter().filter_map(|&stage| pipe.get(stage).copied()).collect();
        Ok(self.world.subgroup(&ranks)?)
    }

    /// Adds the traffic of the groups so far to `carried`.
    pub(crate) fn count(&self, carried: &mut Carried) {
        let connected = self.connected.lock().unwrap_or_else(PoisonError::into_inner);
        for ((_, role), group) in connected.iter() {
            carried.group(&group.traffic(), |kind| role.purpose(kind));
        }
    }
}

/// The axes over which one copy of the model, or of its shards, is distributed.
pub(crate) fn model_axes(plan: &Plan) -> AxisSet {
    let split = AxisSet::of(&[Axis::Pipe, Axis::Tensor]);
    if plan.shards() > 1 { split.union(Axis::Data.into()) } else { split }
}
