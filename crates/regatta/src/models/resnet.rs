//! A residual network for small pictures (He et al. 2016, "Deep Residual Learning for Image Recognition"): basic blocks, a
//! 3x3 stem without pooling in front of them, and a linear layer behind the mean over all places.

use super::gpt::held;
use super::{Activation, Batch, BlockCost, Model, count_correct, images};
use crate::autograd::mean_of_places;
use crate::layers::{BatchNorm, Context, Convolution, Init, Linear, cross_entropy};
use burn::module::Module;
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// Shape of a [`Resnet`]; the default is ResNet-18 as it is used for CIFAR-10.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ResnetConfig {
    /// Blocks of each stage. From one stage to the next images lose half of their sides and double their channels.
    pub stages: Vec<usize>,
    /// Channels of the first stage.
    pub channels: usize,
    /// Rows and columns of a picture.
    pub side: usize,
    /// Channels of a picture.
    pub inputs: usize,
}

impl Default for ResnetConfig {
    fn default() -> Self {
        Self { stages: vec![2, 2, 2, 2], channels: 64, side: 32, inputs: 3 }
    }
}

/// Shape of one basic block.
#[derive(Debug, Clone, Copy)]
struct Place {
    inputs: usize,
    outputs: usize,
    stride: usize,
    /// Rows and columns of what comes out.
    side: usize,
}

impl ResnetConfig {
    /// The basic blocks in their order.
    fn places(&self) -> Vec<Place> {
        let (mut inputs, mut side) = (self.channels, self.side);
        let mut places = vec![];
        for (stage, &blocks) in self.stages.iter().enumerate() {
            for block in 0..blocks {
                let stride = if stage > 0 && block == 0 { 2 } else { 1 };
                let outputs = self.channels << stage;
                side = side.div_ceil(stride);
                places.push(Place { inputs, outputs, stride, side });
                inputs = outputs;
            }
        }
        places
    }

    /// Channels behind the last block.
    fn features(&self) -> usize {
        self.channels << self.stages.len().saturating_sub(1)
    }

    /// What each block hands on for one sample.
    fn shapes(&self, classes: usize) -> Vec<Vec<usize>> {
        let places = self.places().into_iter().map(|place| vec![place.side, place.side, place.outputs]);
        let stem = vec![self.side, self.side, self.channels];
        std::iter::once(stem).chain(places).chain([vec![classes]]).collect()
    }

    /// Numbers that each block hands on for one sample.
    pub(crate) fn outputs(&self, classes: usize) -> Vec<usize> {
        self.shapes(classes).iter().map(|shape| shape.iter().product()).collect()
    }

    /// What each block costs for one sample.
    pub fn costs(&self, classes: usize) -> Vec<BlockCost> {
        let convolution = |kernel: usize, inputs: usize, outputs: usize, side: usize| {
            2.0 * (kernel * kernel * inputs * outputs * side * side) as f64
        };
        let pixels = self.side * self.side;
        let mut costs = vec![BlockCost {
            name: "stem".into(),
            flops: convolution(3, self.inputs, self.channels, self.side),
            // Its input, and what goes into and comes out of the normalisation.
            kept: (pixels * (self.inputs + 2 * self.channels)) as f64,
        }];
        for (index, place) in self.places().into_iter().enumerate() {
            let Place { inputs, outputs, side, .. } = place;
            let (mut flops, mut kept) = (convolution(3, inputs, outputs, side), 4 * outputs * side * side);
            flops += convolution(3, outputs, outputs, side);
            if place.projects() {
                flops += convolution(1, inputs, outputs, side);
                kept += outputs * side * side;
            }
            costs.push(BlockCost { name: format!("block {index}"), flops, kept: kept as f64 });
        }
        let features = self.features();
        let kept = (features + 2 * classes) as f64;
        costs.push(BlockCost { name: "head".into(), flops: 2.0 * (features * classes) as f64, kept });
        costs
    }
}

impl Place {
    /// Whether the block's input has another shape than its output.
    fn projects(&self) -> bool {
        self.stride != 1 || self.inputs != self.outputs
    }
}

