//! A program that saves again and again is killed at random moments; whatever the moment, the newest complete
//! checkpoint is whole and no older than before. REGATTA_KILLS says how often, for longer runs by hand; REGATTA_SEED gives
//! back the seed that a failed run printed, and so its moments.

use regatta::checkpoint::{
    Checkpoint, FileEntry, Location, Part, ShardWriter, State, Which, commit, fresh_folder, verify,
};
use regatta::config::Config;
use regatta::plan::{Batch, Mesh, Piece, Plan};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Says to the child where to save.
const PLACE: &str = "REGATTA_SOAK_PLACE";
const TENSORS: [(&str, [usize; 2]); 3] =
    [("tokens", [301, 40]), ("first/tokens", [301, 40]), ("norm", [1, 7])];

fn state(step: usize) -> State {
    let text = "[model]\nkind = \"gpt\"\n[data]\npath = \"x\"\n[train]\nbatch = 1";
    let config = Config::parse(text, "test", &[]).unwrap();
    let plan = Plan::new(Mesh::data(1), Batch::global(1, 1), 1 << 20).unwrap();
    State::new(step, config, plan, 256, Default::default(), None, None, None)
}

fn value(step: usize, place: usize) -> f32 {
    (step * 1000 + place) as f32
}

/// What `rank` of `ranks` holds: rows of the one tensor in every second step, flat ranges in the others.
fn piece(dims: [usize; 2], step: usize, rank: usize, ranks: usize) -> Piece {
    let cut = |len: usize| len * rank / ranks..len * (rank + 1) / ranks;
    match step % 2 {
        0 => Piece::boxed(&dims, &[0..dims[0], cut(dims[1])]),
        _ => Piece::whole(&dims).narrow(cut(dims[0] * dims[1])),
    }
}

/// The child: saves until it is killed.
#[test]
#[ignore = "the program that the test below kills"]
fn child() {
    let Ok(place) = std::env::var(PLACE) else { return };
    let location = Location::parse(&place).unwrap();
    let mut step = Checkpoint::find(&location, Which::Last).map_or(0, |found| found.state().step);
    loop {
        step += 1;
        let ranks = 1 + step % 3;
        let mut writers: Vec<_> = (0..ranks).map(|rank| ShardWriter::new(location.clone(), rank)).collect();
        let folder = fresh_folder(&location, step).unwrap();
        for (rank, writer) in writers.iter_mut().enumerate() {
            let held = TENSORS.map(|(name, dims)| {
                let piece = piece(dims, step, rank, ranks);
                let values: Vec<f32> = piece
                    .runs()
                    .flat_map(|run| run.global..run.end())
                    .map(|place| value(step, place))
                    .collect();
                (name, dims, piece, values)
            });
            let parts = held.iter().map(|(name, dims, piece, values)| Part {
                name: name.to_string(),
                shape: dims.to_vec(),
                piece: piece.clone(),
                values,
            });
            writer.begin(&folder, parts.collect()).unwrap();
        }
        let files: Vec<FileEntry> = writers.iter_mut().map(|writer| writer.wait().unwrap()).collect();
        commit(&location, &folder, &state(step), files, step.is_multiple_of(5)).unwrap();
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn start(place: &str) -> Killed {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--ignored", "--nocapture"]).env(PLACE, place);
    Killed(command.stdout(Stdio::null()).spawn().unwrap())
}

fn check(location: &Location, which: Which) -> usize {
    let found = Checkpoint::find(location, which).unwrap();
    assert!(found.warnings().is_empty(), "{:?}", found.warnings());
    let step = found.state().step;
    for (name, dims) in TENSORS {
        let piece = Piece::whole(&dims);
        let mut values = vec![f32::NAN; piece.len()];
        found.read(name, &piece, &mut values).unwrap();
        assert!(
            values.iter().enumerate().all(|(place, &x)| x == value(step, place)),
            "{name} of step {step}"
        );
    }
    step
}

fn soak(place: &str, kills: usize) {
    let location = Location::parse(place).unwrap();
    let seed = std::env::var("REGATTA_SEED").map_or_else(
        |_| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64,
        |text| text.parse().unwrap(),
    );
    eprintln!("moments are of seed {seed}: REGATTA_SEED={seed} gives the same ones");
    let mut random = seed;
    let (mut step, mut moved) = (0, 0);
    for _ in 0..kills {
        let child = start(place);
        if step == 0 {
            // There is nothing to lose before the first.
            let begun = Instant::now();
            while Checkpoint::find(&location, Which::Last).is_err() {
                assert!(begun.elapsed() < Duration::from_secs(60), "nothing was saved");
                std::thread::yield_now();
            }
        }
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        // The moment is what is random here; nothing waits for it.
        std::thread::sleep(Duration::from_micros(5_000 + (random >> 33) % 150_000));
        drop(child);
        let found = check(&location, Which::Last);
        assert!(found >= step, "{found} after {step}");
        moved += usize::from(found > step);
        step = found;
        assert!(check(&location, Which::Best) <= step);
        assert_eq!(verify(place).unwrap().problems, [""; 0]);
    }
    eprintln!("{kills} kills, {step} checkpoints, new ones after {moved} kills");
    assert!(moved > 0);
}

fn kills() -> usize {
    std::env::var("REGATTA_KILLS").map_or(20, |text| text.parse().unwrap())
}

#[test]
fn a_killed_save_costs_no_checkpoint() {
    let place = tempfile::tempdir().unwrap();
    soak(place.path().to_str().unwrap(), kills());
}

#[test]
fn a_killed_save_into_an_object_store_costs_no_checkpoint() {
    let place = tempfile::tempdir().unwrap();
    soak(&format!("file://{}/objects", place.path().display()), kills().div_ceil(4));
}
