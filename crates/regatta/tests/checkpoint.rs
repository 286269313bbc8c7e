//! Checkpoints across plans: written under one, read under another, and damaged in every way.

use proptest::prelude::*;
use regatta::checkpoint::{
    Checkpoint, FileEntry, Location, Part, ShardWriter, State, Which, abandon, commit, fresh_folder, inspect,
    verify,
};
use regatta::config::Config;
use regatta::plan::{Batch, Mesh, Piece, Plan};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

fn state(step: usize) -> State {
    let text = "[model]\nkind = \"gpt\"\n[data]\npath = \"x\"\n[train]\nbatch = 1";
    let config = Config::parse(text, "test", &[]).unwrap();
    let plan = Plan::new(Mesh::data(1), Batch::global(1, 1), 1 << 20).unwrap();
    State::new(step, config, plan, 256, Default::default(), Some(1.5), Some((1.5, 1)), None)
}

fn cut(len: usize, part: usize, parts: usize) -> Range<usize> {
    len * part / parts..len * (part + 1) / parts
}

/// A tensor of a test: logical dimensions, the dimension that tensor parallelism cuts, and the stored shape.
#[derive(Debug, Clone)]
struct Tensor {
    name: String,
    dims: Vec<usize>,
    axis: usize,
    shape: Vec<usize>,
}

impl Tensor {
    fn values(&self) -> Vec<f32> {
        let salt = self.name.bytes().map(f32::from).sum::<f32>();
        (0..self.dims.iter().product::<usize>()).map(|i| salt + i as f32 * 0.5).collect()
    }

    /// What rank `tp * zeros + zero` owns.
    fn piece(&self, plan: (usize, usize), rank: usize) -> Piece {
        let (tps, zeros) = plan;
        let mut ranges: Vec<_> = self.dims.iter().map(|&dim| 0..dim).collect();
        if let Some(range) = ranges.get_mut(self.axis) {
            *range = cut(range.end, rank / zeros, tps);
        } else if rank / zeros > 0 {
            // A scalar is the first one's.
            return Piece::whole(&self.dims).narrow(0..0);
        }
        let boxed = Piece::boxed(&self.dims, &ranges);
        let flat = cut(boxed.len(), rank % zeros, zeros);
        boxed.narrow(flat)
    }
}

fn values_of(tensor: &Tensor, piece: &Piece) -> Vec<f32> {
    let all = tensor.values();
    piece.runs().flat_map(|run| all[run.global..run.end()].to_vec()).collect()
}

/// Begins rank `rank`'s part of a save.
fn begin(writer: &mut ShardWriter, folder: &str, tensors: &[Tensor], plan: (usize, usize), rank: usize) {
    let held: Vec<_> = tensors
        .iter()
        .map(|tensor| {
            let piece = tensor.piece(plan, rank);
            (tensor, values_of(tensor, &piece), piece)
        })
        .collect();
    let parts = held.iter().map(|(tensor, values, piece)| Part {
        name: tensor.name.clone(),
        shape: tensor.shape.clone(),
        piece: piece.clone(),
        values,
    });
    writer.begin(folder, parts.collect()).unwrap();
}

