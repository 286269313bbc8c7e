//! Text from a trained language model, which may be spread over ranks by layer and by stage.

use crate::autograd::to_vec;
use crate::checkpoint::{Checkpoint, Location, Which};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::layers::Context;
use crate::models::{Batch, Gpt, GptConfig, Model};
use crate::parallel::Engine;
use crate::random::Stream;
use crate::train::{Config, ModelConfig, Rank, SampleConfig, check_model, load, open_to_read};
use burn::tensor::{Int, Tensor, TensorData};
use regatta_comm::{Group, ReduceOp};
use regatta_plan::{Batch as Samples, Mesh, Piece, Plan, PlanError};
use std::path::Path;

/// A language model and its tokenizer, loaded from a run's folder; on several ranks, each has its part.
pub struct Generator {
    engine: Engine<Gpt>,
    tokenizer: Tokenizer,
    block: usize,
    warnings: Vec<String>,
}

impl Generator {
    /// Loads a checkpoint of the run folder `run`, wholly on this rank.
    ///
    /// # Errors
    /// No checkpoint, a damaged one, or one of a model that does not generate text.
    pub fn load(run: &Path, which: Which) -> Result<Self> {
        Self::load_on(run, which, &Group::solo(), Mesh::data(1))
    }

    /// Checks that the model of `run` can be spread over `mesh`, without loading it.
    ///
    /// # Errors
    /// As [`load_on`](Self::load_on), but for what only the parameters themselves would show.
    pub fn check(run: &Path, which: Which, mesh: &Mesh) -> Result<()> {
        let checkpoint = Checkpoint::find(&Location::of_run(run), which)?;
        language_model(&checkpoint)?;
        let state = checkpoint.state();
        on_host(&state.config).check_plan(&plan(mesh.clone())?, state.vocab).map_err(usage)
    }

    /// Loads a checkpoint of the run folder `run` onto the ranks of `group`, as `mesh` says. All of them call it.
    ///
    /// # Errors
    /// As [`load`](Self::load); a mesh of another size, or that the model cannot follow.
    pub fn load_on(run: &Path, which: Which, group: &Group, mesh: Mesh) -> Result<Self> {
        let fits = |checkpoint: &Checkpoint| language_model(checkpoint).map(drop);
        let whole = |checkpoint: &Checkpoint| whole(checkpoint, group);
        let (checkpoint, warnings) = open_to_read(group, &Location::of_run(run), which, fits, whole)?;
        let state = checkpoint.state();
        let config = language_model(&checkpoint)?;
        let tokenizer = Tokenizer::load(&run.join("tokenizer.json"))?;
        if let Err(problem) = tokenizer.fits(state.vocab) {
            let problem = format!("{problem}: tokenizer.json beside it is of another model");
            return Err(Error::checkpoint(checkpoint.path(), problem));
        }
        check_model(&checkpoint, &state.config.model, state.vocab)?;
        mesh.fits(group.size()).map_err(usage)?;
        let plan = plan(mesh)?;
        let rank = Rank::new(&on_host(&state.config), &plan, group, state.vocab)?;
        let init = rank.init(0);
        let mut engine = rank.engine(Gpt::new(config, state.vocab, &init), &init)?;
        load(&checkpoint, &mut engine, None)?;
        Ok(Self { engine, tokenizer, block: config.block, warnings })
    }

    /// What should be said to the user about which checkpoint was taken; on rank 0.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The model's logits for `ids`, `[ids, vocab]` in row-major order; on all ranks.
    ///
    /// # Errors
    /// More tokens than the model's context, or a failure of communication.
    pub fn logits(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        if ids.is_empty() || ids.len() > self.block {
            return Err(Error::Usage(format!("{} tokens; the model takes 1 to {}", ids.len(), self.block)));
        }
        logits(&mut self.engine, ids, &Context::eval(), 0)
    }

