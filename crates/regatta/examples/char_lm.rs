//! A language model trained on many workers: `regatta launch -n 2 -- target/release/examples/char_lm`.

#[path = "char_lm/model.rs"]
mod model;

use burn::optim::{AdamWConfig, GradientsParams};
use burn::prelude::*;
use model::{CharLm, batch, text};

const STEPS: usize = 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    regatta::init()?;
    let text = text()?;
    let device = Device::flex().autodiff();
    let model = regatta::broadcast_parameters(CharLm::new(&device), 0)?;
    let optimizer = AdamWConfig::new().init();
    let (mut optimizer, mut model) = regatta::DistributedOptimizer::new(optimizer, model)?;
    for step in 0..STEPS {
        let (inputs, targets) = batch(&text, step * regatta::size() + regatta::rank(), &device);
        let loss = model.loss(inputs, targets);
        println!("step {step} loss {:.4}", loss.clone().into_scalar::<f32>());
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(1e-3, model, grads)?;
    }
    Ok(())
}
