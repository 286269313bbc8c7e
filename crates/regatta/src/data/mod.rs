//! What models learn from: text as tokens, pictures as pixels, and the order in which ranks see them.
//!
//! Text becomes samples in four steps: [`text`] or [`rust_corpus`] reads and splits it, a
//! [`Tokenizer`](tokenizer::Tokenizer) encodes it, a [`TokenFile`](tokens::TokenFile) keeps the tokens on disk, and
//! [`Windows`](tokens::Windows) cuts samples from them. Pictures come from [`mnist`] and
//! [`cifar10`], or are made up ([`synthetic`]). A [`Sampler`](sampler::Sampler)
//! says which samples a rank takes next, and [`Prefetch`](prefetch::Prefetch) prepares them ahead.
//!
//! Everything here depends on its inputs and seeds alone: the same files give the same batches on every machine and
//! for every number of ranks. Orders and cuts are part of what a checkpoint means and must not change.

mod bpe;
mod bpe_trainer;
pub mod cifar10;
pub(crate) mod decode;
pub(crate) mod digests;
pub mod mnist;
pub mod notice;
pub mod prefetch;
pub mod prepared;
pub mod rust_corpus;
pub mod sampler;
pub(crate) mod source;
pub mod synthetic;
pub mod text;
pub mod tokenizer;
pub mod tokens;
mod words;
