//! A residual network for small images (He et al. 2016, "Deep Residual Learning for Image Recognition"): a 3x3 stem without
//! pooling, basic blocks, global average pooling and a linear layer.

use super::{
    Activation, Batch, BlockCost, Limit, Model, ModelSpec, Problem, Samples, at_least_one, count_correct,
    held, largest,
};
use crate::autograd::global_average_pool;
use crate::layers::{BatchNorm, Context, Convolution, Linear, ParamBuilder, cross_entropy};
use burn::module::Module;
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// Most stages of a model.
const MAX_STAGES: usize = 6;

/// The configuration of a [`Resnet`]. The default is ResNet-18 in its usual form for CIFAR-10.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ResnetConfig {
    /// Basic blocks of each stage, 1 to 6 stages. From one stage to the next, the sides of images are halved and their
    /// channels doubled.
    pub stages: Vec<usize>,
    /// Channels of the first stage.
    pub channels: usize,
    /// Height and width of an image in pixels.
    pub side: usize,
    /// Channels of an image.
    pub inputs: usize,
}

impl Default for ResnetConfig {
    fn default() -> Self {
        Self { stages: vec![2, 2, 2, 2], channels: 64, side: 32, inputs: 3 }
    }
}

/// The shape of a basic block.
#[derive(Debug, Clone, Copy)]
struct BlockShape {
    inputs: usize,
    outputs: usize,
    stride: usize,
    /// Height and width of the output in pixels.
    side: usize,
}

impl ResnetConfig {
    /// The shapes of the basic blocks.
    fn block_shapes(&self) -> Vec<BlockShape> {
        let (mut inputs, mut side) = (self.channels, self.side);
        let mut shapes = vec![];
        for (stage, &blocks) in self.stages.iter().enumerate() {
            for block in 0..blocks {
                let stride = if stage > 0 && block == 0 { 2 } else { 1 };
                let outputs = self.channels << stage;
                side = side.div_ceil(stride);
                shapes.push(BlockShape { inputs, outputs, stride, side });
                inputs = outputs;
            }
        }
        shapes
    }

    /// Channels of the last stage.
    fn features(&self) -> usize {
        self.channels << self.stages.len().saturating_sub(1)
    }

    /// The shape of each block's output for one sample.
    fn output_shapes(&self, classes: usize) -> Vec<Vec<usize>> {
        let blocks = self.block_shapes().into_iter().map(|shape| vec![shape.side, shape.side, shape.outputs]);
        let stem = vec![self.side, self.side, self.channels];
        std::iter::once(stem).chain(blocks).chain([vec![classes]]).collect()
    }
}

impl BlockShape {
    /// Whether the shortcut needs a projection, because input and output have different shapes.
    fn projects(&self) -> bool {
        self.stride != 1 || self.inputs != self.outputs
    }
}

/// A residual network for small images, `[batch, side, side, inputs]` to logits `[batch, classes]` (He et al. 2016, "Deep
/// Residual Learning for Image Recognition"). The stem, every basic block and the head are blocks.
#[derive(Module, Debug)]
pub struct Resnet {
    stem: Option<ConvNorm>,
    blocks: Vec<Option<BasicBlock>>,
    head: Option<Linear>,
    #[module(skip)]
    shapes: Vec<Vec<usize>>,
}

/// A convolution and a batch normalisation.
#[derive(Module, Debug)]
struct ConvNorm {
    convolution: Convolution,
    norm: BatchNorm,
}

/// The basic block of He et al. 2016, figure 5, left.
#[derive(Module, Debug)]
struct BasicBlock {
    convolution1: Convolution,
    norm1: BatchNorm,
    convolution2: Convolution,
    norm2: BatchNorm,
    shortcut: Option<ConvNorm>,
    #[module(skip)]
    stride: usize,
}

impl BasicBlock {
    fn new(params: &ParamBuilder, shape: BlockShape) -> Self {
        let BlockShape { inputs, outputs, stride, .. } = shape;
        let shortcut = || ConvNorm {
            convolution: Convolution::new(&params.at("shortcut.convolution"), 1, inputs, outputs, false),
            norm: BatchNorm::new(&params.at("shortcut.norm"), outputs),
        };
        Self {
            convolution1: Convolution::new(&params.at("convolution1"), 3, inputs, outputs, false),
            norm1: BatchNorm::new(&params.at("norm1"), outputs),
            convolution2: Convolution::new(&params.at("convolution2"), 3, outputs, outputs, false),
            norm2: BatchNorm::new(&params.at("norm2"), outputs),
            shortcut: shape.projects().then(shortcut),
            stride,
        }
    }

    fn forward(&self, x: Tensor<4>, context: &Context) -> Tensor<4> {
        let y = self.convolution1.forward(x.clone(), self.stride);
        let y = self.norm1.forward(y, None, true, context);
        let y = self.convolution2.forward(y, 1);
        let residual = match &self.shortcut {
            Some(ConvNorm { convolution, norm }) => {
                norm.forward(convolution.forward(x, self.stride), None, false, context)
            }
            None => x,
        };
        self.norm2.forward(y, Some(residual), true, context)
    }
}

