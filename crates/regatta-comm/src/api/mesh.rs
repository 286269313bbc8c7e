//! A group laid out as a grid with named axes (Shazeer et al. 2018, "Mesh-TensorFlow").

use crate::api::group::Group;
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// Ranks in a grid with named axes, and for each axis the group of the ranks in line with this one.
///
/// The last axis varies fastest: with `[("data", 2), ("tensor", 4)]` ranks 0 to 3 are one tensor group.
///
/// ```
/// # use regatta_comm::{Group, Mesh, ReduceOp};
/// # let ranks: Vec<_> = Group::threads(4).into_iter().map(|group| std::thread::spawn(move || {
/// let mesh = Mesh::new(&group, &[("data", 2), ("tensor", 2)])?;
/// let mut sum = [mesh.coordinate("data")? as i32 * 10 + mesh.coordinate("tensor")? as i32];
/// mesh.axis("tensor")?.all_reduce(&mut sum, ReduceOp::Sum)?;
/// # Ok::<_, regatta_comm::Error>(sum)
/// # })).collect();
/// # let sums: Vec<i32> = ranks.into_iter().map(|rank| rank.join().unwrap().map(|sum| sum[0])).collect::<Result<_, _>>()?;
/// # assert_eq!(sums, [1, 1, 21, 21]);
/// # Ok::<(), regatta_comm::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Mesh {
    world: Group,
    axes: Vec<(String, usize)>,
    groups: BTreeMap<String, Group>,
}

impl Mesh {
    /// Lays `group` out. All its ranks call it with the same axes, whose sizes multiply to the group's.
    ///
    /// # Errors
    /// Axes that do not fit the group or share a name; else a failure of communication.
    pub fn new(group: &Group, axes: &[(&str, usize)]) -> Result<Self> {
        let shown = || axes.iter().map(|(name, size)| format!("{name}={size}")).collect::<Vec<_>>().join(",");
        let cells = axes.iter().try_fold(1usize, |cells, (_, size)| cells.checked_mul(*size));
        if cells != Some(group.size()) {
            return Err(Error::Usage(format!("mesh {}: the group has {} ranks", shown(), group.size())));
        }
        if axes
            .iter()
            .enumerate()
            .any(|(index, (name, _))| axes[..index].iter().any(|(other, _)| other == name))
        {
            return Err(Error::Usage(format!("mesh {}: two axes have one name", shown())));
        }
        let mut mesh = Self {
            world: group.clone(),
            axes: axes.iter().map(|(name, size)| (name.to_string(), *size)).collect(),
            groups: BTreeMap::new(),
        };
        for (name, _) in axes {
            let line = mesh.over(&[name])?;
            mesh.groups.insert(name.to_string(), line);
        }
        Ok(mesh)
    }

    /// The whole group.
    pub fn world(&self) -> &Group {
        &self.world
    }

    /// Names and sizes of the axes.
    pub fn axes(&self) -> &[(String, usize)] {
        &self.axes
    }

    /// The group of the ranks that differ from this one along `axis` alone, in the order of their coordinates.
    ///
    /// # Errors
    /// No such axis.
    pub fn axis(&self, axis: &str) -> Result<&Group> {
        self.groups.get(axis).ok_or_else(|| self.unknown(axis))
    }

    /// This rank's place along `axis`.
    ///
    /// # Errors
    /// No such axis.
    pub fn coordinate(&self, axis: &str) -> Result<usize> {
        let index = self.index(axis)?;
        Ok(self.coordinates(self.world.rank())[index])
    }

    /// A new group of the ranks that differ from this one along `axes` alone. All ranks of the mesh call it.
    ///
    /// # Errors
    /// No such axis; else a failure of communication.
    pub fn over(&self, axes: &[&str]) -> Result<Group> {
        let free = axes.iter().map(|axis| self.index(axis)).collect::<Result<Vec<_>>>()?;
        let own = self.coordinates(self.world.rank());
        let in_line = |rank: &usize| {
            let theirs = self.coordinates(*rank);
            (0..self.axes.len()).all(|index| free.contains(&index) || own[index] == theirs[index])
        };
        let ranks: Vec<usize> = (0..self.world.size()).filter(in_line).collect();
        self.world.subgroup(&ranks)
    }

    fn coordinates(&self, rank: usize) -> Vec<usize> {
        let mut rest = rank;
        let mut coordinates: Vec<usize> = self
            .axes
            .iter()
            .rev()
            .map(|(_, size)| {
                let coordinate = rest % size;
                rest /= size;
                coordinate
            })
            .collect();
        coordinates.reverse();
        coordinates
    }

    fn index(&self, axis: &str) -> Result<usize> {
        self.axes.iter().position(|(name, _)| name == axis).ok_or_else(|| self.unknown(axis))
    }

    fn unknown(&self, axis: &str) -> Error {
        let known = self.axes.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
        Error::Usage(format!("the mesh has no axis `{axis}`; it has {known}"))
    }
}
