//! The forward pass of a batch through all stages, without autodiff.

use super::Engine;
use super::kept::{Kept, MicroChunk, Output};
use crate::error::Result;
use crate::layers::Context;
use crate::models::{Activation, Batch, Model};
use crate::parallel::block_io::to_f32;
use crate::parallel::rank_plan::{Pass, uses};
use regatta_plan::Recompute;

impl Engine {
    /// Runs `batch` through all stages without autodiff. On the ranks of the last stage, `judge` is called with the model and
    /// its output while the last block has its parameters, and its result is returned; none on other ranks.
    ///
    /// # Errors
    /// Communication fails.
    pub fn evaluate<R>(
        &mut self,
        batch: &Batch,
        context: &Context,
        judge: impl FnOnce(&dyn Model, Activation) -> R,
    ) -> Result<Option<R>> {
        let schedule = self.evaluation.clone();
        self.links.begin(&schedule, None);
        self.uses = uses(&schedule, self.stage, &self.chunks, Recompute::None).into();
        let (mut result, mut judge) = (None, Some(judge));
        for &task in &schedule.tasks[self.stage] {
            let at = MicroChunk { chunk: task.chunk(), micro_batch: task.micro_batch() };
            let mut x = self.input(&schedule, at, |_| batch)?;
            let (blocks, next) =
                (self.chunks[at.chunk].clone(), schedule.virtual_stage(self.stage, at.chunk) + 1);
            let last = next == schedule.virtual_stages();
            for block in blocks.clone() {
                self.acquire_block(block)?;
                x = self.evaluator.forward_block(block, x, batch, context);
                if last && block + 1 == blocks.end {
                    // The loss may use parameters of the last block.
                    let output = to_f32(std::mem::replace(&mut x, Activation::Start));
                    result = judge.take().map(|judge| judge(&*self.evaluator, output));
                }
                self.release_block(block, Pass::Forward)?;
            }
            if last {
                continue;
            }
            if schedule.place(next).0 == self.stage {
                // The next chunk is on this rank and takes its input from the kept outputs.
                let output = Some(Output::Activation(x.clone()));
                self.kept.insert(at, vec![Kept { input: Activation::Start, output }]);
            }
            self.pass_on(&schedule, task, x)?;
        }
        self.kept.clear();
        self.links.finish()?;
        self.exchange.take_time();
        Ok(result)
    }
}