impl Resnet {
    /// Builds the model for `classes` classes; `params` creates its parameters.
    pub fn new(config: &ResnetConfig, classes: usize, params: &ParamBuilder) -> Self {
        let stem = |params: ParamBuilder| ConvNorm {
            convolution: Convolution::new(
                &params.at("stem.convolution"),
                3,
                config.inputs,
                config.channels,
                false,
            ),
            norm: BatchNorm::new(&params.at("stem.norm"), config.channels),
        };
        let shapes = config.block_shapes();
        let block = |(index, shape): (usize, &BlockShape)| {
            let params = params.of_blocks(&[index + 1])?;
            Some(BasicBlock::new(&params.at("blocks").nth(index), *shape))
        };
        let features = config.features();
        let head = |params: ParamBuilder| {
            let deviation = (1.0 / features as f32).sqrt();
            let (inputs, outputs) = ([("inputs", features)], [("outputs", classes)]);
            Linear::columns(&params.at("head"), &inputs, &outputs, deviation, true)
        };
        Self {
            stem: params.of_blocks(&[0]).map(stem),
            blocks: shapes.iter().enumerate().map(block).collect(),
            head: params.of_blocks(&[shapes.len() + 1]).map(head),
            shapes: config.output_shapes(classes),
        }
    }
}

impl Model for Resnet {
    fn num_blocks(&self) -> usize {
        self.blocks.len() + 2
    }

    fn forward_block(&self, block: usize, input: Activation, batch: &Batch, context: &Context) -> Activation {
        if block == 0 {
            let ConvNorm { convolution, norm } = held(&self.stem);
            let x = convolution.forward(batch.images().0.clone(), 1);
            return Activation::Four(norm.forward(x, None, true, context));
        }
        match self.blocks.get(block - 1) {
            Some(block) => Activation::Four(held(block).forward(input.four(), context)),
            None => Activation::Two(held(&self.head).forward(global_average_pool(input.four()))),
        }
    }

    fn loss(&self, output: Activation, batch: &Batch) -> Tensor<1> {
        cross_entropy(output.two(), batch.images().1.clone())
    }

    fn correct(&self, output: &Activation, batch: &Batch) -> Option<usize> {
        Some(count_correct(&output.clone().two(), batch.images().1))
    }

    fn output_shapes(&self, block: usize, batch: &Batch) -> Vec<Vec<usize>> {
        vec![[&[batch.rows()], &self.shapes[block][..]].concat()]
    }
}

impl ModelSpec for ResnetConfig {
    const KIND: &'static str = "resnet";
    type Model = Resnet;

    fn samples(&self) -> Samples {
        Samples::Images { height: self.side, width: self.side, channels: self.inputs }
    }

    fn build(&self, classes: usize, params: &ParamBuilder) -> Resnet {
        Resnet::new(self, classes, params)
    }

    fn costs(&self, classes: usize) -> Vec<BlockCost> {
        let convolution = |kernel: usize, inputs: usize, outputs: usize, side: usize| {
            2.0 * (kernel * kernel * inputs * outputs * side * side) as f64
        };
        let pixels = self.side * self.side;
        let mut costs = vec![BlockCost {
            name: "stem".into(),
            flops: convolution(3, self.inputs, self.channels, self.side),
            // The image, and the input and the output of the normalisation.
            kept: (pixels * (self.inputs + 2 * self.channels)) as f64,
            unsplit: 0.0,
        }];
        for (index, shape) in self.block_shapes().into_iter().enumerate() {
            let BlockShape { inputs, outputs, side, .. } = shape;
            let (mut flops, mut kept) = (convolution(3, inputs, outputs, side), 4 * outputs * side * side);
            flops += convolution(3, outputs, outputs, side);
            if shape.projects() {
                flops += convolution(1, inputs, outputs, side);
                kept += outputs * side * side;
            }
            costs.push(BlockCost { name: format!("block {index}"), flops, kept: kept as f64, unsplit: 0.0 });
        }
        let features = self.features();
        let kept = (features + 2 * classes) as f64;
        let flops = 2.0 * (features * classes) as f64;
        costs.push(BlockCost { name: "head".into(), flops, kept, unsplit: 0.0 });
        costs
    }

    fn limits(&self) -> Vec<Limit> {
        let blocks = self.stages.iter().copied().fold(0, usize::saturating_add);
        vec![
            ("stages", blocks, largest::LAYERS),
            ("channels", self.channels, largest::CHANNELS),
            ("side", self.side, largest::SIDE),
            ("inputs", self.inputs, largest::CHANNELS),
        ]
    }

    fn check(&self) -> Result<(), Problem> {
        at_least_one([("channels", self.channels), ("side", self.side), ("inputs", self.inputs)])?;
        if !(1..=MAX_STAGES).contains(&self.stages.len()) || self.stages.contains(&0) {
            let problem = format!("must have 1 to {MAX_STAGES} stages, each with at least 1 block");
            return Err(Problem::new("stages", problem));
        }
        Ok(())
    }

    fn host_only(&self) -> Option<&'static str> {
        Some("batch normalisation computes its running statistics only on the cpu")
    }
}
