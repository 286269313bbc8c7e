//! The trainer as a program of one's own uses it: on threads of this process, with data that counts unevenly.

use regatta::checkpoint::Which;
use regatta::comm::Group;
use regatta::config::{OptimizerConfig, OptimizerKind};
use regatta::datasets::{Dataset, HostBatch};
use regatta::models::{GptConfig, IGNORED};
use regatta::plan::{Batch, Plan};
use regatta::random::Stream;
use regatta::train::{
    Callback, EarlyStopping, Flow, LearningRate, Resume, Score, StepReport, Summary, Trainer, read_losses,
};
use std::path::Path;
use std::sync::{Arc, Mutex};

const VOCAB: usize = 12;
const TIME: usize = 8;

/// Sequences of made-up tokens, of which some are not to be predicted: many in some rows, and few in others.
struct Padded(usize);

impl Dataset for Padded {
    fn len(&self) -> usize {
        self.0
    }

    fn tokens_per_sample(&self) -> usize {
        TIME
    }

    fn batch(&self, _epoch: u64, indices: &[usize]) -> regatta::Result<HostBatch> {
        let (mut inputs, mut targets) = (vec![], vec![]);
        for &index in indices {
            let noise = Stream::new(3).at(index as u64);
            let mut token = index % VOCAB;
            // A third of all: of every third row all but one, of the others every eighth.
            let ignored = |place: usize| if index.is_multiple_of(3) { place > 0 } else { place == 1 };
            for place in 0..TIME {
                inputs.push(token as i64);
                token = (5 * token + 1 + (noise.uniform(place as u64) * 3.0) as usize) % VOCAB;
                targets.push(if ignored(place) { IGNORED } else { token as i64 });
            }
        }
        Ok(HostBatch::Text { inputs, targets, time: TIME })
    }
}

fn gpt(dropout: f64) -> GptConfig {
    GptConfig { layers: 4, heads: 6, embed: 36, context: TIME, dropout, ..GptConfig::default() }
}

fn plan(mesh: &str, micro_batches: usize, zero: u8) -> Plan {
    Plan { zero, ..Plan::new(mesh.parse().unwrap(), Batch::global(12, micro_batches), 1 << 20).unwrap() }
}

/// Trains on a thread for each rank; returns rank 0's losses and the summary.
fn fit(folder: &Path, plan: &Plan, change: impl Fn(Trainer) -> Trainer + Send + Sync) -> (Vec<f64>, Summary) {
    let groups = Group::threads(plan.world());
    let summary = std::thread::scope(|scope| {
        let rank = |group: Group| {
            let (plan, change) = (plan.clone(), &change);
            scope.spawn(move || {
                let sgd = OptimizerConfig {
                    kind: OptimizerKind::Sgd,
                    lr: 0.3,
                    constant: true,
                    ..OptimizerConfig::default()
                };
                let trainer =
                    Trainer::new(plan).group(group).data(Padded(240), Padded(60), VOCAB).optimizer(sgd);
                change(trainer.model(gpt(0.0)).steps(12).out(folder)).fit().unwrap()
            })
        };
        let ranks: Vec<_> = groups.into_iter().map(rank).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).next().unwrap()
    });
    (read_losses(folder).unwrap(), summary)
}

fn difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| ((a - b) / b).abs()).max_by(f64::total_cmp).unwrap()
}

#[test]
fn a_loss_is_the_mean_over_the_tokens_that_count_under_every_plan() {
    for dropout in [0.0, 0.1] {
        let place = tempfile::tempdir().unwrap();
        let run = |name: &str, plan: &Plan| {
            let folder = place.path().join(name);
            let (mut losses, summary) = fit(&folder, plan, |trainer| trainer.model(gpt(dropout)));
            losses.push(summary.val_loss.unwrap());
            losses
        };
        // All samples of a step at once: their loss is the mean over what counts.
        let one = run("one", &plan("data=1", 1, 0));
        assert!(one[11] < one[0], "nothing is learnt: {one:?}");
        for (mesh, micro_batches, zero) in [
            ("data=1", 4, 0),
            ("data=3", 1, 0),
            ("data=3", 2, 3),
            ("data=2", 3, 1),
            ("tensor=3", 2, 0),
            ("pipe=3", 4, 0),
            ("data=2,tensor=2,pipe=2", 2, 2),
        ] {
            let name = format!("{mesh} {micro_batches} {zero}");
            let found = difference(&run(&name, &plan(mesh, micro_batches, zero)), &one);
            assert!(found < 1e-5, "{name}, dropout {dropout}: {found:.1e}");
        }
    }
}

/// Records what it sees.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<(Vec<f64>, Vec<usize>)>>);

impl Callback for Seen {
    fn step(&mut self, report: &StepReport) -> Flow {
        self.0.lock().unwrap().0.push(report.lr);
        Flow::Continue
    }

