//! The state of a forward pass besides its batch: the random numbers of training, the cache of generation.

use crate::random::Stream;
use burn::tensor::Tensor;
use regatta_kernel::dropout::{Noise, SampleRows};
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

/// The state of a forward pass besides its batch: the random numbers of training, the cache of generation. Clones share the
/// cache.
#[derive(Debug, Clone, Default)]
pub struct Context {
    noise: Option<Noise>,
    cache: Option<Rc<RefCell<Cache>>>,
}

/// The keys and values of earlier tokens, for the attention layers of a model.
#[derive(Debug, Default)]
struct Cache {
    /// The number of tokens in the cache.
    past: usize,
    /// The keys and values of each block, `[batch, heads, past, head]`.
    layers: HashMap<usize, (Tensor<4>, Tensor<4>)>,
}

impl Context {
    /// For evaluation: without dropout.
    pub fn eval() -> Self {
        Self::default()
    }

    /// For training: `stream` provides the random numbers of a step, and `rows` maps the rows of the micro-batch to samples
    /// of the global batch.
    pub fn train(stream: Stream, rows: SampleRows) -> Self {
        Self { noise: Some(Noise { stream, rows }), cache: None }
    }

    /// For generation: every forward pass gets new tokens, which also attend to the tokens of all passes before.
    pub fn cached() -> Self {
        Self { noise: None, cache: Some(Rc::default()) }
    }

    /// Whether this is a training pass.
    pub fn learns(&self) -> bool {
        self.noise.is_some()
    }

    /// The random numbers of the dropout number `index` in `block`. No two dropouts of a model use the same pair, so that
    /// no two share a mask. None except in training.
    pub fn noise(&self, block: usize, index: usize) -> Option<Noise> {
        self.noise
            .map(|Noise { stream, rows }| Noise { stream: stream.at(block as u64).at(index as u64), rows })
    }

    /// The number of tokens that came before this pass.
    pub fn past(&self) -> usize {
        self.cache.as_ref().map_or(0, |cache| cache.borrow().past)
    }

    /// Adds `tokens` to the count of earlier tokens. Call it after all blocks have processed them.
    pub fn advance(&self, tokens: usize) {
        if let Some(cache) = &self.cache {
            cache.borrow_mut().past += tokens;
        }
    }

    /// Empties the cache.
    pub fn forget(&self) {
        if let Some(cache) = &self.cache {
            *cache.borrow_mut() = Cache::default();
        }
    }

    /// Whether keys and values are cached, as in generation.
    pub fn has_cache(&self) -> bool {
        self.cache.is_some()
    }

    /// Adds the new tokens' `keys` and `values`, `[batch, heads, time, head]`, to the cache of `block`, and returns those of
    /// all tokens, `[batch, heads, past + time, head]`.
    pub fn append_to_cache(
        &self,
        block: usize,
        keys: Tensor<4>,
        values: Tensor<4>,
    ) -> (Tensor<4>, Tensor<4>) {
        let Some(cache) = &self.cache else { return (keys, values) };
        let mut cache = cache.borrow_mut();
        let both = match cache.layers.remove(&block) {
            Some((past_keys, past_values)) => {
                (Tensor::cat(vec![past_keys, keys], 2), Tensor::cat(vec![past_values, values], 2))
            }
            None => (keys, values),
        };
        cache.layers.insert(block, both.clone());
        both
    }
}
