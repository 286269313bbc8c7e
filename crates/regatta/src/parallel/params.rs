//! The parameters of a model in memory of our own, in the layout of the gradient buckets.

use super::layout::{Layout, param_specs};
use crate::autograd::{Memory, to_vec, view};
use crate::error::{Error, Result};
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::Tensor;
use regatta_comm::Group;
use std::any::Any;
use std::sync::Arc;

/// Owns the numbers that a model's parameters view. The optimizer updates them in place, bucket by bucket.
pub struct ParamStore {
    layout: Arc<Layout>,
    buckets: Vec<Arc<Memory>>,
    /// A second handle to every view, so that no kernel of Burn takes the memory for its own.
    _views: Vec<Box<dyn Any + Send>>,
}

impl ParamStore {
    /// Moves the parameters of `model` into a new store and returns the model over it.
    ///
    /// # Errors
    /// A trainable parameter that is not f32.
    pub fn adopt<M: Module>(model: M, bucket_bytes: usize) -> Result<(M, Self)> {
        let layout = Arc::new(Layout::new(param_specs(&model)?, bucket_bytes));
        let buckets: Vec<_> = layout.bucket_lens.iter().map(|&len| Memory::zeroed(len)).collect();
        let mut adopt = Adopt { layout: &layout, buckets: &buckets, path: vec![], views: vec![] };
        let model = model.map(&mut adopt);
        let views = adopt.views;
        Ok((model, Self { layout, buckets, _views: views }))
    }

    /// Where each parameter lies.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The numbers of a bucket.
    pub fn bucket(&self, bucket: usize) -> &[f32] {
        // SAFETY: the only writer is `bucket_mut`, which takes `&mut self`.
        unsafe { self.buckets[bucket].slice() }
    }

    /// The numbers of a bucket, to write. The model sees them at once, so no forward or backward pass of it
    /// may be running: the caller is the thread that trains the model.
    pub fn bucket_mut(&mut self, bucket: usize) -> &mut [f32] {
        let memory = &self.buckets[bucket];
        // SAFETY: `&mut self` excludes other slices; the engine trains on the thread that holds the store.
        unsafe { memory.slice_mut(0..memory.len()) }
    }

    /// The numbers of one parameter.
    pub fn param(&self, index: usize) -> &[f32] {
        let place = &self.layout.places[index];
        &self.bucket(place.bucket)[place.range.clone()]
    }

    /// The numbers of one parameter, to write; see [`bucket_mut`](Self::bucket_mut).
    pub fn param_mut(&mut self, index: usize) -> &mut [f32] {
        let place = self.layout.places[index].clone();
        &mut self.bucket_mut(place.bucket)[place.range]
    }

    /// Gives every rank the parameters of `root`.
    pub fn broadcast(&mut self, group: &Group, root: usize) -> Result<()> {
        for bucket in 0..self.buckets.len() {
            group.broadcast(self.bucket_mut(bucket), root)?;
        }
        Ok(())
    }

    /// A hash of all parameters (64-bit FNV-1a over their bits, in the order of the layout).
    pub fn hash(&self) -> u64 {
        let bits = (0..self.layout.specs.len()).flat_map(|i| self.param(i)).map(|x| x.to_bits());
        bits.fold(0xcbf2_9ce4_8422_2325, |hash, word| (hash ^ u64::from(word)).wrapping_mul(0x0100_0000_01b3))
    }

    /// Checks that every rank of `group` holds the same parameters, bit for bit.
    ///
    /// # Errors
    /// Names the ranks that differ from rank 0.
    pub fn check_identical(&self, group: &Group) -> Result<u64> {
        let mine = self.hash();
        let mut hashes = vec![0i64; group.size()];
        group.all_gather(&[mine.cast_signed()], &mut hashes)?;
        let differ: Vec<_> = (0..hashes.len())
            .filter(|&rank| hashes[rank] != hashes[0])
            .map(|rank| rank.to_string())
            .collect();
        if differ.is_empty() {
            return Ok(mine);
        }
        Err(Error::Numeric(format!(
            "the parameters of rank {} differ from rank 0's (hashes {hashes:x?}): the ranks have drifted apart; \
             resume from the last checkpoint",
            differ.join(", ")
        )))
    }
}

struct Adopt<'a> {
    layout: &'a Layout,
    buckets: &'a [Arc<Memory>],
    path: Vec<String>,
    views: Vec<Box<dyn Any + Send>>,
}

impl ModuleMapper for Adopt<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(index) = self.layout.find(&self.path.join(".")) else { return param };
        let place = &self.layout.places[index];
        let memory = &self.buckets[place.bucket];
        let (id, tensor, mapper) = param.consume();
        let shape = tensor.dims();
        if let Some(values) = to_vec(tensor) {
            // SAFETY: this part of the block is not yet viewed by any tensor.
            unsafe { memory.slice_mut(place.range.clone()) }.copy_from_slice(&values);
        }
        let tensor: Tensor<D> = view(memory, place.range.start, shape);
        self.views.push(Box::new(tensor.clone()));
        Param::from_mapped_value(id, Tensor::from_inner(tensor).require_grad(), mapper)
    }
}
