//! Named axes of ranks (Shazeer et al. 2018, "Mesh-TensorFlow", section 3).

use crate::{Axis, AxisSet, PlanError};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The most ranks that a mesh may have. The limit is far above the size of real jobs, and low enough that products of
/// sizes do not overflow.
pub const MAX_RANKS: usize = 1 << 16;

/// Named axes and their sizes, in the order of [`Axis::ALL`]. The product of the sizes is the number of ranks in the
/// job. The last axis varies fastest with the rank.
///
/// ```
/// let mesh: regatta_plan::Mesh = "tensor=2,data=2".parse().unwrap();
/// assert_eq!(mesh.to_string(), "data=2,tensor=2");
/// use regatta_plan::Axis;
/// assert_eq!((mesh.coordinate(3, Axis::Data), mesh.coordinate(2, Axis::Tensor)), (1, 0));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<(String, usize)>")]
pub struct Mesh(Vec<(Axis, usize)>);

impl Mesh {
    /// A mesh with the axis `data` alone: every rank holds the whole model and processes its own part of the batch.
    pub fn data(workers: usize) -> Self {
        Self(vec![(Axis::Data, workers)])
    }

    /// A mesh of `axes`, which may be given in any order.
    ///
    /// # Errors
    /// [`PlanError::Mesh`] if an axis is given twice or has size 0, or if there are more than [`MAX_RANKS`] ranks.
    pub fn new(axes: &[(Axis, usize)]) -> Result<Self, PlanError> {
        for (index, (axis, size)) in axes.iter().enumerate() {
            let problem = if axes[..index].iter().any(|(other, _)| other == axis) {
                format!("names the axis `{axis}` twice")
            } else if *size == 0 {
                format!("axis `{axis}` must be at least 1")
            } else {
                continue;
            };
            return Err(PlanError::Mesh(problem));
        }
        let ranks = axes.iter().try_fold(1usize, |ranks, (_, size)| ranks.checked_mul(*size));
        if ranks.is_none_or(|ranks| ranks > MAX_RANKS) {
            let sizes: Vec<String> = axes.iter().map(|(name, size)| format!("{name}={size}")).collect();
            return Err(PlanError::Mesh(format!(
                "{} is too large: a mesh has at most {MAX_RANKS} ranks",
                sizes.join(",")
            )));
        }
        let mut sorted = axes.to_vec();
        sorted.sort_by_key(|(axis, _)| *axis);
        Ok(Self(sorted))
    }

    /// The axes and their sizes, slowest first.
    pub fn axes(&self) -> &[(Axis, usize)] {
        &self.0
    }

    /// The size of `axis`; 1 if the mesh does not have it.
    pub fn axis(&self, axis: Axis) -> usize {
        self.0.iter().find(|(other, _)| *other == axis).map_or(1, |(_, size)| *size)
    }

    /// Ranks in the mesh.
    pub fn size(&self) -> usize {
        self.0.iter().map(|(_, size)| size).product()
    }

    /// The number of workers, which process different samples: the product of `replica` and `data`.
    pub fn workers(&self) -> usize {
        self.axis(Axis::Replica) * self.axis(Axis::Data)
    }

    /// The index of `rank` along `axis`; 0 if the mesh does not have the axis.
    pub fn coordinate(&self, rank: usize, axis: Axis) -> usize {
        let mut rest = rank;
        for (other, size) in self.0.iter().rev() {
            if *other == axis {
                return rest % size;
            }
            rest /= size;
        }
        0
    }

    /// The worker that `rank` belongs to. Ranks of one worker process the same samples.
    pub fn worker(&self, rank: usize) -> usize {
        self.coordinate(rank, Axis::Replica) * self.axis(Axis::Data) + self.coordinate(rank, Axis::Data)
    }

    /// The ranks whose coordinates differ from those of `rank` only along the axes `over`, in ascending order. `rank`
    /// is one of them.
    pub fn ranks_over(&self, rank: usize, over: AxisSet) -> Vec<usize> {
        let fixed = AxisSet::ALL.without(over);
        let same = |other: &usize| {
            fixed.iter().all(|axis| self.coordinate(*other, axis) == self.coordinate(rank, axis))
        };
        (0..self.size()).filter(same).collect()
    }

