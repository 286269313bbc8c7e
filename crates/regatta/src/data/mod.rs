//! Data in files: text and its tokens, images, and the order in which ranks see samples.
//!
//! Text becomes samples in four steps: it is read and split, a [`Tokenizer`](tokenizer::Tokenizer) encodes it, the
//! tokens are written to a file, and samples are cut from this file. Images come from MNIST ([`mnist`]) and CIFAR-10,
//! or are generated. A sampler chooses a rank's next samples, and a thread prepares them ahead.
//!
//! Results depend only on inputs and seeds: the same files give the same batches on every machine and for every number
//! of ranks. A checkpoint stores a position in the order of samples, so the order and the cuts must not change.

mod bpe;
mod bpe_trainer;
pub(crate) mod cifar10;
pub(crate) mod decode;
pub(crate) mod digests;
pub(crate) mod hash;
pub mod mnist;
pub mod notice;
pub(crate) mod prefetch;
pub mod prepared;
pub(crate) mod rust_corpus;
pub(crate) mod sampler;
pub(crate) mod source;
pub(crate) mod synthetic;
pub(crate) mod text;
pub mod tokenizer;
pub(crate) mod tokens;
mod words;
