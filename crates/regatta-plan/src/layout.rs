//! Layouts: which named dimension of a tensor is split over which axis of the mesh (Shazeer et al. 2018,
//! "Mesh-TensorFlow", section 3.2).

use crate::{Axis, Mesh, PlanError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

/// The dimensions that a layout may split. `embed` may not be split because a norm needs whole rows of it; `time` is
/// split by sequence parallelism only.
pub const SPLITTABLE_DIMS: [&str; 4] = ["batch", "heads", "mlp", "vocab"];

/// A named dimension.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dim {
    /// The name, as in `mlp`.
    pub name: String,
    /// The size of this dimension in the whole tensor.
    pub size: usize,
}

/// A parameter of the whole model, before it is split.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSpec {
    /// The parameter's path in the model, as in `layers.0.up.weight`.
    pub path: String,
    /// Its logical dimensions. One dimension of `shape` may consist of several of these, as `[3, heads, head]` for the
    /// input projection of attention.
    pub dims: Vec<Dim>,
    /// Its shape as stored.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// The number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the tensor has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Assigns axes of the mesh to names of dimensions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Layout(BTreeMap<String, Axis>);

impl Default for Layout {
    /// The layout of Megatron-LM (Shoeybi et al. 2019, section 3): heads, hidden units and the vocabulary are split
    /// over `tensor`, the batch over `data`.
    fn default() -> Self {
        let pairs =
            [("batch", Axis::Data), ("heads", Axis::Tensor), ("mlp", Axis::Tensor), ("vocab", Axis::Tensor)];
        Self(pairs.into_iter().map(|(dim, axis)| (dim.into(), axis)).collect())
    }
}

impl Layout {
    /// The default layout, changed by `rules` of (dimension, axis). The axis `none` leaves the dimension whole.
    ///
    /// # Errors
    /// [`PlanError::Layout`] if an axis does not exist, or if the dimension cannot be split over it.
    pub fn with<'a>(rules: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, PlanError> {
        let mut layout = Self::default();
        for (dim, name) in rules {
            if name == "none" && dim != "batch" {
                layout.0.remove(dim);
                continue;
            }
            let axis = Axis::find(name).ok_or_else(|| {
                PlanError::Layout(format!(
                    "`{dim} -> {name}`: there is no axis `{name}`; the axes are {}, or none",
                    Axis::names()
                ))
            })?;
            let allowed = if dim == "batch" { Axis::Data } else { Axis::Tensor };
            if SPLITTABLE_DIMS.contains(&dim) && axis != allowed {
                return Err(PlanError::Layout(format!(
                    "`{dim} -> {axis}`: {dim} is split over {allowed} only"
                )));
            }
            layout.0.insert(dim.into(), axis);
        }
        Ok(layout)
    }

    /// The axis over which the dimension `dim` is split; `None` if it is whole, or if that axis has one rank only.
    pub fn axis(&self, mesh: &Mesh, dim: &str) -> Option<Axis> {
        self.0.get(dim).copied().filter(|axis| mesh.axis(*axis) > 1)
    }

    /// Checks that this layout can split the tensor `spec` over `mesh`.
    ///
    /// # Errors
    /// [`PlanError::Layout`] with the tensor's path, if two dimensions are split over the same axis, or if a dimension
    /// cannot be split or does not divide evenly.
    pub fn check(&self, mesh: &Mesh, spec: &TensorSpec) -> Result<(), PlanError> {
        let refuse = |problem: String| Err(PlanError::Layout(format!("{}: {problem}", spec.path)));
        let mut used: Vec<(&Dim, Axis)> = vec![];
        for dim in &spec.dims {
            let Some(axis) = self.axis(mesh, &dim.name) else { continue };
            if let Some((other, _)) = used.iter().find(|(_, taken)| *taken == axis) {
                return refuse(format!(
                    "its dimensions {} and {} are both split over the axis {axis}; one of them must stay whole",
                    other.name, dim.name
                ));
            }
            used.push((dim, axis));
        }
        for (dim, axis) in used {
            if !SPLITTABLE_DIMS.contains(&dim.name.as_str()) {
                return refuse(format!(
                    "its dimension {} cannot be split; those that can are {}",
                    dim.name,
                    SPLITTABLE_DIMS.join(", ")
                ));
            }
            let parts = mesh.axis(axis);
            // The data determines the size of the vocabulary, so the user cannot round it: its parts may differ by
            // one.
            let divides =
                if dim.name == "vocab" { dim.size >= parts } else { dim.size.is_multiple_of(parts) };
            if !divides {
                return refuse(format!(
                    "its dimension {} of {} does not divide over the {parts} ranks of the axis {axis}",
                    dim.name, dim.size
                ));
            }
        }
        Ok(())
    }

    /// The range of each dimension of `spec` that `rank` holds, in the order of its dimensions.
    pub fn ranges(&self, mesh: &Mesh, spec: &TensorSpec, rank: usize) -> Vec<Range<usize>> {
        let range = |dim: &Dim| match self.axis(mesh, &dim.name) {
            Some(axis) => part(dim.size, mesh.axis(axis), mesh.coordinate(rank, axis)),
            None => 0..dim.size,
        };
        spec.dims.iter().map(range).collect()
    }
}

