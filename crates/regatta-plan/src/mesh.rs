//! Named axes of ranks (Shazeer et al. 2018, "Mesh-TensorFlow", section 3).

use serde::{Deserialize, Serialize};
use std::fmt;

/// An ordered list of named axes; their product is the world size. The last axis varies fastest with the rank.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Mesh(Vec<(String, usize)>);

impl Mesh {
    /// One axis, `data`: every rank holds the whole model and sees its own part of the batch.
    pub fn data(workers: usize) -> Self {
        Self(vec![("data".into(), workers)])
    }

    /// Size of the named axis; 1 where the mesh does not have it.
    pub fn axis(&self, name: &str) -> usize {
        self.0.iter().find(|(axis, _)| axis == name).map_or(1, |(_, size)| *size)
    }

    /// Ranks in the mesh.
    pub fn size(&self) -> usize {
        self.0.iter().map(|(_, size)| size).product()
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
