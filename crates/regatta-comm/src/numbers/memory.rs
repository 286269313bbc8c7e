//! Memory whose type of numbers is known only when the program runs, as operations read and write it.

use crate::error::{Error, Result};
use crate::numbers::element::Element;
use std::fmt;

/// Where memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Space {
    /// The host's memory, which the processor reads and writes.
    Host,
    /// The memory of the device with this number, which only the device's own libraries can reach.
    Device(u32),
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("the host"),
            Self::Device(number) => write!(f, "device {number}"),
        }
    }
}

/// Memory of a device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OnDevice {
    pub number: u32,
    /// An address of the device's; nothing here reads it.
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "for the backend of a device, of which there is none yet")
    )]
    pub start: *mut u8,
    pub bytes: usize,
}

/// What an operation reads.
#[derive(Clone, Copy)]
pub(crate) enum Input<'a> {
    /// Aligned for its type of numbers.
    Host(&'a [u8]),
    Device(OnDevice),
}

/// What an operation writes.
pub(crate) enum Output<'a> {
    /// Aligned for its type of numbers.
    Host(&'a mut [u8]),
    Device(OnDevice),
}

impl<'a> Input<'a> {
    pub(crate) fn of<T: Element>(numbers: &'a [T]) -> Self {
        Self::Host(bytemuck::cast_slice(numbers))
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Host(bytes) => bytes.len(),
            Self::Device(memory) => memory.bytes,
        }
    }

    pub(crate) fn space(&self) -> Space {
        match self {
            Self::Host(_) => Space::Host,
            Self::Device(memory) => Space::Device(memory.number),
        }
    }

    pub(crate) fn host<T: Element>(self) -> Result<&'a [T]> {
        match self {
            Self::Host(bytes) => Ok(bytemuck::cast_slice(bytes)),
            Self::Device(memory) => Err(not_here(memory)),
        }
    }
}

impl<'a> Output<'a> {
    pub(crate) fn of<T: Element>(numbers: &'a mut [T]) -> Self {
        Self::Host(bytemuck::cast_slice_mut(numbers))
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Host(bytes) => bytes.len(),
            Self::Device(memory) => memory.bytes,
        }
    }

    pub(crate) fn space(&self) -> Space {
        match self {
            Self::Host(_) => Space::Host,
            Self::Device(memory) => Space::Device(memory.number),
        }
    }

    pub(crate) fn host<T: Element>(&mut self) -> Result<&mut [T]> {
        match self {
            Self::Host(bytes) => Ok(bytemuck::cast_slice_mut(bytes)),
            Self::Device(memory) => Err(not_here(*memory)),
        }
    }
}

/// An operation is not begun where its backend does not serve the memory.
fn not_here(memory: OnDevice) -> Error {
    Error::Internal(format!("memory of device {} was given to a backend for host memory", memory.number))
}
