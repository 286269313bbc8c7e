//! Generates text with a trained language model, which may be distributed over ranks by tensor and pipeline
//! parallelism.

use crate::autograd::to_vec;
use crate::checkpoint::{Checkpoint, Location, Which};
use crate::config::{Config, SampleConfig};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::layers::Context;
use crate::models::Batch;
use crate::parallel::Engine;
use crate::random::Stream;
use crate::setup::{self, check_model, load, open_to_read};
use burn::tensor::{Int, Tensor, TensorData};
use regatta_comm::{Group, ReduceOp};
use regatta_plan::{Axis, Batch as Samples, Mesh, Piece, Plan};
use std::path::Path;

/// Bucket size of a plan for generation, in bytes; without gradients it has no effect.
const BUCKET_BYTES: usize = 25 << 20;

/// A language model and its tokenizer, loaded from a run's folder. If there are several ranks, each has its part of
/// the model.
///
/// ```no_run
/// # fn main() -> regatta::Result<()> {
/// use regatta::{Generator, checkpoint::Which, config::SampleConfig};
/// let mut generator = Generator::load("runs/gpt".as_ref(), Which::Best)?;
/// println!("{}", generator.text("fn main() {", &SampleConfig::default(), 7)?);
/// # Ok(()) }
/// ```
pub struct Generator {
    engine: Engine,
    tokenizer: Tokenizer,
    /// The model's longest context in tokens.
    context: usize,
    warnings: Vec<String>,
}

impl Generator {
    /// Loads a checkpoint of the run folder `run`. This rank has the whole model.
    ///
    /// # Errors
    /// There is no checkpoint, it is damaged, or its model does not generate text.
    pub fn load(run: &Path, which: Which) -> Result<Self> {
        Self::load_on(run, which, &Group::solo(), Mesh::data(1))
    }

    /// Checks that the model of `run` can be distributed over `mesh`, without loading its parameters.
    ///
    /// # Errors
    /// As [`load_on`](Self::load_on), except for damaged parameters.
    pub fn check(run: &Path, which: Which, mesh: &Mesh) -> Result<()> {
        let checkpoint = Checkpoint::find(&Location::of_run(run), which)?;
        longest_text(&checkpoint)?;
        let state = checkpoint.state();
        Ok(on_host(&state.config).check_plan(&plan(mesh.clone())?, state.vocab)?)
    }

    /// Loads a checkpoint of the run folder `run`, distributed over the ranks of `group` by `mesh`. All of them call
    /// it.
    ///
    /// # Errors
    /// As [`load`](Self::load), or the mesh has another size or is not supported by the model.
    pub fn load_on(run: &Path, which: Which, group: &Group, mesh: Mesh) -> Result<Self> {
        let fits = |checkpoint: &Checkpoint| longest_text(checkpoint).map(drop);
        let intact = |checkpoint: &Checkpoint| check_parameters(checkpoint, group);
        let (checkpoint, warnings) = open_to_read(group, &Location::of_run(run), which, fits, intact)?;
        let state = checkpoint.state();
        let context = longest_text(&checkpoint)?;
        let tokenizer = Tokenizer::load(&run.join("tokenizer.json"))?;
        if let Err(problem) = tokenizer.fits(state.vocab) {
            let problem = format!("{problem}: tokenizer.json in the run's folder is of another model");
            return Err(Error::checkpoint(checkpoint.path(), problem));
        }
        check_model(&checkpoint, &state.config.model, state.vocab)?;
        mesh.check_world(group.size())?;
        let plan = plan(mesh)?;
        let mut engine = setup::engine(&on_host(&state.config), &plan, (group, None), state.vocab, 0)?;
        load(&checkpoint, &mut engine, None)?;
        Ok(Self { engine, tokenizer, context, warnings })
    }

    /// Warnings for the user about the choice of the checkpoint. Only those of rank 0 are complete.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The model's logits for `ids`, `[ids, vocab]` in row-major order; on all ranks.
    ///
    /// # Errors
    /// There are no tokens or more than the model's context, or communication fails.
    pub fn logits(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        if ids.is_empty() || ids.len() > self.context {
            return Err(Error::Usage(format!(
                "{} tokens are given, but the model takes 1 to {}",
                ids.len(),
                self.context
            )));
        }
        logits(&mut self.engine, ids, &Context::eval(), 0)
    }

