//! The layout of parameters in buckets, in reverse order of the model. Each bucket is contiguous memory.

use crate::error::{Error, Result};
use crate::params::{ParamVisitor, visit_params};
use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};
use std::collections::HashMap;
use std::ops::Range;

/// Elements of a cache line, on which parameters are aligned.
const ALIGN: usize = 16;

/// A trainable parameter of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamSpec {
    /// Its path in the module, as in `layers.0.mlp.up.weight`; the same on every rank and in every run.
    pub path: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its number of elements.
    pub len: usize,
}

struct Specs {
    found: Vec<ParamSpec>,
    unsupported: Option<(String, DType)>,
}

impl ParamVisitor for Specs {
    fn float<const D: usize>(&mut self, path: String, param: &Param<Tensor<D>>) {
        let base = param.base();
        if !base.is_require_grad() {
            return;
        }
        if !matches!(base.dtype(), DType::F32 | DType::F16 | DType::BF16) {
            self.unsupported.get_or_insert((path, base.dtype()));
            return;
        }
        let shape = base.dims().to_vec();
        self.found.push(ParamSpec { path, len: shape.iter().product(), shape });
    }
}

/// The trainable parameters of `model`, in the order in which the module lists them.
///
/// # Errors
/// A trainable parameter is f64 or quantized: f32 cannot hold its gradient.
pub fn param_specs<M: Module>(model: &M) -> Result<Vec<ParamSpec>> {
    let specs = visit_params(model, Specs { found: vec![], unsupported: None });
    match specs.unsupported {
        None => Ok(specs.found),
        Some((path, dtype)) => Err(Error::Usage(format!(
            "parameter {path} is {dtype:?}; gradients are averaged as f32: make it f32, f16 or bf16, or freeze it"
        ))),
    }
}

/// The place of one parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Index of the bucket.
    pub bucket: usize,
    /// Its elements in the bucket.
    pub range: Range<usize>,
}

/// The layout of a model's parameters in buckets, equal on every rank: parameters in reverse order, because
/// backward completes the gradients of the last ones first.
#[derive(Debug, Clone)]
pub struct Buckets {
    /// The parameters in the order of the module.
    pub specs: Vec<ParamSpec>,
    /// The place of each of them.
    pub places: Vec<Place>,
    /// Number of elements of each bucket, including the padding between parameters.
    pub bucket_lens: Vec<usize>,
    index: HashMap<String, usize>,
}

impl Buckets {
    /// Places `specs` in buckets of at most `bucket_bytes` bytes; a larger parameter gets its own bucket.
    pub fn new(specs: Vec<ParamSpec>, bucket_bytes: usize) -> Self {
        let sizes: Vec<usize> =
            specs.iter().rev().map(|s| s.len.next_multiple_of(ALIGN) * size_of::<f32>()).collect();
        let cap = regatta_plan::bucket_cap(sizes.iter().sum(), bucket_bytes);
        let mut places = vec![Place { bucket: 0, range: 0..0 }; specs.len()];
        let mut bucket_lens = vec![];
        for (bucket, range) in regatta_plan::buckets(&sizes, cap).into_iter().enumerate() {
            let mut offset = 0;
            for i in range.map(|reversed| specs.len() - 1 - reversed) {
                places[i] = Place { bucket, range: offset..offset + specs[i].len };
                offset += specs[i].len.next_multiple_of(ALIGN);
            }
            bucket_lens.push(offset);
        }
        let index = specs.iter().enumerate().map(|(i, spec)| (spec.path.clone(), i)).collect();
        Self { specs, places, bucket_lens, index }
    }

    /// The index of the parameter at `path`.
    pub fn find(&self, path: &str) -> Option<usize> {
        self.index.get(path).copied()
    }

    /// The indices of the parameters in `bucket`, in the order of their places.
    pub fn in_bucket(&self, bucket: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.specs.len()).rev().filter(move |&i| self.places[i].bucket == bucket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_do_not_overlap_and_follow_reverse_order() {
        let lens = [7, 300_000, 16, 1, 500_000, 3];
        let specs = lens.iter().enumerate().map(|(i, &len)| ParamSpec {
            path: format!("p{i}"),
            shape: vec![len],
            len,
        });
        let layout = Buckets::new(specs.collect(), 25 << 20);
        assert_eq!(layout.bucket_lens.len(), 5);
        let mut order = vec![];
        for bucket in 0..layout.bucket_lens.len() {
            let mut end = 0;
            for i in layout.in_bucket(bucket) {
                let range = &layout.places[i].range;
                assert!(range.start >= end && range.start.is_multiple_of(ALIGN) && range.len() == lens[i]);
                end = range.end;
                order.push(i);
            }
            assert!(end <= layout.bucket_lens[bucket]);
        }
        assert_eq!(order, [5, 4, 3, 2, 1, 0]);
        assert_eq!(layout.find("p3"), Some(3));
        assert_eq!(layout.find("q"), None);
    }
}