    /// Goes on from `prompt`, handing each piece of text to `emit` as soon as it is complete. Stops early when
    /// `emit` of rank 0 returns false, or at the tokenizer's end of text, which is not handed on. All ranks call it with
    /// the same arguments.
    ///
    /// Keys and values of past tokens are kept, so each token costs one pass over itself alone. Positions count from the
    /// beginning of the context: a full one begins anew with its second half, and goes on from there.
    ///
    /// # Errors
    /// A prompt that the tokenizer cannot encode.
    pub fn stream(
        &mut self,
        prompt: &str,
        options: &SampleConfig,
        seed: u64,
        mut emit: impl FnMut(&str) -> bool,
    ) -> Result<()> {
        stream(&mut self.engine, &self.tokenizer, self.block, prompt, options, seed, &mut emit)
    }

    /// `prompt` and what follows it, as one string.
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

/// To generate with: text comes token by token, which keeps no device busy.
fn on_host(config: &Config) -> Config {
    let mut config = config.clone();
    (config.train.device, config.train.precision) = Default::default();
    config
}

fn usage(error: PlanError) -> Error {
    Error::Usage(error.to_string())
}

/// Checks that the model's parameters are undamaged, each rank its share of them.
fn whole(checkpoint: &Checkpoint, group: &Group) -> Result<()> {
    let parameters = checkpoint.tensors().iter().filter(|(name, _)| !name.contains('/'));
    let parameters = parameters.skip(group.rank()).step_by(group.size());
    let pieces: Vec<_> = parameters.map(|(name, shape)| (name.as_str(), Piece::whole(shape))).collect();
    checkpoint.check(pieces.iter().map(|(name, piece)| (*name, piece)))
}

fn language_model(checkpoint: &Checkpoint) -> Result<&GptConfig> {
    match &checkpoint.state().config.model {
        ModelConfig::Gpt(config) => Ok(config),
        _ => {
            Err(Error::checkpoint(checkpoint.path(), "holds no language model: there is no text to generate"))
        }
    }
}

/// One sequence at a time over `mesh`.
fn plan(mesh: Mesh) -> Result<Plan> {
    Plan::new(mesh, Samples::per_worker(1, 1), 25 << 20).map_err(usage)
}

/// The logits of positions from `first` on, on all ranks: those of the last stage gather them, the others get them.
fn logits<M: Model>(
    engine: &mut Engine<M>,
    ids: &[u32],
    context: &Context,
    first: usize,
) -> Result<Vec<f32>> {
    let data: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    let inputs =
        Tensor::<2, Int>::from_data(TensorData::new(data, [1, ids.len()]), &engine.compute().device());
    let batch = Batch::Text { inputs: inputs.clone(), targets: inputs };
    let output = engine.evaluate(&batch, context)?;
    context.advance(ids.len());
    let axes = engine.axes().clone();
    let positions = ids.len() - first;
    let mut values = vec![];
    if let Some(output) = output {
        let output = output.three().narrow(1, first, positions);
        let mine = to_vec(output).ok_or_else(|| Error::Numeric("the model's logits are not f32".into()))?;
        values = match &axes.tensor {
            Some(tensor) if engine.splits_vocabulary() => {
                let parts = tensor.group().all_gather_vec(&mine)?;
                let row = |position: usize| {
                    parts.iter().flat_map(move |part| {
                        let width = part.len() / positions;
                        part[position * width..][..width].iter().copied()
                    })
                };
                (0..positions).flat_map(row).collect()
            }
            _ => mine,
        };
    }
    if axes.mesh.axis("pipe") > 1 {
        let last = (0..axes.world.size())
            .find(|&rank| axes.mesh.coordinate(rank, "pipe") + 1 == axes.mesh.axis("pipe"));
        let root = last.unwrap_or(0);
        let mut len = [values.len() as i64];
        axes.world.broadcast(&mut len, root)?;
        values.resize(len[0] as usize, 0.0);
        axes.world.broadcast(&mut values, root)?;
    }
    Ok(values)
}

/// As [`Generator::stream`], with a model that is already there.
pub(crate) fn stream<M: Model>(
    engine: &mut Engine<M>,
    tokenizer: &Tokenizer,
    block: usize,
    prompt: &str,
    options: &SampleConfig,
    seed: u64,
    emit: &mut dyn FnMut(&str) -> bool,
) -> Result<()> {
    let world = engine.axes().world.clone();
    let lead = world.rank() == 0;
    let mut ids = tokenizer.encode(prompt)?;
    if ids.is_empty() {
        // Something to go on from: the first token, which for text is most often a line break.
        ids.push(tokenizer.encode("\n").ok().and_then(|ids| ids.first().copied()).unwrap_or(0));
    }
    let noise = Stream::new(seed).named("sample");
    let mut decoder = tokenizer.stream();
    // Ids below the largest that stand for no token.
    let holes: Vec<usize> = (0..tokenizer.vocab_size()).filter(|&id| !tokenizer.has(id as u32)).collect();
    let context = Context::cached();
    let mut new = ids.len().saturating_sub(block);
    for n in 0..options.tokens {
        if context.past() + ids.len() - new > block {
            // Positions are counted from the beginning of the context: a full one begins anew with its second half.
            context.forget();
            new = ids.len() - (block / 2).max(1);
        }
        let mut logits = logits(engine, &ids[new..], &context, ids.len() - new - 1)?;
        new = ids.len();
        // What stands for no token is never said, nor are the rows that only pad the vocabulary.
        logits.truncate(tokenizer.vocab_size());
        holes.iter().for_each(|&id| logits[id] = f32::NEG_INFINITY);
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
    // The last token may have ended within a character.
    let rest = decoder.finish();
    if lead && !rest.is_empty() {
        emit(&rest);
    }
    Ok(())
}

/// Chooses a token by `logits`, with `uniform` in [0, 1) as the dice.
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
    use crate::train::Config;

    /// A model of 2 layers and 8 tokens of context over `vocab` tokens, with large weights: what it says depends on all
    /// that it sees.
    fn engine(vocab: usize, mesh: &str, group: &Group) -> Engine<Gpt> {
        let text = "[model]\nkind = \"gpt\"\nlayers = 2\nheads = 2\nembed = 16\nblock = 8\n[data]\npath = \"x\"\n\
                    [train]\nbatch = 1\n";
        let config = Config::parse(text, "test", &[]).unwrap();
        let ModelConfig::Gpt(shape) = &config.model else { panic!("no language model") };
        let rank = Rank::new(&config, &plan(mesh.parse().unwrap()).unwrap(), group, vocab).unwrap();
        let init = rank.init(7);
        let mut engine = rank.engine(Gpt::new(shape, vocab, &init), &init).unwrap();
        for unit in 0..engine.units().units.len() {
            engine.parameters.own_mut(unit).iter_mut().for_each(|weight| *weight *= 8.0);
        }
        engine
    }

    fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).max_by(f32::total_cmp).unwrap_or(0.0)
    }

    #[test]
    fn kept_keys_and_values_give_the_logits_of_all_tokens_at_once() {
        let (vocab, ids) = (11, [3, 1, 4, 1, 5, 9, 2, 6]);
        let mut whole = engine(vocab, "data=1", &Group::solo());
        let at_once = logits(&mut whole, &ids, &Context::eval(), 0).unwrap();
        assert!(at_once.iter().fold(0.0f32, |most, x| most.max(x.abs())) > 0.5, "the logits say nothing");
        for mesh in ["data=1", "tensor=2", "pipe=2", "tensor=2,pipe=2"] {
            let groups = Group::threads(mesh.parse::<Mesh>().unwrap().size());
            let on_rank = |group: &Group| {
                let mut engine = engine(vocab, mesh, group);
                let context = Context::cached();
                // Three tokens at once, as of a prompt, and the others one by one.
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
    fn a_full_context_begins_anew_with_its_second_half() {
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
            // The same without keeping anything: every token from all that the context holds.
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
