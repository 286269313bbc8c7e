//! Measures how fast gradients are encoded and decoded, beside a copy in memory.
//!
//! `cargo run --release -p regatta-kernel --example compress [numbers]`
//!
//! Rates are of the numbers as f32: in GB/s, the median of some passes on one thread.

use regatta_kernel::compress::{blocks, half, low_rank, sign, sparse};
use regatta_kernel::random::Stream;
use std::hint::black_box;
use std::time::Instant;

fn main() {
    let len: usize =
        std::env::args().nth(1).map_or(4 << 20, |text| text.parse().expect("a number of numbers"));
    let numbers = Stream::new(1).normal(len, 1.0);
    let mut out = vec![0.0f32; len];
    let rate = |what: &str, mut pass: Box<dyn FnMut() + '_>| {
        let mut times: Vec<f64> = (0..9)
            .map(|_| {
                let begun = Instant::now();
                pass();
                begun.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        println!("{what:24} {:6.2} GB/s", (4 * len) as f64 / times[times.len() / 2] / 1e9);
    };
    println!("{len} numbers, one thread");
    rate("copy", Box::new(|| out.copy_from_slice(black_box(&numbers))));
    let mut narrow = vec![0u16; len];
    rate("bf16 encode", Box::new(|| half::to_bf16(black_box(&numbers), &mut narrow)));
    rate("bf16 decode", Box::new(|| half::from_bf16(black_box(&narrow), &mut out)));
    rate("f16 encode", Box::new(|| half::to_f16(black_box(&numbers), &mut narrow)));
    rate("f16 decode", Box::new(|| half::from_f16(black_box(&narrow), &mut out)));
    for (name, width) in [("int8", blocks::Width::Eight), ("int4", blocks::Width::Four)] {
        let mut codes = vec![0u8; width.bytes(len)];
        rate(
            &format!("{name} encode"),
            Box::new(|| blocks::encode(width, black_box(&numbers), 7, &mut codes)),
        );
        rate(
            &format!("{name} decode and add"),
            Box::new(|| blocks::decode(width, black_box(&codes), 1.0, true, &mut out)),
        );
    }
    let mut signs = vec![0u8; sign::bytes(len)];
    rate("onebit encode", Box::new(|| sign::encode(black_box(&numbers), &mut signs)));
    rate("onebit decode and add", Box::new(|| sign::decode(black_box(&signs), 1.0, true, &mut out)));
    for percent in [0.1, 1.0] {
        let k = (len as f64 * percent / 100.0) as usize;
        rate(&format!("topk {percent} % select"), Box::new(|| drop(black_box(sparse::largest(&numbers, k)))));
    }
    let places = sparse::random(len, len / 100, Stream::new(2));
    let mut encoded = vec![0u8; sparse::BYTES * places.len()];
    sparse::take(&mut numbers.clone(), &places, &mut encoded);
    rate("topk 1 % decode and add", Box::new(|| sparse::add(black_box(&encoded), 1.0, &mut out)));
    let (columns, rank) = (1024, 4);
    let rows = len / columns;
    let (matrix, mut q) = (&numbers[..rows * columns], Stream::new(3).normal(columns * rank, 1.0));
    let mut p = vec![0.0; rows * rank];
    rate(
        "powersgd rank 4 encode",
        Box::new(|| {
            low_rank::project(matrix, columns, &q, &mut p);
            low_rank::orthogonalize(&mut p, rank);
            low_rank::project_back(matrix, columns, &p, &mut q);
        }),
    );
    rate("powersgd rank 4 decode", Box::new(|| low_rank::expand(&p, &q, rank, &mut out[..rows * columns])));
}
