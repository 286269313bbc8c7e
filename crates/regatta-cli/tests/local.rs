//! Islands that train on their own and come together from time to time: whole runs.

mod common;

use common::{Place, difference, fail, losses, said, succeed};

fn train(place: &Place, out: &str, sets: &[&str], more: &[&str]) -> std::process::Command {
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    place.train(out, &[more, &sets].concat())
}

/// Every way to come together, at least twice before step 12 and between two times after it.
const WAYS: [&[&str]; 7] = [
    &["local.every=5"],
    &["local.every=5", "local.start=3"],
    &["local.every=5", "local.outer=diloco"],
    &["local.every=6", "local.outer=diloco", "local.fragments=2", "local.overlap=2"],
    &["local.every=6", "local.outer=diloco", "local.fragments=3", "local.overlap=1", "compress.kind=int4"],
    &["local.every=5", "local.outer=diloco", "compress.kind=topk", "compress.ratio=0.2"],
    &["local.every=5", "local.outer=gossip"],
];

#[test]
fn islands_that_come_together_in_every_step_are_one() {
    let place = Place::new();
    let sgd = ["optimizer.kind=sgd", "optimizer.momentum=0", "optimizer.clip=0", "optimizer.lr=0.05"];
    let steps = ["--steps", "12"];
    for (mesh, zero) in
        [("replica=3", "0"), ("replica=2,data=2", "0"), ("replica=2,data=2", "1"), ("replica=2,data=2", "3")]
    {
        let (mesh_set, zero_set) = (format!("parallel.mesh={mesh}"), format!("parallel.zero={zero}"));
        let name = format!("{}-{zero}", mesh.replace([',', '='], "-"));
        let plan = [mesh_set.as_str(), zero_set.as_str(), "train.batch=12", "train.check_every=1"];
        let plan = if zero == "0" { [plan[0], plan[2], plan[3]].to_vec() } else { plan.to_vec() };
        let sets = [&sgd[..], &plan].concat();
        succeed(&mut train(&place, &name, &sets, &steps));
        let one = losses(&place.summary(&name));
        // With plain SGD the mean of parameters is what the mean of gradients gives.
        let diloco = ["local.every=1", "local.outer=diloco", "local.lr=1", "local.momentum=0"];
        for (index, local) in [&["local.every=1"][..], &diloco].into_iter().enumerate() {
            let out = format!("{name}-{index}");
            succeed(&mut train(&place, &out, &[&sets, local].concat(), &steps));
            let own = losses(&place.summary(&out));
            let far = difference(&own, &one);
            assert!(far < 1e-5, "{name} {local:?}: {far}\n{own:?}\n{one:?}");
        }
    }
}

#[test]
fn every_way_learns_ends_as_one_and_resumes_bit_for_bit() {
    let place = Place::new();
    let common = ["train.batch=12", "train.check_every=1", "optimizer.constant=true"];
    for (index, way) in WAYS.into_iter().enumerate() {
        let sets = [&common[..], way].concat();
        let whole = format!("whole-{index}");
        // At the end the ranks are compared, and a difference is an error.
        succeed(&mut train(&place, &whole, &sets, &["--workers", "3", "--steps", "43"]));
        let summary = place.summary(&whole);
        let own = losses(&summary);
        let ends = own[own.len() - 5..].iter().sum::<f64>() / 5.0;
        assert!(ends < 0.8 * own[0], "{way:?} does not learn: {own:?}");
        // The end of a shorter run brings islands together; a checkpoint before it does not.
        let half = format!("half-{index}");
        let saving = [&sets[..], &["train.checkpoint_every=7", "train.keep=20"]].concat();
        succeed(&mut train(&place, &half, &saving, &["--workers", "3", "--steps", "43"]));
        assert_eq!(place.summary(&half)["parameter_hash"], summary["parameter_hash"], "{way:?} saves");
        for step in ["step-14", "step-21", "step-28"] {
            let resume = ["--workers", "3", "--steps", "43", "--resume", "--from", step];
            let output = said(&succeed(&mut train(&place, &half, &saving, &resume)));
            assert!(!output.contains("differs"), "{output}");
            let again = place.summary(&half);
            assert_eq!(again["parameter_hash"], summary["parameter_hash"], "{way:?} from {step}");
        }
        // A run that has ended goes on from where all came together.
        let longer = ["--workers", "3", "--steps", "50", "--resume"];
        let output = said(&succeed(&mut train(&place, &half, &saving, &longer)));
        assert!(output.contains("after which islands came together"), "{output}");
    }
}