fn entries(location: &Location, folder: &str, tensors: &[Tensor], plan: (usize, usize)) -> Vec<FileEntry> {
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..plan.0 * plan.1)
            .map(|rank| {
                scope.spawn(move || {
                    let mut writer = ShardWriter::new(location.clone(), rank);
                    begin(&mut writer, folder, tensors, plan, rank);
                    let entry = writer.wait().unwrap();
                    // As it travels to rank 0.
                    serde_json::from_str(&serde_json::to_string(&entry).unwrap()).unwrap()
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn save(location: &Location, step: usize, tensors: &[Tensor], plan: (usize, usize), best: bool) -> String {
    let folder = fresh_folder(location, step).unwrap();
    let files = entries(location, &folder, tensors, plan);
    commit(location, &folder, &state(step), files, best).unwrap();
    folder
}

fn two() -> Vec<Tensor> {
    vec![
        Tensor { name: "tokens".into(), dims: vec![7, 4], axis: 0, shape: vec![7, 4] },
        Tensor { name: "first/layers.0.qkv".into(), dims: vec![4, 3, 2, 2], axis: 2, shape: vec![4, 12] },
    ]
}

fn read_all(checkpoint: &Checkpoint, tensors: &[Tensor]) -> Result<(), String> {
    for tensor in tensors {
        let piece = Piece::whole(&tensor.dims);
        let mut found = vec![f32::NAN; piece.len()];
        checkpoint.read(&tensor.name, &piece, &mut found).map_err(|error| error.to_string())?;
        assert_eq!(found, tensor.values(), "{}", tensor.name);
    }
    Ok(())
}

fn tensor(index: usize) -> impl Strategy<Value = Tensor> {
    (prop::collection::vec(1usize..7, 0..=4), any::<prop::sample::Index>(), any::<bool>()).prop_map(
        move |(dims, axis, joined)| {
            let axis = if dims.is_empty() { 0 } else { axis.index(dims.len()) };
            // The stored shape may have the last two dimensions as one.
            let shape = match dims.as_slice() {
                [front @ .., a, b] if joined => [front, &[a * b]].concat(),
                dims => dims.to_vec(),
            };
            Tensor { name: format!("kind{}/tensor.{index}", index % 2), dims, axis, shape }
        },
    )
}

fn tensors() -> impl Strategy<Value = Vec<Tensor>> {
    (tensor(0), tensor(1), tensor(2)).prop_map(|(a, b, c)| vec![a, b, c])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn what_one_plan_wrote_another_reads(
        tensors in tensors(), from in (1usize..4, 1usize..5), to in (1usize..4, 1usize..5), objects in any::<bool>(),
    ) {
        let place = tempfile::tempdir().unwrap();
        let location = match objects {
            true => Location::parse(&format!("memory://{}/runs/one", place.path().display())).unwrap(),
            false => Location::folder(place.path().join("checkpoints")),
        };
        let folder = save(&location, 3, &tensors, from, true);
        let checkpoint = Checkpoint::find(&location, Which::Last).unwrap();
        prop_assert!(checkpoint.warnings().is_empty());
        prop_assert_eq!(checkpoint.folder(), &folder);
        prop_assert_eq!(checkpoint.state().step, 3);
        for rank in 0..to.0 * to.1 {
            for tensor in &tensors {
                let piece = tensor.piece(to, rank);
                let mut found = vec![f32::NAN; piece.len()];
                checkpoint.check([(tensor.name.as_str(), &piece)]).unwrap();
                checkpoint.read(&tensor.name, &piece, &mut found).unwrap();
                prop_assert_eq!(found, values_of(tensor, &piece));
            }
        }
    }
}

#[test]
fn a_writer_goes_on_while_its_caller_does() {
    let place = tempfile::tempdir().unwrap();
    let location = Location::of_run(place.path());
    let (tensors, plan) = (two(), (1, 1));
    let mut writer = ShardWriter::new(location.clone(), 0);
    assert!(writer.poll().is_none());
    assert!(writer.wait().unwrap_err().to_string().contains("no save was begun"));
    // The second begins before the first was fetched; both outcomes come, in order.
    begin(&mut writer, "step-00000001", &tensors, plan, 0);
    begin(&mut writer, "step-00000002", &tensors, plan, 0);
    for step in 1..=2 {
        let entry = writer.wait().unwrap();
        commit(&location, &format!("step-{step:08}"), &state(step), vec![entry], step == 1).unwrap();
    }
    begin(&mut writer, "step-00000003", &tensors, plan, 0);
    let entry = loop {
        match writer.poll() {
            Some(entry) => break entry.unwrap(),
            None => std::thread::yield_now(),
        }
    };
    commit(&location, "step-00000003", &state(3), vec![entry], false).unwrap();
    // The second was neither last nor best.
    let mut left: Vec<_> = fs::read_dir(place.path().join("checkpoints")).unwrap().collect();
    left.sort_by_key(|entry| entry.as_ref().unwrap().file_name());
    let left: Vec<_> = left.into_iter().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["best", "last", "step-00000001", "step-00000003"]);
    let best = Checkpoint::find(&location, Which::Best).unwrap();
    assert_eq!((best.state().step, best.folder()), (1, "step-00000001"));
    // A complete checkpoint is not written over.
    begin(&mut writer, "step-00000003", &tensors, plan, 0);
    let error = writer.wait().unwrap_err().to_string();
    assert!(error.contains("already complete"), "{error}");
    assert!(abandon(&location, "step-00000003").is_err());
    read_all(&Checkpoint::find(&location, Which::Last).unwrap(), &tensors).unwrap();
}

#[test]
fn files_are_safetensors() {
    let place = tempfile::tempdir().unwrap();
    let location = Location::folder(place.path());
    let folder = save(&location, 1, &two(), (1, 2), false);
    let bytes = fs::read(place.path().join(folder).join("rank-00001.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let piece = two()[0].piece((1, 2), 1);
    let found = file.tensor("tokens#0").unwrap();
    assert_eq!(found.shape(), [piece.len()]);
    assert_eq!(found.data(), bytemuck::cast_slice::<f32, u8>(&values_of(&two()[0], &piece)));
    assert_eq!(file.names().len(), 2);
}

#[test]
fn what_the_ranks_did_not_save_once_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let location = Location::folder(place.path());
    let earlier = save(&location, 1, &two(), (1, 1), true);
    let refuse = |step, change: &dyn Fn(&mut Vec<FileEntry>)| {
        let folder = fresh_folder(&location, step).unwrap();
        let mut files = entries(&location, &folder, &two(), (2, 1));
        change(&mut files);
        let error = commit(&location, &folder, &state(step), files, true).unwrap_err().to_string();
        abandon(&location, &folder).unwrap();
        error
    };
    let error = refuse(2, &|files| drop(files.pop()));
    assert!(error.contains("tokens: elements 12..28 of 28 are missing"), "{error}");
    let error = refuse(3, &|files| {
        let part = files[0].parts[0].clone();
        files[1].parts.push(part);
    });
    assert!(error.contains("tokens: elements 0..12 occur twice"), "{error}");
    let error = refuse(4, &|files| {
        files[1].tensors.insert("tokens".into(), vec![4, 7]);
    });
    assert!(error.contains("shapes [7, 4] and [4, 7]"), "{error}");
    let error = refuse(5, &|files| files[1].bytes += 1);
    assert!(error.contains("same folder"), "{error}");
    assert_eq!(Checkpoint::find(&location, Which::Last).unwrap().folder(), earlier);
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::new(Location::folder(place.path()), 0);
    let part = |shape: &[usize], dims: &[usize]| Part {
        name: "tokens".into(),
        shape: shape.to_vec(),
        piece: Piece::whole(dims),
        values: &[1.0; 6],
    };
    for parts in [
        vec![part(&[2, 3], &[2, 4])],
        vec![part(&[2, 3], &[3, 2])],
        vec![part(&[2, 3], &[2, 3]), part(&[3, 2], &[3, 2])],
    ] {
        let error = writer.begin("step-00000001", parts).unwrap_err().to_string();
        assert!(error.contains("tokens"), "{error}");
    }
    assert!(writer.begin("../step-00000001", vec![]).is_err());
}

#[test]
fn a_failed_write_leaves_what_was_there() {
    let place = tempfile::tempdir().unwrap();
    let location = Location::folder(place.path());
    let earlier = save(&location, 1, &two(), (1, 1), true);
    // Not even root can write a file where a folder is not one.
    fs::write(place.path().join("step-00000002"), "").unwrap();
    let mut writer = ShardWriter::new(location.clone(), 0);
    begin(&mut writer, "step-00000002", &two(), (1, 1), 0);
    assert!(writer.wait().is_err());
    // The rank's own name is taken by a folder: writing goes well and renaming fails.
    fs::create_dir_all(place.path().join("step-00000003/rank-00000.safetensors/x")).unwrap();
    begin(&mut writer, "step-00000003", &two(), (1, 1), 0);
    let error = writer.wait().unwrap_err().to_string();
    assert!(error.contains("rank-00000.safetensors"), "{error}");
    assert_eq!(fs::read_dir(place.path().join("step-00000003")).unwrap().count(), 1);
    read_all(&Checkpoint::open(&location, &earlier).unwrap(), &two()).unwrap();
    // The writer still works.
    begin(&mut writer, "step-00000004", &two(), (1, 1), 0);
    commit(&location, "step-00000004", &state(4), vec![writer.wait().unwrap()], false).unwrap();
    assert!(!place.path().join("step-00000003").exists());
}

/// The process of the test below, which may not write files above a few KiB.
#[test]
#[ignore = "run by the test of full disks"]
fn child_with_a_full_disk() {
    let Ok(place) = std::env::var("REGATTA_FULL_PLACE") else { return };
    let location = Location::folder(place);
    let big = [Tensor { name: "big".into(), dims: vec![1 << 20], axis: 0, shape: vec![1 << 20] }];
    let mut writer = ShardWriter::new(location.clone(), 0);
    for step in 2..4 {
        begin(&mut writer, &format!("step-{step:08}"), &big, (1, 1), 0);
        let error = writer.wait().unwrap_err().to_string();
        assert!(error.contains("cannot write") && error.contains("rank-00000.safetensors"), "{error}");
    }
    let folder = fresh_folder(&location, 4).unwrap();
    begin(&mut writer, &folder, &two(), (1, 1), 0);
    let entry = writer.wait().unwrap();
    let mut state = state(4);
    // The manifest is what does not fit.
    state.config.sample.prompt = Some("long ".repeat(1 << 17));
    assert!(commit(&location, &folder, &state, vec![entry], true).is_err());
    abandon(&location, &folder).unwrap();
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_what_was_there_and_nothing_else() {
    let place = tempfile::tempdir().unwrap();
    let location = Location::folder(place.path());
    let earlier = save(&location, 1, &two(), (1, 1), true);
    let child = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$0\" --exact child_with_a_full_disk --ignored"])
        .arg(std::env::current_exe().unwrap())
        .env("REGATTA_FULL_PLACE", place.path())
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
    assert!(String::from_utf8_lossy(&child.stdout).contains("1 passed"));
    let mut left: Vec<_> = fs::read_dir(place.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["best", "last", &earlier]);
    assert_eq!(verify(place.path().to_str().unwrap()).unwrap().problems, [""; 0]);
}

/// A checkpoint to damage: its folder, and the file of rank 1.
fn victim() -> (tempfile::TempDir, Location, PathBuf, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let location = Location::of_run(place.path());
    let folder = save(&location, 5, &two(), (2, 2), true);
    let folder = place.path().join("checkpoints").join(folder);
    let file = folder.join("rank-00001.safetensors");
    (place, location, folder, file)
}

/// What reading, checking and verifying say of a damaged checkpoint.
fn errors(place: &Path, location: &Location) -> Vec<String> {
    let report = verify(place.to_str().unwrap()).unwrap();
    let checkpoint = Checkpoint::find(location, Which::Last).unwrap();
    let read = read_all(&checkpoint, &two()).unwrap_err();
    let tokens = two().remove(0);
    let whole = Piece::whole(&tokens.dims);
    let check = checkpoint.check([(tokens.name.as_str(), &whole)]).unwrap_err().to_string();
    [vec![read, check], report.problems].concat()
}

#[test]
fn damaged_files_are_named_with_a_tensor() {
    let contains_all = |errors: Vec<String>, wanted: &[&str]| {
        assert!(errors.len() >= 3, "{errors:?}");
        for error in errors {
            for wanted in wanted {
                assert!(error.contains(wanted), "{wanted:?} is not in {error}");
            }
        }
    };
    let (place, location, _, file) = victim();
    fs::remove_file(&file).unwrap();
    contains_all(errors(place.path(), &location), &["rank-00001.safetensors", "tokens", "missing"]);

    let (place, location, _, file) = victim();
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    contains_all(errors(place.path(), &location), &["rank-00001.safetensors", "tokens", "bytes instead of"]);
}

#[test]
fn every_flipped_bit_is_noticed() {
    let (place, location, folder, file) = victim();
    let target = place.path().to_str().unwrap();
    assert_eq!(verify(target).unwrap().problems, [""; 0]);
    let whole = fs::read(&file).unwrap();
    let checkpoint = Checkpoint::find(&location, Which::Last).unwrap();
    let entry = &checkpoint.manifest().files[1];
    let data = entry.parts[0].offset as usize;
    for place in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[place] ^= 1 << (place % 8);
        fs::write(&file, &bytes).unwrap();
        let problems = verify(target).unwrap().problems;
        assert_eq!(problems.len(), 1, "byte {place}: {problems:?}");
        if place >= data {
            let part = entry.parts.iter().rfind(|part| part.offset as usize <= place).unwrap();
            assert!(problems[0].contains(&part.name) && problems[0].contains("rank-00001"), "{problems:?}");
            let checkpoint = Checkpoint::find(&location, Which::Last).unwrap();
            let error = read_all(&checkpoint, &two()).unwrap_err();
            assert!(error.contains(&part.name) && error.contains("checksum"), "{error}");
        }
    }
    fs::write(&file, &whole).unwrap();
    // The manifest too: no bit of it can change unnoticed, or hurt.
    let manifest = folder.join("manifest.json");
    let text = fs::read(&manifest).unwrap();
    for place in 0..text.len() {
        let mut bytes = text.clone();
        bytes[place] ^= 1 << (place % 7);
        fs::write(&manifest, &bytes).unwrap();
        let error = Checkpoint::find(&location, Which::Last).map(drop).unwrap_err().to_string();
        assert!(error.contains("manifest.json"), "byte {place}: {error}");
    }
    for len in [0, 1, text.len() / 2, text.len() - 1] {
        fs::write(&manifest, &text[..len]).unwrap();
        assert!(Checkpoint::find(&location, Which::Last).is_err());
    }
    for foreign in
        ["{}", "[]", "{\"format\":\"x\",\"version\":2}", "{\"format\":\"regatta checkpoint\",\"version\":9}"]
    {
        fs::write(&manifest, foreign).unwrap();
        let error = Checkpoint::find(&location, Which::Last).map(drop).unwrap_err().to_string();
        assert!(error.contains("manifest.json"), "{error}");
    }
}

#[test]
fn another_model_is_told() {
    let (_place, location, ..) = victim();
    let checkpoint = Checkpoint::find(&location, Which::Last).unwrap();
    let read = |name: &str, dims: &[usize]| {
        let piece = Piece::whole(dims);
        checkpoint.read(name, &piece, &mut vec![0.0; piece.len()]).unwrap_err().to_string()
    };
    for error in [read("head", &[7, 4]), read("tokens", &[7, 5]), read("tokens", &[4, 7])] {
        assert!(error.contains("use the [model]") && error.contains("manifest.json"), "{error}");
    }
    assert!(read("tokens", &[7, 5]).contains("has tokens as [7, 4]"));
    assert!(checkpoint.read("tokens", &Piece::whole(&[7, 4]), &mut [0.0]).is_err());
}

#[test]
fn a_wrong_last_falls_back_to_the_newest_complete() {
    let (place, location, folder, _) = victim();
    let checkpoints = place.path().join("checkpoints");
    let incomplete = checkpoints.join("step-00000009");
    fs::create_dir(&incomplete).unwrap();
    for text in ["step-00000009", "step-00000077", "../../etc", "", "\u{0}\u{0}"] {
        fs::write(checkpoints.join("last"), text).unwrap();
        let found = Checkpoint::find(&location, Which::Last).unwrap();
        assert_eq!(found.path(), folder);
        assert!(
            !found.warnings().is_empty() && found.warnings()[0].contains("last"),
            "{:?}",
            found.warnings()
        );
        assert!(!verify(place.path().to_str().unwrap()).unwrap().problems.is_empty());
    }
    fs::write(checkpoints.join("last"), [0xff, 0xfe]).unwrap();
    assert_eq!(Checkpoint::find(&location, Which::Last).unwrap().path(), folder);
    fs::remove_file(checkpoints.join("last")).unwrap();
    assert_eq!(Checkpoint::find(&location, Which::Last).unwrap().path(), folder);
    // Going on, the interrupted save is removed, for it is older than what is saved now.
    save(&location, 10, &two(), (1, 1), false);
    assert!(!incomplete.exists());
    // One that is ahead may be in writing.
    fs::create_dir(checkpoints.join("step-00000012")).unwrap();
    save(&location, 11, &two(), (1, 1), false);
    assert!(checkpoints.join("step-00000012").exists());
    // Nothing is removed while it is unclear what `best` is.
    fs::write(checkpoints.join("best"), "garbage").unwrap();
    save(&location, 13, &two(), (1, 1), false);
    assert!(folder.exists() && checkpoints.join("step-00000011").exists());
}

#[test]
fn there_may_be_none() {
    let place = tempfile::tempdir().unwrap();
    for target in [place.path().to_str().unwrap(), "/does/not/exist", "memory://nobody/none"] {
        let error = Checkpoint::locate(target, Which::Last).unwrap_err().to_string();
        assert!(error.contains("there is no complete checkpoint"), "{error}");
        assert!(verify(target).is_err());
    }
    let older = place.path().join("checkpoints/step-00000001");
    fs::create_dir_all(&older).unwrap();
    fs::write(older.join("state.json"), "{}").unwrap();
    fs::write(place.path().join("checkpoints/last"), "step-00000001").unwrap();
    let error = Checkpoint::locate(place.path().to_str().unwrap(), Which::Last).unwrap_err().to_string();
    assert!(error.contains("format version 1"), "{error}");
}

#[test]
fn every_way_to_name_a_checkpoint() {
    let (place, location, folder, _) = victim();
    let run = place.path().display().to_string();
    let url = format!("file://{run}/checkpoints");
    let step = folder.file_name().unwrap().to_str().unwrap();
    for target in [
        run.clone(),
        format!("{run}/checkpoints"),
        folder.display().to_string(),
        url.clone(),
        format!("{url}/"),
        format!("{url}/{step}"),
    ] {
        let summary = inspect(&target, Which::Last).unwrap();
        assert_eq!((summary.state.step, summary.parameters), (5, 28), "{target}");
        let report = verify(&target).unwrap();
        assert_eq!((report.files, report.problems.len()), (4, 0), "{target}");
        let text = summary.to_string();
        for part in ["step        5", "mesh data=1", "kind gpt", "first 192 B", "rank-00003", "tokens [7, 4]"]
        {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
    }
    // The same place through another door, to write.
    let objects = Location::parse(&url).unwrap();
    save(&objects, 6, &two(), (3, 1), false);
    assert_eq!(Checkpoint::find(&location, Which::Last).unwrap().state().step, 6);
    read_all(&Checkpoint::find(&objects, Which::Last).unwrap(), &two()).unwrap();
    save(&objects, 7, &two(), (3, 1), false);
    assert!(!place.path().join("checkpoints/step-00000006/manifest.json").exists());
}

#[test]
fn urls_that_cannot_be() {
    for (url, wanted) in [
        ("ftp://x/y", "not supported as an object store"),
        ("s3://", "names no bucket"),
        ("file://host/x", "three slashes"),
        ("s3://bucket/x", "s3"),
        ("gs://bucket/x", "gs"),
        ("az://container/x", "az"),
    ] {
        match Location::parse(url) {
            Err(error) => assert!(error.to_string().contains(wanted), "{error}"),
            // Built with the feature, and the environment has what the client needs.
            Ok(_) => assert!(["s3", "gs", "az"].contains(&wanted), "{url}"),
        }
    }
    #[cfg(not(feature = "s3"))]
    assert!(Location::parse("s3://bucket/x").unwrap_err().to_string().contains("--features s3"));
}

#[test]
fn objects_above_one_request_and_inside_async_code() {
    let big = vec![Tensor { name: "big".into(), dims: vec![5, 1 << 20], axis: 1, shape: vec![5, 1 << 20] }];
    let location = Location::parse("memory://big").unwrap();
    save(&location, 1, &big, (1, 1), false);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let checkpoint = Checkpoint::find(&location, Which::Last).unwrap();
        read_all(&checkpoint, &big).unwrap();
        let piece = Piece::boxed(&[5, 1 << 20], &[1..4, 7..9]).narrow(1..5);
        let mut found = vec![0.0; 4];
        checkpoint.read("big", &piece, &mut found).unwrap();
        assert_eq!(found, values_of(&big[0], &piece));
    });
}

/// By hand, against any store: REGATTA_TEST_STORE=s3://BUCKET/PREFIX, with the keys in the environment.
#[test]
fn a_store_of_choice() {
    let Ok(url) = std::env::var("REGATTA_TEST_STORE") else {
        eprintln!("skipped: REGATTA_TEST_STORE names no store");
        return;
    };
    let location = Location::parse(&url).unwrap();
    let mut tensors = two();
    tensors.push(Tensor { name: "big".into(), dims: vec![3, 6 << 20], axis: 1, shape: vec![3, 6 << 20] });
    for (step, plan) in [(1, (1, 1)), (2, (2, 2)), (3, (3, 1))] {
        let folder = save(&location, step, &tensors, plan, step == 1);
        let found = Checkpoint::locate(&url, Which::Last).unwrap();
        assert_eq!((found.folder(), found.warnings().len()), (folder.as_str(), 0));
        read_all(&found, &tensors).unwrap();
        assert_eq!(Checkpoint::find(&location, Which::Best).unwrap().state().step, 1);
        assert_eq!(verify(&url).unwrap().problems, [""; 0]);
        assert_eq!(verify(&url).unwrap().checkpoints.len(), step.min(2));
    }
    let error = Checkpoint::locate(&format!("{url}/nothing"), Which::Last).unwrap_err().to_string();
    assert!(error.contains("there is no complete checkpoint"), "{error}");
}
