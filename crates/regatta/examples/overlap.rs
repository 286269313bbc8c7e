//! How much of the communication hides behind backward, for the plain Burn module of `char_lm`. Rank 0 prints
//! a JSON line: median milliseconds of a step, of its all-reduces, and of the part that the step waited for.

#[path = "char_lm/model.rs"]
mod model;

use burn::optim::{AdamWConfig, GradientsParams};
use burn::prelude::*;
use model::{CharLm, batch, text};
use std::time::Instant;

const STEPS: usize = 30;
const WARM_UP: usize = 5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    regatta::init()?;
    rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build_global()?;
    let text = text()?;
    let device = Device::flex().autodiff();
    let model = regatta::broadcast_parameters(CharLm::new(&device), 0)?;
    let (mut optimizer, mut model) = regatta::DistributedOptimizer::new(AdamWConfig::new().init(), model)?;
    let mut times: [Vec<f64>; 3] = Default::default();
    for step in 0..STEPS {
        let begun = Instant::now();
        let (inputs, targets) = batch(&text, step * regatta::size() + regatta::rank(), &device);
        let loss = model.loss(inputs, targets);
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(1e-3, model, grads)?;
        let comm = optimizer.comm_time();
        for (column, time) in times.iter_mut().zip([begun.elapsed(), comm.busy, comm.exposed]) {
            column.push(time.as_secs_f64() * 1e3);
        }
    }
    let [step, comm, exposed] = times.map(|mut column| {
        column.drain(..WARM_UP);
        column.sort_by(f64::total_cmp);
        column[column.len() / 2]
    });
    if regatta::rank() == 0 {
        let hidden = 1.0 - exposed / comm.max(f64::MIN_POSITIVE);
        let parameters = model.num_params();
        println!(
            "{{\"parameters\":{parameters},\"step_ms\":{step:.2},\"comm_ms\":{comm:.2},\"comm_exposed_ms\":{exposed:.2},\"hidden\":{hidden:.3}}}"
        );
    }
    Ok(())
}
