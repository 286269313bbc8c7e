//! The groups of one rank: one for every axis of the mesh, and for what goes over several axes.

use crate::autograd::Axis;
use crate::error::Result;
use regatta_comm::Group;
use regatta_plan::Mesh;

/// The groups of one rank.
#[derive(Clone)]
pub struct Axes {
    /// All ranks: for what is done between steps.
    pub world: Group,
    /// All ranks, which agree at the end of a step.
    pub control: Group,
    /// The mesh.
    pub mesh: Mesh,
    /// Ranks that hold the same part of the model and see other samples: over `replica` and `data`.
    pub workers: Group,
    /// Ranks over which a unit is sharded: over `data`.
    pub data: Group,
    /// Ranks that hold the same shard, where there are several.
    pub replica: Option<Group>,
    /// Ranks over which layers are split, where they are.
    pub tensor: Option<Axis>,
    /// The same ranks, for the gradients that each of them has but a part of.
    pub partial: Option<Group>,
    /// Ranks that together hold one copy of the model, or of its shards: over `pipe` and `tensor`, and `data` where
    /// parameters are sharded.
    pub model: Group,
}

impl Axes {
    /// Connects the groups. All ranks of `world` call it.
    ///
    /// # Errors
    /// A mesh of another size, or a failure of communication.
    pub fn new(world: &Group, mesh: &Mesh, sharded: bool) -> Result<Self> {
        mesh.fits(world.size()).map_err(|error| crate::Error::Usage(error.to_string()))?;
        // A group of its own for every use: what goes on in one does not wait for the other, and each counts its own.
        let over = |axes: &[&str]| -> Result<Group> {
            let ranks = line(mesh, world.rank(), axes);
            Ok(if ranks.len() == 1 { Group::solo() } else { world.subgroup(&ranks)? })
        };
        let several = |axes: &[&str]| over(axes).map(|group| (group.size() > 1).then_some(group));
        let data = over(&["data"])?;
        let replica = several(&["replica"])?;
        Ok(Self {
            workers: if replica.is_some() { over(&["replica", "data"])? } else { data.clone() },
            data,
            replica,
            tensor: several(&["tensor"])?.map(Axis::new),
            partial: several(&["tensor"])?,
            model: over(Self::model_axes(sharded))?,
            control: over(&regatta_plan::AXES)?,
            mesh: mesh.clone(),
            world: world.clone(),
        })
    }

    /// The axes over which one copy of the model, or of its shards, lies.
    pub(crate) fn model_axes(sharded: bool) -> &'static [&'static str] {
        if sharded { &["pipe", "tensor", "data"] } else { &["pipe", "tensor"] }
    }

    /// This rank's place along an axis.
    pub fn coordinate(&self, axis: &str) -> usize {
        self.mesh.coordinate(self.world.rank(), axis)
    }

    /// Which worker this rank belongs to: ranks of one worker see the same samples.
    pub fn worker(&self) -> usize {
        self.mesh.worker(self.world.rank())
    }

    /// The rank that differs from this one in its stage alone.
    pub fn at_stage(&self, stage: usize) -> usize {
        let own = self.world.rank();
        line(&self.mesh, own, &["pipe"]).get(stage).copied().unwrap_or(own)
    }

    /// A group of this rank's pipeline: the ranks at `stages`, of which this one's is one.
    ///
    /// # Errors
    /// A failure of communication.
    pub fn stages(&self, stages: &[usize]) -> Result<Group> {
        let ranks: Vec<usize> = stages.iter().map(|&stage| self.at_stage(stage)).collect();
        Ok(self.world.subgroup(&ranks)?)
    }
}

/// The ranks that differ from `rank` along these axes alone, in order: along one axis, in the order of their places.
pub(crate) fn line(mesh: &Mesh, rank: usize, axes: &[&str]) -> Vec<usize> {
    let same = |other: &usize| {
        regatta_plan::AXES
            .iter()
            .all(|axis| axes.contains(axis) || mesh.coordinate(*other, axis) == mesh.coordinate(rank, axis))
    };
    (0..mesh.size()).filter(same).collect()
}
