//! What a program uses: groups and their operations, meshes, buffers.

pub(crate) mod arrival;
pub(crate) mod buffer;
pub(crate) mod group;
pub(crate) mod mailbox;
pub(crate) mod mesh;
pub(crate) mod raw;
