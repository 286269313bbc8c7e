//! Which checkpoints stay when another one is complete.

use regatta::checkpoint::{Checkpoint, Location, Part, ShardWriter, State, Which, commit, fresh_folder};
use regatta::config::Config;
use regatta::plan::{Batch, Mesh, Piece, Plan};
use std::fs;

fn state(step: usize, val_loss: Option<f64>, best: Option<(f64, usize)>, keep: &str) -> State {
    let text = format!("[model]\nkind = \"gpt\"\n[data]\npath = \"x\"\n[train]\nbatch = 1\n{keep}");
    let config = Config::parse(&text, "test", &[]).unwrap();
    let plan = Plan::new(Mesh::data(1), Batch::global(1, 1), 1 << 20).unwrap();
    State::new(step, config, plan, 256, Default::default(), Some(1.5), best, val_loss)
}

fn save(location: &Location, state: &State, best: bool) {
    let folder = fresh_folder(location, state.step).unwrap();
    let mut writer = ShardWriter::new(location.clone(), 0);
    let part = Part { name: "one".into(), shape: vec![2], piece: Piece::whole(&[2]), values: &[0.5, 1.5] };
    writer.begin(&folder, vec![part]).unwrap();
    let entry = writer.wait().unwrap();
    commit(location, &folder, state, vec![entry], best).unwrap();
}

fn there(location: &Location) -> Vec<usize> {
    let folders = fs::read_dir(location.show("")).unwrap().flatten();
    let mut steps: Vec<usize> =
        folders.filter_map(|entry| entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok()).collect();
    steps.sort();
    steps
}

#[test]
fn the_configuration_says_how_many_stay() {
    for (keep, wanted) in [
        ("", &[3, 10][..]),
        ("keep = 3", &[3, 8, 9, 10]),
        ("keep = 2\nkeep_every = 4", &[3, 4, 8, 9, 10]),
        ("keep = 100", &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ] {
        let place = tempfile::tempdir().unwrap();
        let location = Location::folder(place.path().join("folder"));
        for step in 1..=10 {
            save(&location, &state(step, None, Some((1.0, 3)), keep), step == 3);
        }
        assert_eq!(there(&location), wanted, "{keep:?}");
    }
}

#[test]
fn numbers_that_are_not_finite_are_read_back_and_nothing_is_removed_for_them() {
    let place = tempfile::tempdir().unwrap();
    let location = Location::folder(place.path());
    save(&location, &state(1, Some(0.25), Some((0.25, 1)), ""), true);
    save(&location, &state(2, Some(0.5), Some((0.25, 1)), ""), false);
    for (step, value) in [(3, f64::NAN), (4, f64::INFINITY), (5, f64::NEG_INFINITY)] {
        // As a program that took such a loss for the best one would have it.
        save(&location, &state(step, Some(value), Some((value, step)), ""), false);
        let found = Checkpoint::find(&location, Which::Last).unwrap();
        assert!(found.warnings().is_empty(), "{:?}", found.warnings());
        let same = |found: f64| found == value || (found.is_nan() && value.is_nan());
        assert!(same(found.state().val_loss.unwrap()) && same(found.state().best.unwrap().0));
    }
    assert_eq!(there(&location), [1, 2, 3, 4, 5]);
    assert_eq!(Checkpoint::find(&location, Which::Best).unwrap().state().step, 1);
    assert_eq!(Checkpoint::find(&location, Which::Step(4)).unwrap().state().step, 4);
    save(&location, &state(6, Some(0.125), Some((0.125, 6)), ""), true);
    assert_eq!(there(&location), [6]);
}
