//! What models learn from: text as tokens, digits as pixels, and the order in which ranks see them.

pub mod mnist;
pub mod prefetch;
pub mod rust_corpus;
pub mod sampler;
pub mod text;
pub mod tokenizer;
pub mod tokens;