#[test]
fn another_number_of_islands_goes_on() {
    let place = Place::new();
    for (index, way) in WAYS.into_iter().enumerate() {
        let out = format!("run-{index}");
        let sets = [
            &["train.batch=12", "optimizer.constant=true", "train.checkpoint_every=13", "train.keep=9"][..],
            way,
        ]
        .concat();
        succeed(&mut train(&place, &out, &sets, &["--workers", "4", "--steps", "26"]));
        let before = losses(&place.summary(&out));
        let from = ["--resume", "--from", "step-13"];
        for workers in ["2", "1"] {
            let more = [&["--workers", workers, "--steps", "26"][..], &from].concat();
            succeed(&mut train(&place, &out, &sets, &more));
        }
        // And without any.
        let plain = ["train.batch=12", "optimizer.constant=true"];
        succeed(&mut train(
            &place,
            &out,
            &plain,
            &[&["--workers", "2", "--steps", "26"][..], &from].concat(),
        ));
        let after = losses(&place.summary(&out));
        assert!(after[after.len() - 1] < before[0], "{way:?}: {before:?} {after:?}");
    }
}

#[test]
fn islands_have_plans_of_all_kinds_inside() {
    let place = Place::new();
    for (index, mesh) in
        ["replica=2,tensor=2", "replica=2,pipe=2", "replica=2,data=2"].into_iter().enumerate()
    {
        let mesh = format!("parallel.mesh={mesh}");
        for outer in ["average", "diloco", "gossip"] {
            let outer_set = format!("local.outer={outer}");
            let sets =
                [mesh.as_str(), outer_set.as_str(), "local.every=3", "train.check_every=1", "train.batch=12"];
            let out = format!("{index}-{outer}");
            succeed(&mut train(&place, &out, &sets, &["--steps", "8"]));
            if index == 2 {
                for zero in ["parallel.zero=1", "parallel.zero=2", "parallel.zero=3"] {
                    let out = format!("{out}-{}", &zero[14..]);
                    let sets = [&sets[..], &[zero]].concat();
                    succeed(&mut train(&place, &out, &sets, &["--steps", "8"]));
                }
            }
        }
    }
}

#[test]
fn what_cannot_be_is_refused_with_its_reason() {
    let place = Place::new();
    for (sets, reason) in [
        (&["local.every=-1"][..], "local.every"),
        (&["local.every=10", "local.fragments=3"], "not a multiple of local.fragments = 3"),
        (&["local.every=10", "local.fragments=0"], "local.fragments"),
        (&["local.every=10", "local.outer=diloco", "local.overlap=10"], "local.overlap"),
        (&["local.every=10", "local.outer=nesterov"], "diloco"),
        (&["local.every=10", "local.lr=0.5"], "it is for \"diloco\""),
        (&["local.lr=0.5"], "set local.every too"),
        (&["local.every=10", "local.outer=gossip", "compress.kind=int8"], "local.outer = \"gossip\""),
        (&["local.every=10", "compress.kind=dgc"], "\"topk\""),
        (&["local.every=10", "train.precision=f16"], "train.precision = \"bf16\""),
        (&["local.every=10", "parallel.mesh=data=2"], "--mesh replica=2"),
        (&["local.every=10", "local.outer=diloco", "local.momentum=1"], "local.momentum"),
    ] {
        let said = fail(&mut train(&place, "run", sets, &["--workers", "2"]));
        assert!(said.contains(reason), "{sets:?}: {said}");
    }
    let output =
        said(&succeed(&mut train(&place, "alone", &["local.every=2"], &["--workers", "1", "--steps", "2"])));
    assert!(output.contains("local.every has no effect"), "{output}");
}
