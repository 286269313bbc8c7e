//! The configuration of a model of any kind.

use super::batch::Batch;
use super::border::Border;
use super::model::{BlockCost, Model};
use super::spec::{Limit, ModelSpec, Problem, Samples};
use crate::autograd::{Compute, device};
use crate::error::{Error, Result};
use crate::params::{Leaves, ParamBuilder, ParamStore, PlacedParam, Placement, bind, undeclared};
use burn::module::Module;
use burn::tensor::{Int, Tensor};
use regatta_plan::{Axis, SPLITTABLE_DIMS};
use std::any::Any;
use std::fmt;
use std::sync::Arc;
use toml::{Table, Value};

/// The section `[model]` of a configuration, for any registered kind of model ([`register`](super::register)).
#[derive(Clone)]
pub struct ModelConfig(Arc<dyn AnySpec>);

/// A model whose parameters are in the memory of a store.
pub(crate) struct BuiltModel {
    /// The model with autodiff.
    pub model: Box<dyn Model>,
    /// The same model without autodiff.
    pub evaluator: Box<dyn Model>,
    /// The parameters as leaves of the model's graphs.
    pub leaves: Leaves,
    /// The memory of the parameters.
    pub store: ParamStore,
    /// Whether the model has parameters that the `ParamBuilder` did not create.
    pub has_undeclared: bool,
}

/// [`ModelSpec`] as an object.
trait AnySpec: fmt::Debug + Send + Sync {
    fn kind(&self) -> &'static str;
    fn samples(&self) -> Samples;
    fn costs(&self, classes: usize) -> Vec<BlockCost>;
    fn borders(&self, block: usize) -> Vec<Border>;
    fn limits(&self) -> Vec<Limit>;
    fn check(&self) -> Result<(), Problem>;
    fn host_only(&self) -> Option<&'static str>;
    fn context(&self) -> Option<usize>;
    fn describe(&self, classes: usize, placement: Placement) -> Result<(Box<dyn Model>, Vec<PlacedParam>)>;
    fn build(&self, classes: usize, params: ParamBuilder, compute: &Compute) -> Result<BuiltModel>;
    fn table(&self) -> Result<Table, toml::ser::Error>;
    fn equals(&self, other: &dyn AnySpec) -> bool;
    fn as_any(&self) -> &dyn Any;
}