    /// Continues `prompt`, and calls `emit` with each piece of text as soon as it is complete; on other ranks than 0
    /// `emit` is not called. Stops early when `emit` returns false, or at the tokenizer's end-of-text token, which is
    /// not emitted. All ranks call it with the same arguments.
    ///
    /// Keys and values of past tokens are cached, so each new token is one forward pass of a single token. When the
    /// context is full, generation continues with its second half as the new context.
    ///
    /// # Errors
    /// The tokenizer cannot encode the prompt, or communication fails.
    pub fn stream(
        &mut self,
        prompt: &str,
        options: &SampleConfig,
        seed: u64,
        mut emit: impl FnMut(&str) -> bool,
    ) -> Result<()> {
        stream(&mut self.engine, &self.tokenizer, self.context, prompt, options, seed, &mut emit)
    }

    /// `prompt` and the generated text as one string; on other ranks than 0 only `prompt`.
    ///
    /// # Errors
    /// As for [`stream`](Self::stream).
    pub fn text(&mut self, prompt: &str, options: &SampleConfig, seed: u64) -> Result<String> {
        let mut text = prompt.to_string();
        self.stream(prompt, options, seed, |piece| {
            text.push_str(piece);
            true
        })?;
        Ok(text)
    }
}

/// `config` with the host as the device, because single tokens do not make use of a GPU.
fn on_host(config: &Config) -> Config {
    let mut config = config.clone();
    (config.train.device, config.train.precision) = Default::default();
    config
}

/// Checks that the model's parameters are undamaged; each rank checks its share of them.
fn check_parameters(checkpoint: &Checkpoint, group: &Group) -> Result<()> {
    let parameters = checkpoint.tensors().iter().filter(|(name, _)| !name.contains('/'));
    let parameters = parameters.skip(group.rank()).step_by(group.size());
    let pieces: Vec<_> = parameters.map(|(name, shape)| (name.as_str(), Piece::whole(shape))).collect();
    checkpoint.check(pieces.iter().map(|(name, piece)| (*name, piece)))
}

/// The model's longest context in tokens.
///
/// # Errors
/// The model does not generate text.
fn longest_text(checkpoint: &Checkpoint) -> Result<usize> {
    checkpoint.state().config.model.context().ok_or_else(|| {
        Error::checkpoint(checkpoint.path(), "is not of a language model: it cannot generate text")
    })
}

/// A plan for one sequence at a time on `mesh`.
fn plan(mesh: Mesh) -> Result<Plan> {
    Ok(Plan::new(mesh, Samples::per_worker(1, 1), BUCKET_BYTES)?)
}

/// The logits of positions from `first` on, on all ranks. The ranks of the last stage gather them and broadcast them
/// to the others.
fn logits(engine: &mut Engine, ids: &[u32], context: &Context, first: usize) -> Result<Vec<f32>> {
    let data: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    let inputs =
        Tensor::<2, Int>::from_data(TensorData::new(data, [1, ids.len()]), &engine.compute().device());
    let batch = Batch::Text { inputs: inputs.clone(), targets: inputs };
    let output = engine.evaluate(&batch, context, |_, output| output)?;
    context.advance(ids.len());
    let groups = engine.groups().clone();
    let positions = ids.len() - first;
    let mut values = vec![];
    if let Some(output) = output {
        let output = output.three().narrow(1, first, positions);
        let own = to_vec(output).ok_or_else(|| Error::Numeric("the model's logits are not f32".into()))?;
        values = match groups.tensor() {
            Some(tensor) if engine.splits_vocabulary() => {
                let parts = tensor.group().all_gather_vec(&own)?;
                let row = |position: usize| {
                    parts.iter().flat_map(move |part| {
                        let width = part.len() / positions;
                        part[position * width..][..width].iter().copied()
                    })
                };
                (0..positions).flat_map(row).collect()
            }
            _ => own,
        };
    }
    if groups.mesh().axis(Axis::Pipe) > 1 {
        let last = (0..groups.world().size())
            .find(|&rank| groups.mesh().coordinate(rank, Axis::Pipe) + 1 == groups.mesh().axis(Axis::Pipe));
        let root = last.unwrap_or(0);
        let mut len = [values.len() as i64];
        groups.world().broadcast(&mut len, root)?;
        values.resize(len[0] as usize, 0.0);
        groups.world().broadcast(&mut values, root)?;
    }
    Ok(values)
}

