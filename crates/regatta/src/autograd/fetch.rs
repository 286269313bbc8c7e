//! Fetches the numbers of tensors to the host.

use super::custom::{numbers, plain};
use super::fused;
use crate::error::{Error, Result};
use burn::backend::flex::FlexTensor;
use burn::tensor::{Tensor, Transaction};

/// A tensor of any shape whose numbers are to be fetched.
pub(crate) enum Fetchable {
    /// f32 numbers that are on the host already.
    OnHost(FlexTensor),
    /// Numbers on a device, or of another type.
    OnDevice(Tensor<1>),
}

impl Fetchable {
    /// The numbers of `tensor`.
    pub(crate) fn of<const D: usize>(tensor: Tensor<D>) -> Self {
        let tensor = super::detached(tensor);
        if fused(&tensor) {
            Self::OnHost(plain(tensor))
        } else {
            let len: usize = tensor.dims().iter().product();
            Self::OnDevice(tensor.reshape([len]))
        }
    }
}

/// Calls `take` with the f32 numbers of each tensor, in row-major order. All tensors on the device come in one transfer.
///
/// # Errors
/// The device fails, or `take` does.
pub(crate) fn fetch<K>(
    tensors: Vec<(K, Fetchable)>,
    mut take: impl FnMut(K, &[f32]) -> Result<()>,
) -> Result<()> {
    let mut transfer = Transaction::default();
    let mut keys = vec![];
    for (key, tensor) in tensors {
        match tensor {
            Fetchable::OnHost(tensor) => take(key, &numbers(&tensor))?,
            Fetchable::OnDevice(tensor) => {
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