    /// The axes of `set` whose size is more than 1.
    pub fn longer_than_one(&self, set: AxisSet) -> AxisSet {
        let axes: Vec<Axis> = set.iter().filter(|axis| self.axis(*axis) > 1).collect();
        AxisSet::of(&axes)
    }

    /// Checks that the mesh has `world` ranks, as many as the job.
    ///
    /// # Errors
    /// [`PlanError::Mesh`] if it has another number; the error suggests a size that fits.
    pub fn check_world(&self, world: usize) -> Result<(), PlanError> {
        let size = self.size();
        if size == world {
            return Ok(());
        }
        let others = size / self.axis(Axis::Data);
        let hint = if world.is_multiple_of(others) {
            let axes = self.0.iter().filter(|(axis, _)| *axis != Axis::Data);
            let rest: String = axes.map(|(axis, size)| format!(",{axis}={size}")).collect();
            format!("use data={}{rest}, or start {size} ranks", world / others)
        } else {
            format!("start {size} ranks")
        };
        Err(PlanError::Mesh(format!("{self} is for {size} ranks, but the job has {world}: {hint}")))
    }
}

/// The axis with this name, or an error that lists the axes.
fn find_axis(name: &str) -> Result<Axis, PlanError> {
    let unknown = || PlanError::Mesh(format!("has no axis `{name}`; the axes are {}", Axis::names()));
    Axis::find(name).ok_or_else(unknown)
}

impl TryFrom<Vec<(String, usize)>> for Mesh {
    type Error = PlanError;

    fn try_from(axes: Vec<(String, usize)>) -> Result<Self, PlanError> {
        let axes = axes.iter().map(|(name, size)| Ok((find_axis(name)?, *size)));
        Self::new(&axes.collect::<Result<Vec<_>, PlanError>>()?)
    }
}

impl FromStr for Mesh {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let mut axes = vec![];
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let parsed =
                part.split_once('=').and_then(|(name, size)| Some((name.trim(), size.trim().parse().ok()?)));
            let (name, size) = parsed.ok_or_else(|| {
                PlanError::Mesh(format!("{part:?} is not NAME=SIZE, as in data=2,tensor=2"))
            })?;
            axes.push((find_axis(name)?, size));
        }
        if axes.is_empty() {
            return Err(PlanError::Mesh("names no axis: give NAME=SIZE, as in data=2,tensor=2".into()));
        }
        Self::new(&axes)
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (axis, size)) in self.0.iter().enumerate() {
            write!(f, "{}{axis}={size}", if i == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coordinates_number_every_rank_once_and_tensor_is_innermost() {
        let mesh: Mesh = "tensor=2,pipe=3,replica=2,data=2".parse().unwrap();
        assert_eq!(mesh.to_string(), "replica=2,pipe=3,data=2,tensor=2");
        let mut seen = std::collections::BTreeSet::new();
        for rank in 0..mesh.size() {
            seen.insert(Axis::ALL.map(|axis| mesh.coordinate(rank, axis)));
        }
        assert_eq!(seen.len(), 24);
        assert_eq!(mesh.coordinate(1, Axis::Tensor), 1);
        let over = |axes: &[Axis]| mesh.ranks_over(5, AxisSet::of(axes));
        assert_eq!(over(&[Axis::Tensor]), [4, 5]);
        assert_eq!(over(&[Axis::Pipe]), [1, 5, 9]);
        assert_eq!(over(&[Axis::Replica, Axis::Data]), [5, 7, 17, 19]);
        assert_eq!(over(&[]), [5]);
        assert_eq!((mesh.workers(), mesh.worker(23)), (4, 3));
    }

    #[test]
    fn invalid_meshes_are_refused() {
        for (text, wanted) in [
            ("date=2", "has no axis `date`"),
            ("data=2,data=2", "twice"),
            ("data=0", "at least 1"),
            ("data", "NAME=SIZE"),
            ("data=x", "NAME=SIZE"),
            ("", "names no axis"),
        ] {
            let error = text.parse::<Mesh>().unwrap_err().to_string();
            assert!(error.contains(wanted), "{text}: {error}");
        }
        let mesh: Mesh = "data=2,tensor=2".parse().unwrap();
        assert!(mesh.check_world(4).is_ok());
        assert!(
            mesh.check_world(8).unwrap_err().to_string().contains("use data=4,tensor=2, or start 4 ranks")
        );
        assert!(mesh.check_world(3).unwrap_err().to_string().contains("start 4 ranks"));
    }
}