/// As [`Generator::stream`], with an engine that is already set up.
pub(crate) fn stream(
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    longest: usize,
    prompt: &str,
    options: &SampleConfig,
    seed: u64,
    emit: &mut dyn FnMut(&str) -> bool,
) -> Result<()> {
    let world = engine.groups().world().clone();
    let lead = world.rank() == 0;
    let mut ids = tokenizer.encode(prompt)?;
    if ids.is_empty() {
        // Without a prompt begin after a line break, or else after the first token of the vocabulary.
        ids.push(tokenizer.encode("\n").ok().and_then(|ids| ids.first().copied()).unwrap_or(0));
    }
    let noise = Stream::new(seed).named("sample");
    let mut decoder = tokenizer.stream();
    // Ids below the largest that no token has.
    let unused: Vec<usize> = (0..tokenizer.vocab_size()).filter(|&id| !tokenizer.has(id as u32)).collect();
    let context = Context::cached();
    let mut new = ids.len().saturating_sub(longest);
    for n in 0..options.tokens {
        if context.past() + ids.len() - new > longest {
            // The context is full: its second half becomes the new context, with positions from 0 on.
            context.forget();
            new = ids.len() - (longest / 2).max(1);
        }
        let mut logits = logits(engine, &ids[new..], &context, ids.len() - new - 1)?;
        new = ids.len();
        // Ids that no token has, and those that only pad the vocabulary, are never generated.
        logits.truncate(tokenizer.vocab_size());
        unused.iter().for_each(|&id| logits[id] = f32::NEG_INFINITY);
        let id = choose(&logits, options, noise.uniform(n as u64));
        if tokenizer.end_of_text() == Some(id) {
            break;
        }
        ids.push(id);
        let text = decoder.push(id);
        let mut stop = [i32::from(lead && !text.is_empty() && !emit(&text))];
        if world.size() > 1 {
            world.all_reduce(&mut stop, ReduceOp::Sum)?;
        }
        if stop[0] > 0 {
            return Ok(());
        }
    }
    // The last token may end within a character.
    let rest = decoder.finish();
    if lead && !rest.is_empty() {
        emit(&rest);
    }
    Ok(())
}

