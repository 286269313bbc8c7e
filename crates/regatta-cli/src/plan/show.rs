//! A plan as text.

use super::table::{row, table};
use crate::error::Result;
use regatta::config::Config;
use regatta::plan::{Axis, Plan};
use regatta::train::{Collective, LinkUse, Outline};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Range;
use std::time::Duration;

/// The plan, its stages, the memory of their ranks, and what goes between workers.
pub fn head(config: &Config, plan: &Plan, vocab: usize, compute: Option<Duration>) -> Result<String> {
    let mut text = format!("{plan}\nlayout: {}\n", plan.layout);
    text.push_str(&stages(config, plan, vocab)?);
    text.push_str(&memory(config, plan, vocab)?);
    if plan.mesh.workers() > 1 {
        writeln!(text, "\n{}", LinkUse::of(config, plan, vocab, compute)?)?;
    }
    Ok(text)
}

/// What `rank` holds and communicates.
pub fn rank(config: &Config, plan: &Plan, vocab: usize, rank: usize) -> Result<String> {
    let mut text = String::new();
    let outline = Outline::new(config, plan, vocab, rank)?;
    writeln!(text, "\n{}", heading(plan, &outline))?;
    text.push_str(&parameters(plan, &outline));
    let collectives = outline.collectives();
    if collectives.is_empty() {
        writeln!(text, "\n  a step communicates nothing")?;
        return Ok(text);
    }
    writeln!(text, "\n  a step communicates (bytes sent where operations go around a ring)")?;
    text.push_str(&communication(&collectives));
    writeln!(text, "\n  in all")?;
    text.push_str(&totals(&collectives));
    Ok(text)
}

/// What a rank of each stage takes, by kind.
fn memory(config: &Config, plan: &Plan, vocab: usize) -> Result<String> {
    let mut rows = vec![row([
        &"stage",
        &"parameters",
        &"gradients",
        &"optimizer",
        &"buffers",
        &"activations",
        &"together",
    ])];
    for (stage, of) in config.footprints(plan, vocab)?.iter().enumerate() {
        let kinds = [of.parameters, of.gradients, of.optimizer, of.working, of.activations, of.total()];
        let [a, b, c, d, e, f] = kinds.map(|bytes| format!("{:.2}", bytes as f64 / f64::from(1 << 20)));
        rows.push(row([&stage, &a, &b, &c, &d, &e, &f]));
    }
    let columns: Vec<usize> = (0..rows[0].len()).collect();
    Ok(format!(
        "\nmemory of a rank in MiB, without what the program itself takes\n{}",
        table(&rows, &columns, 0)
    ))
}

/// Which blocks each stage holds, and what share of the model's cost they are.
fn stages(config: &Config, plan: &Plan, vocab: usize) -> Result<String> {
    let costs = config.model.costs(vocab);
    let flops: Vec<f64> = costs.iter().map(|cost| cost.flops).collect();
    let (cut, schedule, whole) = (plan.cut(&flops)?, plan.pipeline()?, flops.iter().sum::<f64>());
    let mut rows = vec![row([&"stage", &"ranks", &"cost", &"blocks"])];
    for stage in 0..schedule.stages {
        let chunks: Vec<Range<usize>> =
            (0..schedule.chunks).map(|chunk| cut[schedule.virtual_stage(stage, chunk)].clone()).collect();
        let cost: f64 = chunks.iter().map(|blocks| flops[blocks.clone()].iter().sum::<f64>()).sum();
        let share = format!("{:.1} %", 100.0 * cost / whole);
        let of_chunk = |blocks: &Range<usize>| match blocks.len() {
            1 => costs[blocks.start].name.clone(),
            _ => format!("{} to {}", costs[blocks.start].name, costs[blocks.end - 1].name),
        };
        let blocks: Vec<String> = chunks.iter().map(of_chunk).collect();
        let at = (0..plan.world()).filter(|&rank| plan.mesh.coordinate(rank, Axis::Pipe) == stage);
        let ranks: Vec<String> = at.map(|rank| rank.to_string()).collect();
        rows.push(row([&stage, &ranks.join(","), &share, &blocks.join("; ")]));
    }
    let mut text = format!("\n{}", table(&rows, &[0, 2], 0));
    if schedule.stages > 1 {
        let (kind, micro_batches, bubble) =
            (schedule.kind, schedule.micro_batches, 100.0 * schedule.bubble());
        writeln!(
            text,
            "schedule {kind}: {micro_batches} micro-batches, the stages wait {bubble:.1} % of the time"
        )?;
        if let Some(warning) = schedule.warning() {
            writeln!(text, "warning: {warning}")?;
        }
    }
    Ok(text)
}

