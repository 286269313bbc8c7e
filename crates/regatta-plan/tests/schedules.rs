//! What holds for the schedules of every shape.

use proptest::prelude::*;
use regatta_plan::{Costs, Direction, Schedule, ScheduleKind, Task, Timeline, simulate};

/// A schedule where the shape allows the kind; the chunks count for the interleaved one alone.
fn schedule(kind: ScheduleKind, stages: usize, chunks: usize, micros: usize) -> Schedule {
    let chunks = if kind == ScheduleKind::Interleaved { chunks.max(2) } else { 1 };
    Schedule::new(kind, stages, chunks, micros).unwrap()
}

/// With a forward of the whole stage 1 and a backward 2, over its chunks.
fn timeline(schedule: &Schedule) -> Timeline {
    let cost = 1.0 / schedule.chunks as f64;
    simulate(schedule, &Costs::even(schedule.virtual_stages(), cost, cost, cost)).unwrap()
}

/// What the tasks of `to` want from `from`, in their order.
fn wanted(schedule: &Schedule, from: usize, to: usize) -> Vec<(Direction, usize, usize)> {
    let wants = |task: &Task| {
        let here = schedule.virtual_stage(to, task.chunk());
        let direction = task.sends()?;
        let source = match direction {
            Direction::Activation => here.checked_sub(1)?,
            Direction::Gradient => Some(here + 1).filter(|next| *next < schedule.virtual_stages())?,
        };
        (from != to && schedule.place(source).0 == from).then_some((direction, task.chunk(), task.micro()))
    };
    schedule.tasks[to].iter().filter_map(wants).collect()
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-9
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn all_are_complete_and_end(stages in 1usize..=6, chunks in 1usize..=4, micros in 1usize..=16) {
        for kind in ScheduleKind::ALL {
            prop_assert_eq!(schedule(kind, stages, chunks, micros).check(), Ok(()), "{}", kind);
        }
        prop_assert_eq!(Schedule::forward_only(stages, chunks, micros).check(), Ok(()));
    }

    #[test]
    fn messages_come_in_the_order_in_which_they_are_wanted(
        stages in 1usize..=6, chunks in 1usize..=4, micros in 1usize..=16,
    ) {
        let training = ScheduleKind::ALL.map(|kind| schedule(kind, stages, chunks, micros));
        for schedule in training.into_iter().chain([Schedule::forward_only(stages, chunks, micros)]) {
            let links = schedule.links();
            for from in 0..stages {
                for to in 0..stages {
                    let (traffic, wanted) = (schedule.traffic(from, to), wanted(&schedule, from, to));
                    for direction in [Direction::Activation, Direction::Gradient] {
                        let messages = schedule.messages(from, to, direction);
                        prop_assert_eq!(links.contains(&(from, to, direction)), !messages.is_empty());
                        for all in [&traffic, &wanted] {
                            let of_it = all.iter().filter(|message| message.0 == direction);
                            let of_it: Vec<_> = of_it.map(|&(_, chunk, micro)| (chunk, micro)).collect();
                            prop_assert_eq!(&messages, &of_it, "{:?}", schedule);
                        }
                    }
                }
            }
            let sent: usize = links.iter().map(|&(from, to, way)| schedule.messages(from, to, way).len()).sum();
            let ways = if schedule.training { 2 } else { 1 };
            let cuts = if stages == 1 { 0 } else { schedule.virtual_stages() - 1 };
            prop_assert_eq!(sent, ways * cuts * micros);
        }
    }

    #[test]
    fn the_simulated_bubble_is_that_of_the_formula(
        stages in 1usize..=6, chunks in 2usize..=4, micros in 1usize..=16,
    ) {
        for kind in ScheduleKind::ALL {
            let schedule = schedule(kind, stages, chunks, micros);
            let idle = timeline(&schedule).idle_share();
            prop_assert!(close(idle, schedule.bubble()), "{kind}: {idle} and {}", schedule.bubble());
        }
        let formula = (stages - 1) as f64 / (micros + stages - 1) as f64;
        for kind in [ScheduleKind::GPipe, ScheduleKind::OneFOneB] {
            prop_assert_eq!(timeline(&schedule(kind, stages, 1, micros)).idle_share(), formula);
        }
        let forward = Schedule::forward_only(stages, chunks, micros);
        prop_assert!(close(timeline(&forward).idle_share(), forward.bubble()));
    }

    #[test]
    fn interleaving_and_cut_backwards_wait_less_than_1f1b(
        stages in 2usize..=6, chunks in 2usize..=4, more in 0usize..=16,
    ) {
        let micros = stages + more;
        let plain = timeline(&schedule(ScheduleKind::OneFOneB, stages, 1, micros));
        let chunked = timeline(&schedule(ScheduleKind::Interleaved, stages, chunks, micros));
        let cut = timeline(&schedule(ScheduleKind::ZeroBubble, stages, 1, micros));
        prop_assert!(chunked.idle_share() < plain.idle_share());
        prop_assert!(close(plain.span - chunked.span, 3.0 * (stages - 1) as f64 * (1.0 - 1.0 / chunks as f64)));
        // Qi et al. 2023, section 2.3: (p - 1) (F + I - W), a third of 1F1B's (p - 1) (F + I + W).
        for stage in 0..stages {
            prop_assert!(close(cut.idle(stage), (stages - 1) as f64));
            prop_assert!(close(plain.idle(stage), 3.0 * (stages - 1) as f64));
        }
    }

    #[test]
    fn memory_is_bounded_by_the_stages(stages in 1usize..=6, micros in 1usize..=16) {
        let plain = schedule(ScheduleKind::OneFOneB, stages, 1, micros);
        let cut = schedule(ScheduleKind::ZeroBubble, stages, 1, micros);
        let whole = schedule(ScheduleKind::GPipe, stages, 1, micros);
        for stage in 0..stages {
            prop_assert_eq!(plain.peak_in_flight(stage), micros.min(stages - stage));
            prop_assert_eq!(plain.peak_held(stage), plain.peak_in_flight(stage));
            prop_assert_eq!(cut.peak_in_flight(stage), plain.peak_in_flight(stage));
            prop_assert_eq!(cut.peak_held(stage), micros.min(stages));
            prop_assert_eq!(whole.peak_in_flight(stage), micros);
        }
    }

    #[test]
    fn interleaved_memory_does_not_grow_with_the_batch(
        stages in 1usize..=6, chunks in 2usize..=4, micros in 1usize..=64,
    ) {
        let schedule = schedule(ScheduleKind::Interleaved, stages, chunks, micros);
        let group = micros.div_ceil((micros / stages).max(1));
        for stage in 0..stages {
            let bound = 2 * (stages - 1 - stage) + (chunks - 1) * group + 1;
            prop_assert_eq!(schedule.peak_in_flight(stage), bound.min(micros * chunks));
        }
    }
}

