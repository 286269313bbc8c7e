//! Ranks that an MPI library connects.
