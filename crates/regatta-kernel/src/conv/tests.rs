use super::*;
use crate::random::Stream;
use proptest::prelude::*;
use std::cell::Cell;

/// The vector unit that the kernels of convolution run on.
#[derive(Clone, Copy)]
pub(super) enum Unit {
    Best,
    None,
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

thread_local! {
    pub(super) static UNIT: Cell<Unit> = const { Cell::new(Unit::Best) };
}

/// The result, the gradient of the images and the gradient of the weights, from the definition in f64.
fn reference(shape: &Shape, x: &[f32], weight: &[f32], gradient: &[f32]) -> [Vec<f64>; 3] {
    let [mut out, mut by_x, mut by_weight] =
        [shape.output_len(), x.len(), weight.len()].map(|len| vec![0.0f64; len]);
    for image in 0..shape.images {
        for row in 0..shape.out_height() {
            for column in 0..shape.out_width() {
                for tap in 0..shape.kernel * shape.kernel {
                    let at = |place: usize, tap: usize, len: usize| {
                        (place * shape.stride + tap).checked_sub(shape.padding).filter(|at| *at < len)
                    };
                    let y = at(row, tap / shape.kernel, shape.height);
                    let (Some(y), Some(x_)) = (y, at(column, tap % shape.kernel, shape.width)) else {
                        continue;
                    };
                    for input in 0..shape.inputs {
                        for output in 0..shape.outputs {
                            let to = ((image * shape.out_height() + row) * shape.out_width() + column)
                                * shape.outputs
                                + output;
                            let from = ((image * shape.height + y) * shape.width + x_) * shape.inputs + input;
                            let by = (tap * shape.inputs + input) * shape.outputs + output;
                            out[to] += f64::from(x[from]) * f64::from(weight[by]);
                            by_x[from] += f64::from(gradient[to]) * f64::from(weight[by]);
                            by_weight[by] += f64::from(x[from]) * f64::from(gradient[to]);
                        }
                    }
                }
            }
        }
    }
    [out, by_x, by_weight]
}

/// The largest difference, divided by the largest expected value.
fn error(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(1e-30f64, |most, value| most.max(value.abs()));
    found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).abs()).max_by(f64::total_cmp).unwrap_or(0.0)
        / largest
}

fn all(shape: &Shape, x: &[f32], weight: &[f32], gradient: &[f32]) -> [Vec<f32>; 3] {
    // The previous content of the results must not matter.
    let [mut out, mut by_x, mut by_w] =
        [shape.output_len(), x.len(), weight.len()].map(|len| vec![f32::NAN; len]);
    forward(shape, x, weight, Epilogue::default(), &mut out);
    by_input(shape, gradient, weight, &mut by_x);
    by_weight(shape, x, gradient, false, &mut by_w);
    [out, by_x, by_w]
}

fn numbers(shape: &Shape) -> [Vec<f32>; 3] {
    let stream = Stream::new(5);
    let lens = [shape.input_len(), shape.weight_len(), shape.output_len()];
    [0, 1, 2].map(|i| stream.at(i).normal(lens[i as usize], 1.0))
}

fn check(shape: &Shape) {
    let [x, weight, gradient] = numbers(shape);
    let found = all(shape, &x, &weight, &gradient);
    for (name, (found, expected)) in
        ["result", "images", "weights"].iter().zip(found.iter().zip(reference(shape, &x, &weight, &gradient)))
    {
        let error = error(found, &expected);
        assert!(error < 1e-5, "{name} of {shape:?}: {error:.1e}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn agrees_with_the_definition(
        images in 1usize..16, height in 1usize..10, width in 1usize..10, inputs in 1usize..21, outputs in 1usize..40,
        half in 0usize..3, stride in 1usize..4, padding in 0usize..4,
    ) {
        let kernel = 2 * half + 1;
        check(&Shape { images, height, width, inputs, outputs, kernel, stride, padding });
    }
}

#[test]
fn many_channels_and_images_are_processed_in_blocks() {
    let shape =
        Shape { images: 13, height: 7, width: 5, inputs: 150, outputs: 83, kernel: 3, stride: 2, padding: 1 };
    check(&shape);
    check(&Shape { images: 3, height: 40, width: 36, inputs: 2, outputs: 70, stride: 1, ..shape });
    check(&Shape { kernel: 1, padding: 0, inputs: 1500, outputs: 5, ..shape });
}

/// Vector units that are not the best of this machine.
#[test]
fn other_units_agree_with_the_definition() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let units = [
        Unit::None,
        #[cfg(target_arch = "x86_64")]
        Unit::Avx2,
    ];
    for unit in units {
        pool.install(|| {
            UNIT.set(unit);
            for (images, outputs, stride) in [(1, 1, 1), (7, 13, 2), (13, 16, 1), (5, 40, 1), (26, 9, 2)] {
                check(&Shape {
                    images,
                    height: 6,
                    width: 5,
                    inputs: 15,
                    outputs,
                    kernel: 3,
                    stride,
                    padding: 1,
                });
            }
        });
    }
}

#[test]
fn the_result_does_not_depend_on_the_threads() {
    let shape =
        Shape { images: 11, height: 9, width: 8, inputs: 20, outputs: 70, kernel: 3, stride: 1, padding: 1 };
    let [x, weight, gradient] = numbers(&shape);
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| all(&shape, &x, &weight, &gradient))
    };
    let one = with(1);
    for threads in 2..6 {
        assert_eq!(with(threads), one, "{threads} threads");
    }
}