/// The tasks of a stage as the papers write them.
fn written(schedule: &Schedule, stage: usize) -> String {
    schedule.tasks[stage].iter().map(Task::to_string).collect::<Vec<_>>().join(" ")
}

#[test]
fn one_stage_alone() {
    assert_eq!(written(&schedule(ScheduleKind::GPipe, 1, 1, 2), 0), "F0.0 F0.1 B0.1 B0.0");
    assert_eq!(written(&schedule(ScheduleKind::OneFOneB, 1, 1, 2), 0), "F0.0 B0.0 F0.1 B0.1");
    assert_eq!(written(&schedule(ScheduleKind::ZeroBubble, 1, 1, 2), 0), "F0.0 I0.0 W0.0 F0.1 I0.1 W0.1");
    let chunked = schedule(ScheduleKind::Interleaved, 1, 2, 2);
    assert_eq!(written(&chunked, 0), "F0.0 F1.0 B1.0 F0.1 B0.0 F1.1 B1.1 B0.1");
    assert!(chunked.links().is_empty());
}

#[test]
fn two_stages_of_two_chunks_are_neighbours_on_both_sides() {
    let schedule = schedule(ScheduleKind::Interleaved, 2, 2, 4);
    assert_eq!(
        written(&schedule, 1),
        "F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 F0.2 B0.0 F0.3 B0.1 F1.2 B1.2 F1.3 B1.3 B0.2 B0.3"
    );
    let (forward, backward) = (Direction::Activation, Direction::Gradient);
    assert_eq!(schedule.links(), [(0, 1, forward), (0, 1, backward), (1, 0, forward), (1, 0, backward)]);
    assert_eq!(schedule.messages(1, 0, forward), [(1, 0), (1, 1), (1, 2), (1, 3)]);
    assert_eq!(schedule.messages(0, 1, backward), [(0, 0), (0, 1), (0, 2), (0, 3)]);
    // Each direction comes as it is wanted, both together do not always.
    let schedule = self::schedule(ScheduleKind::Interleaved, 2, 2, 7);
    assert_eq!(schedule.traffic(1, 0).len(), 7 + 14);
    assert_ne!(schedule.traffic(1, 0), wanted(&schedule, 1, 0));
    assert_eq!((schedule.virtual_stage(1, 1), schedule.place(3)), (3, (1, 1)));
}

#[test]
fn the_last_stage_of_zb_h1_delays_its_weight_parts() {
    let schedule = schedule(ScheduleKind::ZeroBubble, 3, 1, 4);
    assert_eq!(written(&schedule, 0), "F0.0 F0.1 F0.2 I0.0 W0.0 F0.3 I0.1 W0.1 I0.2 W0.2 I0.3 W0.3");
    assert_eq!(written(&schedule, 2), "F0.0 I0.0 F0.1 I0.1 F0.2 I0.2 W0.0 F0.3 I0.3 W0.1 W0.2 W0.3");
}

#[test]
fn shapes_that_cannot_be_are_refused_and_poor_ones_warned_of() {
    let new = Schedule::new;
    let error = new(ScheduleKind::Interleaved, 2, 1, 4).unwrap_err().to_string();
    assert!(error.contains("at least 2 model chunks"), "{error}");
    let error = new(ScheduleKind::OneFOneB, 2, 2, 4).unwrap_err().to_string();
    assert!(error.contains("the schedule 1f1b takes 1 model chunk a stage, not 2"), "{error}");
    for (stages, chunks, micros) in [(0, 1, 1), (1, 0, 1), (1, 1, 0)] {
        assert!(new(ScheduleKind::GPipe, stages, chunks, micros).is_err());
    }
    assert_eq!(schedule(ScheduleKind::OneFOneB, 4, 1, 4).warning(), None);
    assert_eq!(
        schedule(ScheduleKind::OneFOneB, 4, 1, 2).warning().unwrap(),
        "2 micro-batches do not fill a pipeline of 4 stages: it waits 60% of the time; use at least 4"
    );
}
