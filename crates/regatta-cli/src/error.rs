//! What ends the program with a message: any error that prints as a sentence.

/// The program's result.
pub type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;
