//! Named axes of ranks (Shazeer et al. 2018, "Mesh-TensorFlow", section 3).

use crate::PlanError;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The axes that a mesh may have, from the slowest to the fastest with the rank: the one with most traffic, tensor,
/// lies innermost and so inside a host; pipeline stages, which only hand activations on, lie far apart
/// (Narayanan et al. 2021, section 3.4).
pub const AXES: [&str; 4] = ["replica", "pipe", "data", "tensor"];

/// Most ranks of a mesh: far more than a job has had, and few enough that every product of sizes can be counted.
pub const MAX_RANKS: usize = 1 << 16;

/// Named axes and their sizes, in the order of [`AXES`]; their product is the world size. The last axis varies
/// fastest with the rank.
///
/// ```
/// let mesh: regatta_plan::Mesh = "tensor=2,data=2".parse().unwrap();
/// assert_eq!(mesh.to_string(), "data=2,tensor=2");
/// assert_eq!((mesh.coordinate(3, "data"), mesh.coordinate(2, "tensor")), (1, 0));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<(String, usize)>")]
pub struct Mesh(Vec<(String, usize)>);

impl Mesh {
    /// One axis, `data`: every rank holds the whole model and sees its own part of the batch.
    pub fn data(workers: usize) -> Self {
        Self(vec![("data".into(), workers)])
    }

    /// A mesh of these axes, in any order.
    ///
    /// # Errors
    /// An axis that is not one of [`AXES`], given twice or of size 0; more than [`MAX_RANKS`] ranks.
    pub fn new(axes: &[(&str, usize)]) -> Result<Self, PlanError> {
        for (index, (name, size)) in axes.iter().enumerate() {
            let problem = if !AXES.contains(name) {
                format!("has no axis `{name}`; the axes are {}", AXES.join(", "))
            } else if axes[..index].iter().any(|(other, _)| other == name) {
                format!("names the axis `{name}` twice")
            } else if *size == 0 {
                format!("axis `{name}` must be at least 1")
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
        let find = |name: &str| axes.iter().find(|(axis, _)| *axis == name);
        let sorted = AXES.iter().filter_map(|name| find(name)).map(|(name, size)| (name.to_string(), *size));
        Ok(Self(sorted.collect()))
    }

    /// Names and sizes, slowest first.
    pub fn axes(&self) -> &[(String, usize)] {
        &self.0
    }

    /// Size of the named axis; 1 where the mesh does not have it.
    pub fn axis(&self, name: &str) -> usize {
        self.0.iter().find(|(axis, _)| axis == name).map_or(1, |(_, size)| *size)
    }

    /// Ranks in the mesh.
    pub fn size(&self) -> usize {
        self.0.iter().map(|(_, size)| size).product()
    }

    /// Ranks that see different samples: those along `replica` and `data`.
    pub fn workers(&self) -> usize {
        self.axis("replica") * self.axis("data")
    }

    /// The place of `rank` along the named axis; 0 where the mesh does not have it.
    pub fn coordinate(&self, rank: usize, name: &str) -> usize {
        let mut rest = rank;
        for (axis, size) in self.0.iter().rev() {
            if axis == name {
                return rest % size;
            }
            rest /= size;
        }
        0
    }

    /// Which worker `rank` belongs to: ranks of one worker see the same samples.
    pub fn worker(&self, rank: usize) -> usize {
        self.coordinate(rank, "replica") * self.axis("data") + self.coordinate(rank, "data")
    }

    /// Checks that the mesh is as large as the job.
    ///
    /// # Errors
    /// Another number of ranks, with what would do.
    pub fn fits(&self, world: usize) -> Result<(), PlanError> {
        let size = self.size();
        if size == world {
            return Ok(());
        }
        let others = size / self.axis("data");
        let hint = if world.is_multiple_of(others) {
            let axes = self.0.iter().filter(|(name, _)| name != "data");
            let rest: String = axes.map(|(name, size)| format!(",{name}={size}")).collect();
            format!("use data={}{rest}, or start {size} ranks", world / others)
        } else {
            format!("start {size} ranks")
        };
        Err(PlanError::Mesh(format!("{self} is for {size} ranks, but the job has {world}: {hint}")))
    }
}

impl TryFrom<Vec<(String, usize)>> for Mesh {
    type Error = PlanError;

    fn try_from(axes: Vec<(String, usize)>) -> Result<Self, PlanError> {
        let axes: Vec<(&str, usize)> = axes.iter().map(|(name, size)| (name.as_str(), *size)).collect();
        Self::new(&axes)
    }
}

impl FromStr for Mesh {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let mut axes = vec![];
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let parsed =
                part.split_once('=').and_then(|(name, size)| Some((name.trim(), size.trim().parse().ok()?)));
            axes.push(parsed.ok_or_else(|| {
                PlanError::Mesh(format!("{part:?} is not NAME=SIZE, as in data=2,tensor=2"))
            })?);
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
            seen.insert(AXES.map(|axis| mesh.coordinate(rank, axis)));
        }
        assert_eq!(seen.len(), 24);
        assert_eq!(mesh.coordinate(1, "tensor"), 1);
        assert_eq!((mesh.workers(), mesh.worker(23)), (4, 3));
    }

    #[test]
    fn what_is_no_mesh_is_refused() {
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
        assert!(mesh.fits(4).is_ok());
        assert!(mesh.fits(8).unwrap_err().to_string().contains("use data=4,tensor=2, or start 4 ranks"));
        assert!(mesh.fits(3).unwrap_err().to_string().contains("start 4 ranks"));
    }
}
