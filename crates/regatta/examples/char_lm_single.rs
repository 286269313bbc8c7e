//! A language model trained by one process with Burn alone. `char_lm.rs` is the same on many workers.

#[path = "char_lm/model.rs"]
mod model;

use burn::optim::{AdamWConfig, GradientsParams};
use burn::prelude::*;
use model::{CharLm, batch, text};

const STEPS: usize = 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let text = text()?;
    let device = Device::flex().autodiff();
    let mut model = CharLm::new(&device);
    let mut optimizer = AdamWConfig::new().init();
    for step in 0..STEPS {
        let (inputs, targets) = batch(&text, step, &device);
        let loss = model.loss(inputs, targets);
        println!("step {step} loss {:.4}", loss.clone().into_scalar::<f32>());
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(1e-3, model, grads);
    }
    Ok(())
}
