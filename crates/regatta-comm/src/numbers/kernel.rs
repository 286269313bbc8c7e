//! The inner loops: combining vectors element by element, compiled for the vector units that the machine has.

use crate::numbers::element::{Element, ReduceOp};

/// Numbers that are accumulated at a time: they stay in the first-level cache.
const BLOCK: usize = 256;

macro_rules! dispatch {
    ($name:ident, $body:ident, ($($arg:ident: $type:ty),*)) => {
        fn $name<T: Element>($($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c")]
                fn wide<T: Element>($($arg: $type),*) { $body::<T>($($arg),*) }
                #[target_feature(enable = "avx2,f16c")]
                fn half<T: Element>($($arg: $type),*) { $body::<T>($($arg),*) }
                if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("f16c")
                {
                    // SAFETY: the processor has these features.
                    return unsafe { wide::<T>($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
                    // SAFETY: the processor has these features.
                    return unsafe { half::<T>($($arg),*) };
                }
            }
            $body::<T>($($arg),*)
        }
    };
}

#[inline(always)]
fn fold<T: Element>(into: &mut [T], from: &[T], f: impl Fn(T::Wide, T::Wide) -> T::Wide) {
    for (a, b) in into.iter_mut().zip(from) {
        *a = T::narrow(f(a.widen(), b.widen()));
    }
}

#[inline(always)]
fn combine_body<T: Element>(into: &mut [T], from: &[T], op: ReduceOp, from_first: bool) {
    match op {
        // Adasum has an algorithm of its own.
        ReduceOp::Sum | ReduceOp::Mean | ReduceOp::Adasum => fold(into, from, T::sum),
        ReduceOp::Product => fold(into, from, T::product),
        // Of equal zeros the first is taken, and of NaNs the last.
        ReduceOp::Min if from_first => fold(into, from, |a, b| T::min(b, a)),
        ReduceOp::Max if from_first => fold(into, from, |a, b| T::max(b, a)),
        ReduceOp::Min => fold(into, from, T::min),
        ReduceOp::Max => fold(into, from, T::max),
        ReduceOp::And => fold(into, from, T::and),
        ReduceOp::Or => fold(into, from, T::or),
    }
}

#[inline(always)]
fn divide_body<T: Element>(data: &mut [T], ranks: usize) {
    for x in data {
        *x = T::narrow(T::divide(x.widen(), ranks));
    }
}

/// Combines all `parts` (equally long, in this order) into `into`, rounding once at the end.
#[inline(always)]
fn reduce_body<T: Element>(into: &mut [T], parts: &[&[T]], op: ReduceOp) {
    #[inline(always)]
    fn run<T: Element, W: Element>(
        into: &mut [T],
        parts: &[&[T]],
        widen: impl Fn(T) -> W,
        f: impl Fn(W, W) -> W,
        finish: impl Fn(W) -> T,
    ) {
        match *parts {
            [] => {}
            [a] => into.copy_from_slice(a),
            [a, b] => {
                for ((x, a), b) in into.iter_mut().zip(a).zip(b) {
                    *x = finish(f(widen(*a), widen(*b)));
                }
            }
            [first, ref rest @ ..] => {
                // Block by block, part by part: loops over single parts are what compilers vectorise.
                let mut sums = [W::zeroed(); BLOCK];
                for (block, into) in into.chunks_mut(BLOCK).enumerate() {
                    let range = block * BLOCK..block * BLOCK + into.len();
                    let sums = &mut sums[..into.len()];
                    for (sum, a) in sums.iter_mut().zip(&first[range.clone()]) {
                        *sum = widen(*a);
                    }
                    for part in rest {
                        for (sum, a) in sums.iter_mut().zip(&part[range.clone()]) {
                            *sum = f(*sum, widen(*a));
                        }
                    }
                    for (x, sum) in into.iter_mut().zip(sums) {
                        *x = finish(*sum);
                    }
                }
            }
        }
    }
    match op {
        ReduceOp::Sum | ReduceOp::Adasum => run(into, parts, T::widen, T::sum, T::narrow),
        ReduceOp::Mean => {
            let divide = |sum| T::from_exact(T::Exact::divide(sum, parts.len()));
            run(into, parts, T::to_exact, T::Exact::sum, divide);
        }
        ReduceOp::Product => run(into, parts, T::widen, T::product, T::narrow),
        ReduceOp::Min => run(into, parts, T::widen, T::min, T::narrow),
        ReduceOp::Max => run(into, parts, T::widen, T::max, T::narrow),
        ReduceOp::And => run(into, parts, T::widen, T::and, T::narrow),
        ReduceOp::Or => run(into, parts, T::widen, T::or, T::narrow),
    }
}

#[inline(always)]
fn scale_body<T: Element>(data: &mut [T], factor: f64) {
    for x in data {
        *x = x.scale(factor);
    }
}

#[inline(always)]
fn widen_body<T: Element>(into: &mut [T::Wide], from: &[T]) {
    for (wide, x) in into.iter_mut().zip(from) {
        *wide = x.widen();
    }
}

#[inline(always)]
fn narrow_body<T: Element>(into: &mut [T], from: &[T::Wide]) {
    for (x, wide) in into.iter_mut().zip(from) {
        *x = T::narrow(*wide);
    }
}

#[inline(always)]
fn to_exact_body<T: Element>(into: &mut [T::Exact], from: &[T]) {
    for (exact, x) in into.iter_mut().zip(from) {
        *exact = x.to_exact();
    }
}

#[inline(always)]
fn from_exact_body<T: Element>(into: &mut [T], from: &[T::Exact]) {
    for (x, exact) in into.iter_mut().zip(from) {
        *x = T::from_exact(*exact);
    }
}

dispatch!(to_exact_all, to_exact_body, (into: &mut [T::Exact], from: &[T]));
dispatch!(from_exact_all, from_exact_body, (into: &mut [T], from: &[T::Exact]));
dispatch!(combine_all, combine_body, (into: &mut [T], from: &[T], op: ReduceOp, from_first: bool));
dispatch!(scale_all, scale_body, (data: &mut [T], factor: f64));
dispatch!(widen_all, widen_body, (into: &mut [T::Wide], from: &[T]));
dispatch!(narrow_all, narrow_body, (into: &mut [T], from: &[T::Wide]));
dispatch!(divide_all, divide_body, (data: &mut [T], ranks: usize));
dispatch!(reduce_all, reduce_body, (into: &mut [T], parts: &[&[T]], op: ReduceOp));

/// `into = into op from`, or `from op into`, element by element. A mean is summed here and divided by [`divide`].
pub(crate) fn combine<T: Element>(into: &mut [T], from: &[T], op: ReduceOp, from_first: bool) {
    combine_all(into, from, op, from_first);
}

/// Divides a sum over `ranks` ranks, for the mean.
pub(crate) fn divide<T: Element>(data: &mut [T], ranks: usize) {
    divide_all(data, ranks);
}

/// `into = parts[0] op parts[1] op ...`, in this order; 16-bit floats are accumulated in f32 and rounded once.
pub(crate) fn reduce<T: Element>(into: &mut [T], parts: &[&[T]], op: ReduceOp) {
    debug_assert!(parts.iter().all(|part| part.len() == into.len()));
    reduce_all(into, parts, op);
}

/// Multiplies by `factor`, rounding once.
pub(crate) fn scale<T: Element>(data: &mut [T], factor: f64) {
    scale_all(data, factor);
}

/// The numbers in the type that they are accumulated in.
pub(crate) fn widen<T: Element>(into: &mut [T::Wide], from: &[T]) {
    widen_all(into, from);
}

/// Rounds accumulated numbers to their type.
pub(crate) fn narrow<T: Element>(into: &mut [T], from: &[T::Wide]) {
    narrow_all(into, from);
}

/// The numbers in the type that means are summed in.
pub(crate) fn to_exact<T: Element>(into: &mut [T::Exact], from: &[T]) {
    to_exact_all(into, from);
}

/// Means in their type.
pub(crate) fn from_exact<T: Element>(into: &mut [T], from: &[T::Exact]) {
    from_exact_all(into, from);
}