impl<S: ModelSpec> AnySpec for S {
    fn kind(&self) -> &'static str {
        S::KIND
    }

    fn samples(&self) -> Samples {
        ModelSpec::samples(self)
    }

    fn costs(&self, classes: usize) -> Vec<BlockCost> {
        ModelSpec::costs(self, classes)
    }

    fn borders(&self, block: usize) -> Vec<Border> {
        ModelSpec::borders(self, block)
    }

    fn limits(&self) -> Vec<Limit> {
        ModelSpec::limits(self)
    }

    fn check(&self) -> Result<(), Problem> {
        ModelSpec::check(self)
    }

    fn host_only(&self) -> Option<&'static str> {
        ModelSpec::host_only(self)
    }

    fn context(&self) -> Option<usize> {
        ModelSpec::context(self)
    }

    fn describe(&self, classes: usize, placement: Placement) -> Result<(Box<dyn Model>, Vec<PlacedParam>)> {
        let tensor = placement.mesh.axis(Axis::Tensor);
        let params = ParamBuilder::describing(placement);
        let model = ModelSpec::build(self, classes, &params);
        let (blocks, costs) = (model.num_blocks(), ModelSpec::costs(self, classes).len());
        if costs != blocks {
            return Err(Error::Usage(format!(
                "the model {} has {blocks} blocks, and ModelSpec::costs has {costs} entries",
                S::KIND
            )));
        }
        let mut declared = params.declared();
        if let Some(param) = declared.iter().find(|param| param.blocks.is_empty()) {
            return Err(Error::Usage(format!(
                "the parameter {} has no block: create it with params.of_blocks(&[..]) of the blocks that use it",
                param.spec.path
            )));
        }
        if let Some(param) = declared.iter().find(|param| param.blocks.iter().any(|block| *block >= blocks)) {
            return Err(Error::Usage(format!(
                "the parameter {} is of the blocks {:?}, and the model has the blocks 0 to {}",
                param.spec.path,
                param.blocks,
                blocks.saturating_sub(1)
            )));
        }
        let undeclared = undeclared(&model, &declared, blocks)?;
        if let (Some(param), true) = (undeclared.first(), tensor > 1) {
            return Err(Error::Usage(format!(
                "a model with parameters that the ParamBuilder did not create ({}) cannot be split over the axis tensor; \
                 use data and replica",
                param.spec.path
            )));
        }
        declared.extend(undeclared);
        Ok((Box::new(model), declared))
    }

    fn build(&self, classes: usize, params: ParamBuilder, compute: &Compute) -> Result<BuiltModel> {
        let mut model = ModelSpec::build(self, classes, &params);
        let has_undeclared = !undeclared(&model, &params.declared(), 1)?.is_empty();
        if has_undeclared {
            // Burn's layers may have been created on a device without gradients.
            model = model.train();
        }
        let no_store = || Error::Usage("the model was built without a parameter store".into());
        let mut store = params.into_store().ok_or_else(no_store)?;
        let bound = bind(model, &mut store, compute);
        Ok(BuiltModel {
            model: Box::new(bound.model),
            evaluator: Box::new(bound.evaluator),
            leaves: bound.leaves,
            store,
            has_undeclared,
        })
    }

    fn table(&self) -> Result<Table, toml::ser::Error> {
        Table::try_from(self)
    }

    fn equals(&self, other: &dyn AnySpec) -> bool {
        other.as_any().downcast_ref::<S>() == Some(self)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl ModelConfig {
    /// The configuration of the model that `spec` describes.
    pub fn new<S: ModelSpec>(spec: S) -> Self {
        Self(Arc::new(spec))
    }

    /// The configuration as type `S`; none if the model is of another type.
    pub fn get<S: ModelSpec>(&self) -> Option<&S> {
        self.0.as_any().downcast_ref()
    }

    /// The kind of the model.
    pub fn kind(&self) -> &'static str {
        self.0.kind()
    }

    /// The kind of samples that the model is trained on.
    pub fn samples(&self) -> Samples {
        self.0.samples()
    }

    /// The cost of each block for one sample, for a vocabulary of `classes` tokens or for `classes` classes of images.
    pub fn costs(&self, classes: usize) -> Vec<BlockCost> {
        self.0.costs(classes)
    }

    /// The borders of split layers in `block`, in the order of the forward pass.
    pub fn borders(&self, block: usize) -> Vec<Border> {
        self.0.borders(block)
    }

    pub(crate) fn limits(&self) -> Vec<Limit> {
        self.0.limits()
    }

    pub(crate) fn check(&self) -> Result<(), Problem> {
        self.0.check()
    }

    pub(crate) fn host_only(&self) -> Option<&'static str> {
        self.0.host_only()
    }

    /// The longest text in tokens; none if the model does not generate text.
    pub fn context(&self) -> Option<usize> {
        self.0.context()
    }

    /// The parts of all parameters that a rank at `placement` holds, if it holds all blocks.
    ///
    /// # Errors
    /// The model has several blocks, and a parameter that the `ParamBuilder` did not create.
    pub(crate) fn describe(&self, classes: usize, placement: Placement) -> Result<Vec<PlacedParam>> {
        self.0.describe(classes, placement).map(|(_, params)| params)
    }

    /// The number of trainable parameters of the whole model, for `classes` tokens or classes.
    ///
    /// # Errors
    /// The model has several blocks, and a parameter that the [`ParamBuilder`] did not create.
    pub fn num_params(&self, classes: usize) -> Result<usize> {
        let params = self.describe(classes, Placement::whole())?;
        Ok(params.iter().filter(|param| !param.statistic).map(|param| param.spec.len()).sum())
    }

    /// Builds the model with its parameters in the store of `params`, to run on the device of `compute`.
    ///
    /// # Errors
    /// `params` has no store.
    pub(crate) fn build(
        &self,
        classes: usize,
        params: ParamBuilder,
        compute: &Compute,
    ) -> Result<BuiltModel> {
        self.0.build(classes, params, compute)
    }

    /// For each block, the shapes that it returns for a micro-batch of `rows` samples on a rank at `placement`.
    ///
    /// # Errors
    /// As [`describe`](Self::describe).
    pub(crate) fn output_shapes(
        &self,
        classes: usize,
        placement: Placement,
        rows: usize,
    ) -> Result<Vec<Vec<Vec<usize>>>> {
        let (model, _) = self.0.describe(classes, placement)?;
        // Only shapes matter. Tensors that repeat one number take no memory, however large the batch is.
        let ids = |time: usize| Tensor::<2, Int>::zeros([1, 1], &device()).expand([rows, time]);
        let batch = match self.samples() {
            Samples::Text { time } => Batch::Text { inputs: ids(time), targets: ids(time) },
            Samples::Pairs { source_time, time } => {
                Batch::Pairs { sources: ids(source_time), inputs: ids(time), targets: ids(time) }
            }
            Samples::Images { height, width, channels } => Batch::Images {
                pixels: Tensor::<4>::zeros([1; 4], &device()).expand([rows, height, width, channels]),
                labels: Tensor::<1, Int>::zeros([1], &device()).expand([rows]),
            },
        };
        Ok((0..model.num_blocks()).map(|block| model.output_shapes(block, &batch)).collect())
    }

    /// For each block, the numbers that it receives from the block before for one sample: 0 for the first, which reads the
    /// batch.
    ///
    /// # Errors
    /// As [`describe`](Self::describe).
    pub(crate) fn input_sizes(&self, classes: usize) -> Result<Vec<f64>> {
        let shapes = self.output_shapes(classes, Placement::whole(), 1)?;
        let size = |shapes: &Vec<Vec<usize>>| {
            shapes.iter().map(|shape| shape.iter().map(|&dim| dim as f64).product::<f64>()).sum()
        };
        let before = shapes.iter().take(shapes.len().saturating_sub(1)).map(size);
        Ok(std::iter::once(0.0).chain(before).collect())
    }

    /// Whether layers with these parameters can be split over the tensor axis.
    pub(crate) fn splits(params: &[PlacedParam]) -> bool {
        let splittable = |name: &str| name != "batch" && SPLITTABLE_DIMS.contains(&name);
        params.iter().flat_map(|param| &param.spec.dims).any(|dim| splittable(&dim.name))
    }

    /// Whether the configuration stays the same when it is written as TOML and read again, as checkpoints do.
    pub(crate) fn survives_text(&self) -> bool {
        let text = self.table().ok().and_then(|table| toml::to_string(&table).ok());
        text.and_then(|text| toml::from_str::<Self>(&text).ok()).is_some_and(|again| again == *self)
    }

    /// The keys of the section, including `kind`.
    pub(crate) fn table(&self) -> Result<Table, toml::ser::Error> {
        let mut table = self.0.table()?;
        table.insert("kind".into(), Value::String(self.kind().into()));
        Ok(table)
    }
}

impl PartialEq for ModelConfig {
    fn eq(&self, other: &Self) -> bool {
        self.0.equals(&*other.0)
    }
}

impl fmt::Debug for ModelConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
