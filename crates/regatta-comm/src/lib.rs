//! Collective communication between ranks: threads of one process, processes on one host over shared memory,
//! processes anywhere over TCP.
//!
//! It knows bytes and numbers; no tensors and no models.
//!
//! ```
//! use regatta_comm::{Group, ReduceOp};
//!
//! let ranks: Vec<_> = Group::threads(4)
//!     .into_iter()
//!     .map(|group| {
//!         std::thread::spawn(move || {
//!             let mut data = [group.rank() as f32, 1.0];
//!             group.all_reduce(&mut data, ReduceOp::Sum)?;
//!             Ok::<_, regatta_comm::Error>(data)
//!         })
//!     })
//!     .collect();
//! for rank in ranks {
//!     assert_eq!(rank.join().unwrap()?, [6.0, 4.0]);
//! }
//! # Ok::<(), regatta_comm::Error>(())
//! ```
//!
//! Processes call [`Group::from_env`] instead, and are started by `regatta launch`, torchrun, mpirun or srun.
//!
//! - [`Group`]: all operations, blocking, with a handle ([`Pending`]), grouped, with parts of different lengths;
//!   groups within groups, and [`Mesh`] for named axes.
//! - [`Operation`] and [`RawBuffer`]: the same operations on numbers whose type is known only when the program runs.
//! - [`TransportKind`]: threads, shared memory, TCP (TLS 1.3), both by host, MPI.
//! - [`Algorithm`]: how an operation is carried out; chosen by a [`Table`].
//! - [`Options`]: deadlines, security, and what else a job may choose.
//! - [`rendezvous`]: how ranks find each other.
//!
//! Nothing hangs: every wait has a deadline ([`Options::deadline`]) and is reported before ([`Options::warn`]), a rank
//! that dies is noticed by the closing of its connection to the job's store, and ranks that call different operations
//! are told so ([`Error::Mismatch`]).

// Whatever is said goes through `say`: a closed pipe or a full disk must not end a job.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod algorithm;
mod api;
mod error;
mod execution;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod host;
mod job;
mod member;
mod numbers;
mod open_files;
pub mod rendezvous;
mod say;
mod tls;
mod transport;

pub use algorithm::Algorithm;
pub use algorithm::select::Table;
pub use api::arrival::Arrival;
pub use api::buffer::Buffer;
pub use api::group::Group;
pub use api::mailbox::{Mailbox, Message};
pub use api::mesh::Mesh;
pub use api::raw::RawBuffer;
pub use error::{Error, Result};
pub use execution::operation::Operation;
pub use execution::pending::{Pending, Timing};
pub use execution::traffic::{Traffic, Volume};
pub use half::{bf16, f16};
pub use host::{host_identity, hostname};
pub use job::options::Options;
pub use member::call::Kind;
pub use member::late::{Late, OnLate};
pub use numbers::bool::Bool;
pub use numbers::complex::Complex;
pub use numbers::element::{DType, Element, ReduceOp, Reduction, Typed};
pub use numbers::memory::Space;
pub use rendezvous::Tls;
pub use transport::TransportKind;
