//! The groups of one rank: one for every axis of the mesh, and for what goes over several axes.

use crate::autograd::Axis;
use crate::error::Result;
use regatta_comm::Group;
use regatta_plan::Mesh;

/// The groups of one rank.
#[derive(Clone)]
pub struct Axes {
    /// All ranks.
    pub world: Group,
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
        let over = |axes: &[&str]| -> Result<Group> {
            let own = world.rank();
            let in_line = |rank: &usize| {
                regatta_plan::AXES.iter().all(|axis| {
                    axes.contains(axis) || mesh.coordinate(*rank, axis) == mesh.coordinate(own, axis)
                })
            };
            let ranks: Vec<usize> = (0..world.size()).filter(in_line).collect();
            Ok(match ranks.len() {
                1 => Group::solo(),
                size if size == world.size() => world.clone(),
                _ => world.subgroup(&ranks)?,
            })
        };
        // A group of its own for every use: what goes on in one does not wait for the other.
        let several = |axes: &[&str]| over(axes).map(|group| (group.size() > 1).then_some(group));
        Ok(Self {
            workers: over(&["replica", "data"])?,
            data: over(&["data"])?,
            replica: several(&["replica"])?,
            tensor: several(&["tensor"])?.map(Axis::new),
            model: over(if sharded { &["pipe", "tensor", "data"] } else { &["pipe", "tensor"] })?,
            mesh: mesh.clone(),
            world: world.clone(),
        })
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
        let same = |rank: &usize| {
            self.mesh.coordinate(*rank, "pipe") == stage
                && ["replica", "data", "tensor"]
                    .iter()
                    .all(|axis| self.mesh.coordinate(*rank, axis) == self.mesh.coordinate(own, axis))
        };
        (0..self.world.size()).find(same).unwrap_or(own)
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
