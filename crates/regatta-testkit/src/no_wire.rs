//! A replacement for systems without TAP devices. Hosts cannot be made there, so nothing here is called.

use crate::{Link, Unavailable};

pub(crate) struct Wire;

pub(crate) fn card(_: usize) -> [u8; 6] {
    [0; 6]
}

impl Wire {
    pub(crate) fn new() -> Result<Self, Unavailable> {
        Err(Unavailable("only Linux has TAP devices".into()))
    }

    pub(crate) fn add(&mut self, _: &str) -> Result<(), Unavailable> {
        Err(Unavailable("only Linux has TAP devices".into()))
    }

    pub(crate) fn plug(&self, _: usize, _: bool) {}

    pub(crate) fn shape(&self, _: usize, _: &Link) -> Result<(), Unavailable> {
        Err(Unavailable("only Linux has TAP devices".into()))
    }
}
