//! Properties of the schedules of every shape.

use proptest::prelude::*;
use regatta_plan::{Costs, Direction, Schedule, ScheduleKind, Task, Timeline, simulate};

/// A schedule of this kind. Only the interleaved schedule uses `chunks`, of which it needs at least 2.
fn schedule(kind: ScheduleKind, stages: usize, chunks: usize, micro_batches: usize) -> Schedule {
    let chunks = if kind == ScheduleKind::Interleaved { chunks.max(2) } else { 1 };
    Schedule::new(kind, stages, chunks, micro_batches).unwrap()
}

/// Simulates the schedule. A forward of all chunks of a stage takes 1, and a backward 2.
fn timeline(schedule: &Schedule) -> Timeline {
    let cost = 1.0 / schedule.chunks as f64;
    simulate(schedule, &Costs::even(schedule.virtual_stages(), cost, cost, cost)).unwrap()
}

/// The messages that the tasks of `to` need from `from`, in the order of the tasks.
fn needed(schedule: &Schedule, from: usize, to: usize) -> Vec<(Direction, usize, usize)> {
    let needs = |task: &Task| {
        let here = schedule.virtual_stage(to, task.chunk());
        let direction = task.sends()?;
        let source = match direction {
            Direction::Activation => here.checked_sub(1)?,
            Direction::Gradient => Some(here + 1).filter(|next| *next < schedule.virtual_stages())?,
        };
        (from != to && schedule.place(source).0 == from).then_some((
            direction,
            task.chunk(),
            task.micro_batch(),
        ))
    };
    schedule.tasks[to].iter().filter_map(needs).collect()
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-9
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_schedule_is_complete_and_ends(stages in 1usize..=6, chunks in 1usize..=4, micro_batches in 1usize..=16) {
        for kind in ScheduleKind::ALL {
            prop_assert_eq!(schedule(kind, stages, chunks, micro_batches).check(), Ok(()), "{}", kind);
        }
        prop_assert_eq!(Schedule::forward_only(stages, chunks, micro_batches).check(), Ok(()));
    }

    #[test]
    fn messages_come_in_the_order_in_which_they_are_needed(
        stages in 1usize..=6, chunks in 1usize..=4, micro_batches in 1usize..=16,
    ) {
        let training = ScheduleKind::ALL.map(|kind| schedule(kind, stages, chunks, micro_batches));
        for schedule in training.into_iter().chain([Schedule::forward_only(stages, chunks, micro_batches)]) {
            let links = schedule.links();
            for from in 0..stages {
                for to in 0..stages {
                    let (traffic, needed) = (schedule.traffic(from, to), needed(&schedule, from, to));
                    for direction in [Direction::Activation, Direction::Gradient] {
                        let messages = schedule.messages(from, to, direction);
                        prop_assert_eq!(links.contains(&(from, to, direction)), !messages.is_empty());
                        for all in [&traffic, &needed] {
                            let in_direction = all.iter().filter(|message| message.0 == direction);
                            let in_direction: Vec<_> = in_direction.map(|&(_, chunk, micro_batch)| (chunk, micro_batch)).collect();
                            prop_assert_eq!(&messages, &in_direction, "{:?}", schedule);
                        }
                    }
                }
            }
            let messages = |&(from, to, direction)| schedule.messages(from, to, direction).len();
            let sent: usize = links.iter().map(messages).sum();
            let directions = if schedule.training { 2 } else { 1 };
            let boundaries = if stages == 1 { 0 } else { schedule.virtual_stages() - 1 };
            prop_assert_eq!(sent, directions * boundaries * micro_batches);
        }
    }

    #[test]
    fn the_simulated_bubble_agrees_with_the_formula(
        stages in 1usize..=6, chunks in 2usize..=4, micro_batches in 1usize..=16,
    ) {
        for kind in ScheduleKind::ALL {
            let schedule = schedule(kind, stages, chunks, micro_batches);
            let idle = timeline(&schedule).idle_share();
            prop_assert!(close(idle, schedule.bubble()), "{kind}: {idle} and {}", schedule.bubble());
        }
        let formula = (stages - 1) as f64 / (micro_batches + stages - 1) as f64;
        for kind in [ScheduleKind::GPipe, ScheduleKind::OneFOneB] {
            prop_assert_eq!(timeline(&schedule(kind, stages, 1, micro_batches)).idle_share(), formula);
        }
        let forward = Schedule::forward_only(stages, chunks, micro_batches);
        prop_assert!(close(timeline(&forward).idle_share(), forward.bubble()));
    }

    #[test]
    fn interleaved_and_zero_bubble_wait_less_than_1f1b(
        stages in 2usize..=6, chunks in 2usize..=4, more in 0usize..=16,
    ) {
        let micro_batches = stages + more;
        let one_f_one_b = timeline(&schedule(ScheduleKind::OneFOneB, stages, 1, micro_batches));
        let interleaved = timeline(&schedule(ScheduleKind::Interleaved, stages, chunks, micro_batches));
        let zero_bubble = timeline(&schedule(ScheduleKind::ZeroBubble, stages, 1, micro_batches));
        prop_assert!(interleaved.idle_share() < one_f_one_b.idle_share());
        let saved = 3.0 * (stages - 1) as f64 * (1.0 - 1.0 / chunks as f64);
        prop_assert!(close(one_f_one_b.span - interleaved.span, saved));
        // Qi et al. 2023, section 2.3: (p - 1) (F + I - W), a third of the (p - 1) (F + I + W) of 1F1B.
        for stage in 0..stages {
            prop_assert!(close(zero_bubble.idle(stage), (stages - 1) as f64));
            prop_assert!(close(one_f_one_b.idle(stage), 3.0 * (stages - 1) as f64));
        }
    }

    #[test]
    fn memory_is_bounded_by_the_stages(stages in 1usize..=6, micro_batches in 1usize..=16) {
        let one_f_one_b = schedule(ScheduleKind::OneFOneB, stages, 1, micro_batches);
        let zero_bubble = schedule(ScheduleKind::ZeroBubble, stages, 1, micro_batches);
        let gpipe = schedule(ScheduleKind::GPipe, stages, 1, micro_batches);
        for stage in 0..stages {
            prop_assert_eq!(one_f_one_b.peak_in_flight(stage), micro_batches.min(stages - stage));
            prop_assert_eq!(one_f_one_b.peak_held(stage), one_f_one_b.peak_in_flight(stage));
            prop_assert_eq!(zero_bubble.peak_in_flight(stage), one_f_one_b.peak_in_flight(stage));
            prop_assert_eq!(zero_bubble.peak_held(stage), micro_batches.min(stages));
            prop_assert_eq!(gpipe.peak_in_flight(stage), micro_batches);
        }
    }

    #[test]
    fn interleaved_memory_does_not_grow_with_the_batch(
        stages in 1usize..=6, chunks in 2usize..=4, micro_batches in 1usize..=64,
    ) {
        let schedule = schedule(ScheduleKind::Interleaved, stages, chunks, micro_batches);
        let group = micro_batches.div_ceil((micro_batches / stages).max(1));
        for stage in 0..stages {
            let bound = 2 * (stages - 1 - stage) + (chunks - 1) * group + 1;
            prop_assert_eq!(schedule.peak_in_flight(stage), bound.min(micro_batches * chunks));
        }
    }
}

