//! From tensors to numbers on the host.

use super::custom::{numbers, plain};
use super::fused;
use crate::error::{Error, Result};
use burn::backend::flex::FlexTensor;
use burn::tensor::{Tensor, Transaction};

/// A tensor of any rank whose numbers are wanted on the host.
pub(crate) enum Wanted {
    /// They are there.
    Here(FlexTensor),
    /// They are on a device, or of another type.
    There(Tensor<1>),
}

impl Wanted {
    /// That of `tensor`.
    pub(crate) fn of<const D: usize>(tensor: Tensor<D>) -> Self {
        let tensor = super::detached(tensor);
        match fused(&tensor) {
            true => Self::Here(plain(tensor)),
            false => {
                let len: usize = tensor.dims().iter().product();
                Self::There(tensor.reshape([len]))
            }
        }
    }
}

/// Calls `take` with the f32 numbers of each of `wanted`, in row-major order. What is on a device comes in one transfer.
///
/// # Errors
/// Those of `take`, and a device that fails.
pub(crate) fn fetch<K>(
    wanted: Vec<(K, Wanted)>,
    mut take: impl FnMut(K, &[f32]) -> Result<()>,
) -> Result<()> {
    let mut transfer = Transaction::default();
    let mut keys = vec![];
    for (key, one) in wanted {
        match one {
            Wanted::Here(tensor) => take(key, &numbers(&tensor))?,
            Wanted::There(tensor) => {
                transfer = transfer.register(tensor);
                keys.push(key);
            }
        }
    }
    if keys.is_empty() {
        return Ok(());
    }
    let failed = |error: &dyn std::fmt::Display| Error::Numeric(format!("the device failed: {error}"));
    let data = transfer.try_execute().map_err(|error| failed(&error))?;
    for (key, data) in keys.into_iter().zip(data) {
        let values = data.try_into_vec_as::<f32>().map_err(|error| failed(&error))?;
        take(key, &values)?;
    }
    Ok(())
}