#[test]
fn bias_and_relu_come_last() {
    let shape =
        Shape { images: 2, height: 4, width: 3, inputs: 300, outputs: 5, kernel: 3, stride: 1, padding: 1 };
    let [x, weight, _] = numbers(&shape);
    let bias = [1.0, -2.0, 0.0, 30.0, -30.0];
    let [mut sums, mut out] = [0, 1].map(|_| vec![0.0; shape.output_len()]);
    forward(&shape, &x, &weight, Epilogue::default(), &mut sums);
    forward(&shape, &x, &weight, Epilogue { bias: Some(&bias), relu: true }, &mut out);
    for (index, (sum, out)) in sums.iter().zip(&out).enumerate() {
        assert_eq!((sum + bias[index % 5]).max(0.0), *out);
    }
}

/// The gradients of `sum(result * gradient)`, against finite differences along a direction.
#[test]
fn gradients_agree_with_finite_differences() {
    let shape =
        Shape { images: 3, height: 5, width: 6, inputs: 4, outputs: 7, kernel: 3, stride: 2, padding: 1 };
    let [x, weight, gradient] = numbers(&shape);
    let [_, by_x, by_w] = all(&shape, &x, &weight, &gradient);
    let value = |x: &[f32], weight: &[f32]| -> f64 {
        let mut out = vec![0.0; shape.output_len()];
        forward(&shape, x, weight, Epilogue::default(), &mut out);
        out.iter().zip(&gradient).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let step = 1.0 / 64.0;
    for (which, (numbers, found)) in [(&x, by_x), (&weight, by_w)].into_iter().enumerate() {
        let direction = Stream::new(9).at(which as u64).normal(numbers.len(), 1.0);
        let moved =
            |by: f32| -> Vec<f32> { numbers.iter().zip(&direction).map(|(a, d)| a + by * d).collect() };
        let at = |by: f32| if which == 0 { value(&moved(by), &weight) } else { value(&x, &moved(by)) };
        let expected = (at(step) - at(-step)) / (2.0 * f64::from(step));
        let along: f64 = found.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
        assert!((along - expected).abs() < 1e-4 * expected.abs().max(1.0), "{along} {expected}");
    }
}

#[test]
fn gradients_of_weights_are_added() {
    let shape =
        Shape { images: 4, height: 5, width: 6, inputs: 4, outputs: 7, kernel: 3, stride: 1, padding: 1 };
    let [x, _, gradient] = numbers(&shape);
    let [mut whole, mut sum] = [0, 1].map(|_| vec![0.0; shape.weight_len()]);
    by_weight(&shape, &x, &gradient, false, &mut whole);
    let half = Shape { images: 2, ..shape };
    let (x, gradient) = (x.split_at(half.input_len()), gradient.split_at(half.output_len()));
    by_weight(&half, x.0, gradient.0, false, &mut sum);
    by_weight(&half, x.1, gradient.1, true, &mut sum);
    let whole: Vec<f64> = whole.into_iter().map(f64::from).collect();
    assert!(error(&sum, &whole) < 1e-6);
}

/// Compares with the three operations one after the other, for more images than fit in a chunk.
#[test]
fn pooled_is_convolution_then_relu_then_pooling() {
    let shape =
        Shape { images: 53, height: 7, width: 6, inputs: 3, outputs: 5, kernel: 3, stride: 1, padding: 1 };
    let [x, weight, _] = numbers(&shape);
    let bias = [0.5, -1.0, 0.0, 2.0, -2.0];
    let mut sums = vec![0.0; shape.output_len()];
    forward(&shape, &x, &weight, Epilogue { bias: Some(&bias), relu: false }, &mut sums);
    let len = 53 * 3 * 3 * 5;
    let gradient = Stream::new(8).normal(len, 1.0);
    let (mut expected, mut codes) = (vec![0.0; len], vec![0; len]);
    crate::pool::relu_max_2x2(&sums, [7, 6, 5], &mut expected, &mut codes);
    let (mut found, mut found_codes) = (vec![0.0; len], vec![0; len]);
    pooled(&shape, &x, &weight, &bias, &mut found, &mut found_codes);
    assert_eq!((&found, &found_codes), (&expected, &codes));
    crate::pool::back_2x2(&gradient, &codes, [7, 6, 5], &mut sums);
    let [mut by_x, mut found_x] = [0, 1].map(|_| vec![0.0; x.len()]);
    by_input(&shape, &sums, &weight, &mut by_x);
    let [mut by_w, mut found_w] = [0, 1].map(|_| vec![0.0; weight.len()]);
    by_weight(&shape, &x, &sums, false, &mut by_w);
    let mut of_bias = [0.0; 5];
    sums.chunks_exact(5)
        .for_each(|row| of_bias.iter_mut().zip(row).for_each(|(sum, g)| *sum += f64::from(*g)));
    let mut found_bias = [0.0; 5];
    let gradients = Some(&mut found_x[..]);
    pooled_backward(&shape, &x, &weight, &gradient, &codes, gradients, &mut found_w, &mut found_bias);
    assert_eq!(found_x, by_x);
    let by_w: Vec<f64> = by_w.into_iter().map(f64::from).collect();
    assert!(error(&found_w, &by_w) < 1e-5 && error(&found_bias, &of_bias) < 1e-5);
}