/// A rank's place in the mesh, and how much it holds.
fn heading(plan: &Plan, outline: &Outline<'_>) -> String {
    let place = |axis: &Axis| plan.mesh.axis(*axis) > 1;
    let places: Vec<String> = Axis::ALL
        .into_iter()
        .filter(place)
        .map(|axis| format!("{axis} {}", plan.mesh.coordinate(outline.rank, axis)))
        .collect();
    let at = if places.is_empty() { String::new() } else { format!(" at {}", places.join(", ")) };
    let owned = match sharded(plan) {
        0 => String::new(),
        zero => {
            let own = outline.owned();
            let what = ["", "the optimizer's state", "gradients and the optimizer's state", "parameters"];
            format!(", keeps {} of {own} numbers, padding included", what[usize::from(zero.min(3))])
        }
    };
    format!("rank {}{at}: {} parameters{owned}", outline.rank, outline.num_params())
}

/// What is sharded over data: 0 where nothing is.
fn sharded(plan: &Plan) -> u8 {
    plan.sharded().map_or(0, |_| plan.zero)
}

/// Every parameter: its shape in the whole model, and the part that the rank holds and updates.
fn parameters(plan: &Plan, outline: &Outline<'_>) -> String {
    let zero = sharded(plan);
    let mut header = row([&"parameter", &"shape", &"slice", &"stage", &"unit"]);
    if zero > 0 {
        header.push("shard".into());
    }
    let mut rows = vec![header];
    for param in outline.params() {
        let slice = param.slice.iter().map(|(dim, range)| format!("{dim} {}..{}", range.start, range.end));
        let (slice, shape) = (slice.collect::<Vec<_>>().join(", "), format!("{:?}", param.shape));
        let mut cells = row([&param.path, &shape, &slice, &outline.stage(), &param.unit]);
        if zero > 0 {
            cells.push(param.shard.map_or("none".into(), |own| format!("{}..{}", own.start, own.end)));
        }
        rows.push(cells);
    }
    table(&rows, &[3, 4], 2)
}

/// Every operation, in the order of purposes and blocks.
fn communication(collectives: &[Collective]) -> String {
    let mut rows = vec![row([
        &"purpose",
        &"operation",
        &"over",
        &"ranks",
        &"count",
        &"bytes each",
        &"sent each",
        &"where",
    ])];
    rows.extend(collectives.iter().map(|one| {
        let kind = one.kind.name();
        let place = match one.every {
            1 => one.place.clone(),
            every => format!("{}; every {every} steps", one.place),
        };
        row([&one.purpose, &kind, &one.over, &one.ranks, &one.count, &one.bytes, &one.sent, &place])
    }));
    table(&rows, &[3, 4, 5, 6], 4)
}

/// Sums by axes, in the mean over steps.
fn totals(collectives: &[Collective]) -> String {
    let mut sums: BTreeMap<&str, [f64; 3]> = BTreeMap::new();
    for one in collectives {
        let volume = one.volume();
        let sum = sums.entry(&one.over).or_default();
        for (sum, more) in sum.iter_mut().zip([volume.operations, volume.bytes, volume.sent]) {
            *sum += more as f64 / one.every as f64;
        }
    }
    let mut rows = vec![row([&"over", &"operations", &"bytes", &"sent"])];
    let all = sums.values().fold([0.0; 3], |all, sum| [0, 1, 2].map(|i| all[i] + sum[i]));
    let mut add = |over: &str, [operations, bytes, sent]: [f64; 3]| {
        // Some take place in few steps.
        let digits = if operations.fract() == 0.0 { 0 } else { 2 };
        let operations = format!("{operations:.digits$}");
        rows.push(row([&over, &operations, &format!("{bytes:.0}"), &format!("{sent:.0}")]));
    };
    sums.iter().for_each(|(over, sum)| add(over, *sum));
    add("all", all);
    table(&rows, &[1, 2, 3], 4)
}