    fn evaluated(&mut self, step: usize, score: &Score) -> Flow {
        assert!(score.loss.is_finite());
        self.0.lock().unwrap().1.push(step);
        Flow::Continue
    }
}

#[test]
fn callbacks_set_the_learning_rate_and_stop_all_ranks_together() {
    let place = tempfile::tempdir().unwrap();
    let seen = Seen::default();
    let (losses, summary) = fit(place.path().join("run").as_path(), &plan("data=2", 1, 0), |trainer| {
        trainer
            .steps(100)
            .settings(|train| train.eval_every = 2)
            .callback(LearningRate(|step, lr| lr / (step + 1) as f64))
            .callback(seen.clone())
            // No loss is so much lower than the one before.
            .callback(EarlyStopping::new(2, 10.0))
    });
    // The first evaluation is the best so far, the next two are not better; the step after that is the last.
    assert_eq!((losses.len(), summary.steps, summary.interrupted), (7, 7, true));
    let (rates, evaluated) = seen.0.lock().unwrap().clone();
    assert_eq!(evaluated.iter().filter(|step| **step == 6).count(), 2, "on both ranks");
    let of_a_rank: Vec<f64> = (1..=7).map(|step| 0.3 / f64::from(step)).collect();
    let mut wanted = [of_a_rank.clone(), of_a_rank].concat();
    let mut rates = rates;
    [&mut rates, &mut wanted].iter_mut().for_each(|all| all.sort_by(f64::total_cmp));
    assert_eq!(rates, wanted);
}

#[test]
fn what_is_missing_is_named() {
    let fit = |trainer: Trainer| trainer.group(Group::solo()).fit().unwrap_err().to_string();
    assert!(fit(Trainer::new(plan("data=1", 1, 0))).contains("no model: call model()"));
    let without_data = Trainer::new(plan("data=1", 1, 0)).model(gpt(0.0));
    assert!(fit(without_data).contains("no data: call data()"));
    let place = tempfile::tempdir().unwrap();
    let data = |trainer: Trainer| trainer.data(Padded(24), Padded(12), VOCAB).out(place.path());
    let other = data(Trainer::new(plan("data=2", 1, 0)).model(gpt(0.0)));
    assert!(fit(other).contains("is for 2 ranks, but the job has 1"));
    let wrong = data(Trainer::new(plan("data=1", 1, 0)).model(GptConfig { heads: 5, ..gpt(0.0) }));
    assert!(fit(wrong).contains("`model.embed`: 36 is not a multiple of the 5 heads"));
    let uneven = Plan { accumulate: 5, ..plan("data=1", 1, 0) };
    assert!(
        fit(data(Trainer::new(uneven).model(gpt(0.0)))).contains("a batch of 12 does not divide among 5")
    );
    let folderless = Trainer::new(plan("data=1", 1, 0)).model(gpt(0.0)).data(Padded(24), Padded(12), VOCAB);
    let resume = Resume { from: Which::Last, or_begin: true, other_data: false };
    assert!(fit(folderless.resume(resume)).contains("resumes from the run's folder: call out()"));
    let never = data(Trainer::new(plan("data=1", 1, 0)).model(gpt(0.0)));
    let error = fit(never.callback(EarlyStopping::new(2, 0.0)));
    assert!(error.contains("EarlyStopping needs evaluations: set train.eval_every"), "{error}");
}

/// As [`Padded`], with one sample whose target is what PyTorch ignores.
struct Foreign;

impl Dataset for Foreign {
    fn len(&self) -> usize {
        48
    }

    fn tokens_per_sample(&self) -> usize {
        TIME
    }

    fn batch(&self, epoch: u64, indices: &[usize]) -> regatta::Result<HostBatch> {
        let mut batch = Padded(48).batch(epoch, indices)?;
        if let (HostBatch::Text { targets, .. }, Some(row)) =
            (&mut batch, indices.iter().position(|&i| i == 17))
        {
            targets[row * TIME] = -100;
        }
        Ok(batch)
    }
}

#[test]
fn a_wrong_sample_is_named_on_all_ranks() {
    let place = tempfile::tempdir().unwrap();
    let ranks: Vec<_> = Group::threads(2)
        .into_iter()
        .map(|group| {
            let folder = place.path().join("run");
            std::thread::spawn(move || {
                let trainer =
                    Trainer::new(plan("data=2", 1, 0)).model(gpt(0.0)).data(Foreign, Padded(12), VOCAB);
                trainer.group(group).steps(8).out(folder).fit().unwrap_err().to_string()
            })
        })
        .collect();
    for rank in ranks {
        let error = rank.join().unwrap();
        assert!(error.contains("sample 17 has the target -100: the model takes 0 to 11, and -1"), "{error}");
    }
}