/// The tasks of a stage in the notation of the papers.
fn notation(schedule: &Schedule, stage: usize) -> String {
    schedule.tasks[stage].iter().map(Task::to_string).collect::<Vec<_>>().join(" ")
}

#[test]
fn schedules_of_one_stage() {
    assert_eq!(notation(&schedule(ScheduleKind::GPipe, 1, 1, 2), 0), "F0.0 F0.1 B0.1 B0.0");
    assert_eq!(notation(&schedule(ScheduleKind::OneFOneB, 1, 1, 2), 0), "F0.0 B0.0 F0.1 B0.1");
    assert_eq!(notation(&schedule(ScheduleKind::ZeroBubble, 1, 1, 2), 0), "F0.0 I0.0 W0.0 F0.1 I0.1 W0.1");
    let interleaved = schedule(ScheduleKind::Interleaved, 1, 2, 2);
    assert_eq!(notation(&interleaved, 0), "F0.0 F1.0 B1.0 F0.1 B0.0 F1.1 B1.1 B0.1");
    assert!(interleaved.links().is_empty());
}

#[test]
fn two_stages_of_two_chunks_are_neighbours_on_both_sides() {
    let schedule = schedule(ScheduleKind::Interleaved, 2, 2, 4);
    assert_eq!(
        notation(&schedule, 1),
        "F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 F0.2 B0.0 F0.3 B0.1 F1.2 B1.2 F1.3 B1.3 B0.2 B0.3"
    );
    let (forward, backward) = (Direction::Activation, Direction::Gradient);
    assert_eq!(schedule.links(), [(0, 1, forward), (0, 1, backward), (1, 0, forward), (1, 0, backward)]);
    assert_eq!(schedule.messages(1, 0, forward), [(1, 0), (1, 1), (1, 2), (1, 3)]);
    assert_eq!(schedule.messages(0, 1, backward), [(0, 0), (0, 1), (0, 2), (0, 3)]);
    // The messages of one direction come in the order in which they are needed; those of both together may not.
    let schedule = self::schedule(ScheduleKind::Interleaved, 2, 2, 7);
    assert_eq!(schedule.traffic(1, 0).len(), 7 + 14);
    assert_ne!(schedule.traffic(1, 0), needed(&schedule, 1, 0));
    assert_eq!((schedule.virtual_stage(1, 1), schedule.place(3)), (3, (1, 1)));
}

#[test]
fn the_last_stage_of_zb_h1_delays_its_weight_parts() {
    let schedule = schedule(ScheduleKind::ZeroBubble, 3, 1, 4);
    assert_eq!(notation(&schedule, 0), "F0.0 F0.1 F0.2 I0.0 W0.0 F0.3 I0.1 W0.1 I0.2 W0.2 I0.3 W0.3");
    assert_eq!(notation(&schedule, 2), "F0.0 I0.0 F0.1 I0.1 F0.2 I0.2 W0.0 F0.3 I0.3 W0.1 W0.2 W0.3");
}

#[test]
fn invalid_shapes_are_errors_and_inefficient_ones_are_warned_of() {
    let new = Schedule::new;
    let error = new(ScheduleKind::Interleaved, 2, 1, 4).unwrap_err().to_string();
    assert!(error.contains("at least 2 model chunks"), "{error}");
    let error = new(ScheduleKind::OneFOneB, 2, 2, 4).unwrap_err().to_string();
    assert!(error.contains("the schedule 1f1b takes 1 model chunk per stage, not 2"), "{error}");
    for (stages, chunks, micro_batches) in [(0, 1, 1), (1, 0, 1), (1, 1, 0)] {
        assert!(new(ScheduleKind::GPipe, stages, chunks, micro_batches).is_err());
    }
    assert_eq!(schedule(ScheduleKind::OneFOneB, 4, 1, 4).warning(), None);
    assert_eq!(
        schedule(ScheduleKind::OneFOneB, 4, 1, 2).warning().unwrap(),
        "2 micro-batches do not fill a pipeline of 4 stages: it waits 60% of the time; use at least 4"
    );
}