/// Part `index` of `size` items that are divided into `parts` parts as evenly as possible. The larger parts come
/// first.
///
/// ```
/// use regatta_plan::part;
/// assert_eq!([part(5, 2, 0), part(5, 2, 1)], [0..3, 3..5]);
/// ```
///
/// # Panics
/// If `parts` is 0.
pub fn part(size: usize, parts: usize, index: usize) -> Range<usize> {
    let (each, remainder) = (size / parts, size % parts);
    let start = index * each + index.min(remainder);
    start..start + each + usize::from(index < remainder)
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (dim, axis)) in self.0.iter().enumerate() {
            write!(f, "{}{dim} -> {axis}", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(dims: &[(&str, usize)]) -> TensorSpec {
        TensorSpec {
            path: "layers.0.up.weight".into(),
            dims: dims.iter().map(|(name, size)| Dim { name: name.to_string(), size: *size }).collect(),
            shape: dims.iter().map(|(_, size)| *size).collect(),
        }
    }

    #[test]
    fn parts_cover_everything_once() {
        for size in 0..20 {
            for parts in 1..6 {
                let all: Vec<usize> = (0..parts).flat_map(|index| part(size, parts, index)).collect();
                assert_eq!(all, (0..size).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn errors_of_invalid_layouts_name_the_tensor() {
        let mesh: Mesh = "tensor=2".parse().unwrap();
        let layout = Layout::default();
        assert!(layout.check(&mesh, &spec(&[("embed", 6), ("mlp", 24)])).is_ok());
        assert!(layout.check(&mesh, &spec(&[("vocab", 65), ("embed", 7)])).is_ok());
        let problem = |layout: &Layout, dims: &[(&str, usize)]| {
            layout.check(&mesh, &spec(dims)).unwrap_err().to_string()
        };
        let error = problem(&layout, &[("embed", 6), ("mlp", 7)]);
        assert!(
            error.contains("layers.0.up.weight") && error.contains("mlp of 7 does not divide"),
            "{error}"
        );
        let both = Layout::with([("embed", "tensor")]).unwrap();
        assert!(problem(&both, &[("embed", 6), ("mlp", 8)]).contains("embed and mlp are both split over"));
        assert!(problem(&both, &[("embed", 6)]).contains("cannot be split"));
        assert!(Layout::with([("heads", "pipe")]).is_err());
        assert!(Layout::with([("heads", "tenser")]).is_err());
        let whole = Layout::with([("mlp", "none")]).unwrap();
        assert!(whole.check(&mesh, &spec(&[("embed", 6), ("mlp", 7)])).is_ok());
    }

    #[test]
    fn ranges_follow_the_coordinate() {
        let mesh: Mesh = "data=2,tensor=2".parse().unwrap();
        let ranges = Layout::default().ranges(&mesh, &spec(&[("vocab", 5), ("embed", 4)]), 3);
        assert_eq!(ranges, [3..5, 0..4]);
    }
}