/// See the [module](self). The stem, every basic block and the head are blocks.
#[derive(Module, Debug)]
pub struct Resnet {
    stem: Option<Stem>,
    blocks: Vec<Option<Basic>>,
    head: Option<Linear>,
    #[module(skip)]
    shapes: Vec<Vec<usize>>,
}

#[derive(Module, Debug)]
struct Stem {
    convolution: Convolution,
    norm: BatchNorm,
}

#[derive(Module, Debug)]
struct Basic {
    convolution1: Convolution,
    norm1: BatchNorm,
    convolution2: Convolution,
    norm2: BatchNorm,
    shortcut: Option<Stem>,
    #[module(skip)]
    stride: usize,
}

impl Basic {
    fn new(init: &Init, place: Place) -> Self {
        let Place { inputs, outputs, stride, .. } = place;
        let shortcut = || Stem {
            convolution: Convolution::new(&init.at("shortcut.convolution"), 1, inputs, outputs, false),
            norm: BatchNorm::new(&init.at("shortcut.norm"), outputs),
        };
        Self {
            convolution1: Convolution::new(&init.at("convolution1"), 3, inputs, outputs, false),
            norm1: BatchNorm::new(&init.at("norm1"), outputs),
            convolution2: Convolution::new(&init.at("convolution2"), 3, outputs, outputs, false),
            norm2: BatchNorm::new(&init.at("norm2"), outputs),
            shortcut: place.projects().then(shortcut),
            stride,
        }
    }

    fn forward(&self, x: Tensor<4>, context: &Context) -> Tensor<4> {
        let y = self.convolution1.forward(x.clone(), self.stride);
        let y = self.norm1.forward(y, None, true, context);
        let y = self.convolution2.forward(y, 1);
        let residual = match &self.shortcut {
            Some(Stem { convolution, norm }) => {
                norm.forward(convolution.forward(x, self.stride), None, false, context)
            }
            None => x,
        };
        self.norm2.forward(y, Some(residual), true, context)
    }
}

impl Resnet {
    /// A model of `config`'s shape over `classes`, of which `init` says what this rank holds.
    pub fn new(config: &ResnetConfig, classes: usize, init: &Init) -> Self {
        let stem = |init: Init| Stem {
            convolution: Convolution::new(
                &init.at("stem.convolution"),
                3,
                config.inputs,
                config.channels,
                false,
            ),
            norm: BatchNorm::new(&init.at("stem.norm"), config.channels),
        };
        let places = config.places();
        let block = |(index, place): (usize, &Place)| {
            init.of_blocks(&[index + 1]).map(|init| Basic::new(&init.at("blocks").nth(index), *place))
        };
        let features = config.features();
        let head = |init: Init| {
            let deviation = (1.0 / features as f32).sqrt();
            let (inputs, outputs) = ([("inputs", features)], [("outputs", classes)]);
            Linear::columns(&init.at("head"), &inputs, &outputs, deviation, true)
        };
        Self {
            stem: init.of_blocks(&[0]).map(stem),
            blocks: places.iter().enumerate().map(block).collect(),
            head: init.of_blocks(&[places.len() + 1]).map(head),
            shapes: config.shapes(classes),
        }
    }
}

impl Model for Resnet {
    fn num_blocks(&self) -> usize {
        self.blocks.len() + 2
    }

    fn forward_block(&self, index: usize, input: Activation, batch: &Batch, context: &Context) -> Activation {
        if index == 0 {
            let Stem { convolution, norm } = held(&self.stem);
            let x = convolution.forward(images(batch).0.clone(), 1);
            return Activation::Four(norm.forward(x, None, true, context));
        }
        match self.blocks.get(index - 1) {
            Some(block) => Activation::Four(held(block).forward(input.four(), context)),
            None => Activation::Two(held(&self.head).forward(mean_of_places(input.four()))),
        }
    }

    fn loss(&self, output: Activation, batch: &Batch) -> Tensor<1> {
        cross_entropy(output.two(), images(batch).1.clone())
    }

    fn correct(&self, output: &Activation, batch: &Batch) -> Option<usize> {
        Some(count_correct(&output.clone().two(), images(batch).1))
    }

    fn handed_on(&self, index: usize, batch: &Batch) -> Vec<Vec<usize>> {
        vec![[&[batch.rows()], &self.shapes[index][..]].concat()]
    }
}