/// Samples a token by its `logits`, with the random number `uniform` in [0, 1).
fn choose(logits: &[f32], options: &SampleConfig, uniform: f32) -> u32 {
    let possible = |&id: &u32| logits[id as usize] != f32::NEG_INFINITY;
    let mut order: Vec<u32> = (0..logits.len() as u32).filter(possible).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
    if options.temperature == 0.0 {
        return order.first().copied().unwrap_or(0);
    }
    if options.top_k > 0 {
        order.truncate(options.top_k);
    }
    let top = order.first().map_or(0.0, |&id| logits[id as usize]);
    let weight = |id: u32| (f64::from(logits[id as usize] - top) / options.temperature).exp();
    let total: f64 = order.iter().map(|&id| weight(id)).sum();
    let mut left = f64::from(uniform) * total;
    for &id in &order {
        left -= weight(id);
        if left < 0.0 {
            return id;
        }
    }
    order.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model of 2 layers and 8 tokens of context for `vocab` tokens. Its weights are large, so that its output
    /// depends on the whole input.
    fn engine(vocab: usize, mesh: &str, group: &Group) -> Engine {
        let text = "[model]\nkind = \"gpt\"\nlayers = 2\nheads = 2\nembed = 16\nblock = 8\n[data]\npath = \"x\"\n\
                    [train]\nbatch = 1\n";
        let config = Config::parse(text, "test", &[]).unwrap();
        let plan = plan(mesh.parse().unwrap()).unwrap();
        let mut engine = setup::engine(&config, &plan, (group, None), vocab, 7).unwrap();
        for unit in 0..engine.units().units.len() {
            engine.own_mut(unit).iter_mut().for_each(|weight| *weight *= 8.0);
        }
        engine
    }

    fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).max_by(f32::total_cmp).unwrap_or(0.0)
    }

    #[test]
    fn cached_keys_and_values_give_the_logits_of_all_tokens_at_once() {
        let (vocab, ids) = (11, [3, 1, 4, 1, 5, 9, 2, 6]);
        let mut whole = engine(vocab, "data=1", &Group::solo());
        let at_once = logits(&mut whole, &ids, &Context::eval(), 0).unwrap();
        assert!(at_once.iter().fold(0.0f32, |most, x| most.max(x.abs())) > 0.5, "the logits are too small");
        for mesh in ["data=1", "tensor=2", "pipe=2", "tensor=2,pipe=2"] {
            let groups = Group::threads(mesh.parse::<Mesh>().unwrap().size());
            let on_rank = |group: &Group| {
                let mut engine = engine(vocab, mesh, group);
                let context = Context::cached();
                // Three tokens at once, like a prompt, and the others one by one.
                let mut all = logits(&mut engine, &ids[..3], &context, 0).unwrap();
                for id in &ids[3..] {
                    all.extend(logits(&mut engine, &[*id], &context, 0).unwrap());
                }
                assert_eq!(context.past(), ids.len());
                let difference = largest_difference(&all, &at_once);
                assert!(difference < 1e-5, "{mesh}: {difference}");
            };
            std::thread::scope(|scope| {
                for group in &groups {
                    scope.spawn(|| on_rank(group));
                }
            });
        }
    }

    #[test]
    fn generation_continues_with_the_second_half_of_a_full_context() {
        let sample = "the quick brown fox jumps over the lazy dog\n";
        let tokenizer = Tokenizer::chars([sample].into_iter());
        let block = 8;
        let mut engine = engine(tokenizer.vocab_size(), "data=1", &Group::solo());
        let options = SampleConfig { tokens: 30, temperature: 1.0, top_k: 0, prompt: None };
        for prompt in ["the", "the quick brown fox"] {
            let mut text = String::new();
            let mut emit = |piece: &str| {
                text.push_str(piece);
                true
            };
            stream(&mut engine, &tokenizer, block, prompt, &options, 5, &mut emit).unwrap();
            // The same without a cache: every token from the whole context.
            let mut ids = tokenizer.encode(prompt).unwrap();
            let first = ids.len();
            let mut begin = ids.len().saturating_sub(block);
            for n in 0..options.tokens {
                if ids.len() - begin > block {
                    begin = ids.len() - block / 2;
                }
                let seen = &ids[begin..];
                let last = logits(&mut engine, seen, &Context::eval(), seen.len() - 1).unwrap();
                ids.push(choose(&last, &options, Stream::new(5).named("sample").uniform(n as u64)));
            }
            assert_eq!(text, tokenizer.decode(&ids[first..]), "{prompt}");
        }
    }

    #[test]
    fn choice_follows_temperature_and_top_k() {
        let logits = [0.0, 3.0, 2.0, -1.0];
        let options = |temperature, top_k| SampleConfig { temperature, top_k, ..Default::default() };
        assert_eq!(choose(&logits, &options(0.0, 0), 0.99), 1);
        assert_eq!(choose(&logits, &options(1.0, 1), 0.99), 1);
        assert_eq!(choose(&logits, &options(1.0, 2), 0.99), 2);
        assert_eq!(choose(&logits, &options(1.0, 0), 0.9999), 3);
        let hits = (0..1000).filter(|&i| choose(&logits, &options(1.0, 0), i as f32 / 1000.0) == 1).count();
        let expected = 3f64.exp() / (1.0 + 3f64.exp() + 2f64.exp() + (-1f64).exp());
        assert!((hits as f64 / 1000.0 - expected).abs() < 0.01, "{hits} {expected}");
    }
}
