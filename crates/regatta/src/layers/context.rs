//! What a forward pass knows beside its batch.

use crate::random::Stream;
use burn::tensor::Tensor;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

/// What a forward pass knows beside its batch.
#[derive(Debug, Clone, Default)]
pub struct Context {
    noise: Option<Stream>,
    cache: Option<Rc<RefCell<Cache>>>,
}

/// Keys and values of the tokens that have gone through a model's attention layers so far.
#[derive(Debug, Default)]
pub struct Cache {
    /// Tokens so far.
    past: usize,
    /// By block: keys and values, `[batch, heads, past, head]`.
    layers: HashMap<usize, (Tensor<4>, Tensor<4>)>,
}

impl Context {
    /// Evaluation: nothing random.
    pub fn eval() -> Self {
        Self::default()
    }

    /// Training; `noise` must differ from one micro-step and worker to the next.
    pub fn train(noise: Stream) -> Self {
        Self { noise: Some(noise), cache: None }
    }

    /// Generation: the tokens given are new ones, attention sees them and all that were given before.
    pub fn cached() -> Self {
        Self { noise: None, cache: Some(Rc::default()) }
    }

    /// Whether the model is to learn from this pass.
    pub fn learns(&self) -> bool {
        self.noise.is_some()
    }

    /// The random numbers of a place in the model, so that no two places share a mask; none in evaluation.
    pub fn noise(&self, place: u64) -> Option<Stream> {
        self.noise.map(|noise| noise.at(place))
    }

    /// Tokens that went through before these.
    pub fn past(&self) -> usize {
        self.cache.as_ref().map_or(0, |cache| cache.borrow().past)
    }

    /// Counts `tokens` more as gone through, once all blocks have seen them.
    pub fn advance(&self, tokens: usize) {
        if let Some(cache) = &self.cache {
            cache.borrow_mut().past += tokens;
        }
    }

    /// Forgets all tokens.
    pub fn forget(&self) {
        if let Some(cache) = &self.cache {
            *cache.borrow_mut() = Cache::default();
        }
    }

    /// Whether keys and values are kept, as in generation.
    pub(crate) fn remembers(&self) -> bool {
        self.cache.is_some()
    }

    /// Keys and values of all tokens, from those of the new ones, `[batch, heads, time, head]`.
    pub(crate) fn remember(
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
