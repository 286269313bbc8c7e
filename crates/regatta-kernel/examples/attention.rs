//! Measures the time of attention (the best of several runs) and its floating-point operations per second: `cargo run
//! --release -p regatta-kernel --example attention [RUNS [BATCH HEADS TIME WIDTH]]`. Set `RAYON_NUM_THREADS=1` to use
//! one thread.

use regatta_kernel::attention::{Attention, Dropout, Operands};
use regatta_kernel::dropout::SampleRows;
use regatta_kernel::random::Stream;
use std::time::Instant;

fn main() {
    let arguments: Vec<usize> =
        std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let runs = arguments.first().copied().unwrap_or(30);
    println!("batch heads  time width                forward              backward");
    if let Some(&[batch, heads, time, width]) = arguments.get(1..5) {
        return measure([batch, heads, time, width], Some(0), None, runs);
    }
    let shapes = [[8, 8, 128, 32], [12, 4, 64, 32], [4, 4, 256, 64], [1, 4, 1024, 64], [1, 1, 4096, 64]];
    for [batch, heads, time, width] in shapes {
        measure([batch, heads, time, width], Some(0), None, runs);
    }
    measure([8, 8, 128, 32], None, None, runs);
    measure([1, 1, 4096, 64], None, None, runs);
    let dropout = Dropout { stream: Stream::new(1), rows: SampleRows::ALL, rate: 0.1, first: 0, all: 8 };
    measure([8, 8, 128, 32], Some(0), Some(dropout), runs);
}

/// Measures one shape and prints a line of the table. `past` is `Some` for a causal mask.
fn measure(
    [batch, heads, time, width]: [usize; 4],
    past: Option<usize>,
    dropout: Option<Dropout>,
    runs: usize,
) {
    let attention = Attention { batch, heads, time, seen: time, width, past, hidden: None, dropout };
    let all = Stream::new(1).normal(3 * batch * heads * time * width, 1.0);
    let gradient = Stream::new(2).normal(batch * heads * time * width, 1.0);
    let operands = Operands::Fused(&all);
    let (mut forward, mut backward) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..runs {
        let begun = Instant::now();
        let (output, sums) = attention.forward(&operands);
        forward = forward.min(begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        std::hint::black_box(attention.backward(&operands, [&output, &sums, &gradient]));
        backward = backward.min(begun.elapsed().as_secs_f64());
    }
    let rate = |seconds: f64, factor: f64| factor * attention.flops() / seconds * 1e-9;
    println!(
        "{batch:5} {heads:5} {time:5} {width:5} {:9} {:8.3} ms {:4.0} GFLOP/s {:8.3} ms {:4.0} GFLOP/s{}",
        if past.is_some() { "causal" } else { "" },
        forward * 1e3,
        rate(forward, 1.0),
        backward * 1e3,
        rate(backward, 2.5),
        if dropout.is_some() { "  dropout" } else { "" },
    );
}
