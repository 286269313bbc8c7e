//! Ring algorithms (Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
//! workstations").
//!
//! The data is cut into n segments. In n-1 steps each rank sends one segment to its right neighbour while it
//! receives another from its left and adds its own numbers; then in n-1 more steps the finished segments go
//! around. Cost per rank for B bytes: all-reduce 2(n-1) steps and 2(n-1)/n * B bytes sent; reduce-scatter and
//! all-gather, its halves, half of that; broadcast (a chain) B bytes.
//!
//! What a rank sends in one step is what it received in the step before, so the steps are run as one stream:
//! any byte may be sent on as soon as it has been received and reduced. No step waits for a whole segment.

use super::Context;
use super::stream::Streams;
use crate::call::{Call, ENCODED};
use crate::element::{Element, ReduceOp};
use crate::error::Result;
use crate::health::Wait;
use crate::kernel;
use crate::transport::Transport;
use std::ops::Range;

/// Bytes received at a time while reducing: stays in the second-level cache.
const CHUNK: usize = 128 << 10;

/// The `index`-th of `parts` nearly equal parts of `len` elements.
pub(crate) fn part(len: usize, parts: usize, index: usize) -> Range<usize> {
    let (each, more) = (len / parts, len % parts);
    let start = index * each + index.min(more);
    start..start + each + usize::from(index < more)
}

/// One pass around the ring.
struct Pass<'a, T> {
    data: &'a mut [T],
    op: ReduceOp,
    /// Segments of `data`.
    segment: &'a dyn Fn(usize) -> Range<usize>,
    /// Steps that reduce; the others overwrite.
    reducing: usize,
    /// All steps.
    steps: usize,
    /// The segment sent in step 0; each later step sends the one before.
    first: usize,
}

fn run<T: Element>(
    transport: &mut dyn Transport,
    context: &Context,
    call: Call,
    pass: Pass<'_, T>,
) -> Result<()> {
    let (rank, size) = (context.rank, context.size);
    let (right, left) = ((rank + 1) % size, (rank + size - 1) % size);
    let Pass { data, op, segment, reducing, steps, first } = pass;
    let width = size_of::<T>();
    let sent_in = |step: usize| segment((first + steps * size - step) % size);
    let received_in = |step: usize| segment((first + (steps + 1) * size - step - 1) % size);
    let mut streams = Streams { transport, context, call };
    let mut wait = Wait::new(&context.health, context.deadline);
    let header = call.to_bytes();
    let mut theirs = [0; ENCODED];
    let (mut header_out, mut header_in) = (0, 0);
    // Place in the stream: step, and bytes of its segment that are through.
    let (mut out_step, mut out_at, mut in_step, mut in_at) = (0, 0, 0, 0);
    let mut scratch: Vec<T> = vec![T::zeroed(); if reducing > 0 { CHUNK / width } else { 0 }];
    let mut filled = 0;
    loop {
        while out_step < steps && out_at == sent_in(out_step).len() * width {
            (out_step, out_at) = (out_step + 1, 0);
        }
        while in_step < steps && in_at == received_in(in_step).len() * width {
            (in_step, in_at) = (in_step + 1, 0);
        }
        let (sending, receiving) =
            (out_step < steps || header_out < ENCODED, in_step < steps || header_in < ENCODED);
        if !sending && !receiving {
            return Ok(());
        }
        let mut moved = 0;
        let mut may_send = true;
        if header_out < ENCODED {
            moved += streams.transport.try_send(right, &header[header_out..])?;
            header_out += moved;
        } else if out_step < steps {
            let bytes: &[u8] = bytemuck::cast_slice(&data[sent_in(out_step)]);
            // The first segment is there; later ones as far as they have been received.
            let ready = match () {
                () if out_step == 0 || out_step <= in_step => bytes.len(),
                () if out_step == in_step + 1 => in_at,
                () => 0,
            };
            may_send = ready > out_at;
            if may_send {
                moved += streams.transport.try_send(right, &bytes[out_at..ready])?;
                out_at += moved;
            }
        }
        if header_in < ENCODED {
            let got = streams.transport.try_recv(left, &mut theirs[header_in..])?;
            header_in += got;
            moved += got;
            if header_in == ENCODED {
                streams.check(left, theirs)?;
            }
        } else if in_step < steps {
            let target = &mut data[received_in(in_step)];
            if in_step < reducing {
                let left_over = size_of_val(target) - in_at - filled;
                let room = bytemuck::cast_slice_mut::<T, u8>(&mut scratch);
                let end = room.len().min(filled + left_over);
                let got = streams.transport.try_recv(left, &mut room[filled..end])?;
                filled += got;
                moved += got;
                let whole = filled / width;
                let from = in_at / width;
                let target = &mut target[from..from + whole];
                kernel::combine(target, &scratch[..whole], op);
                if op == ReduceOp::Mean && in_step + 1 == reducing {
                    kernel::divide(target, size);
                }
                in_at += whole * width;
                // Part of an element waits at the front for its rest.
                bytemuck::cast_slice_mut::<T, u8>(&mut scratch).copy_within(whole * width..filled, 0);
                filled -= whole * width;
            } else {
                let got = streams.transport.try_recv(left, &mut bytemuck::cast_slice_mut(target)[in_at..])?;
                in_at += got;
                moved += got;
            }
        }
        if moved > 0 {
            wait.progress();
        } else {
            let to = (sending && may_send).then_some(right);
            streams.sleep(to, receiving.then_some(left), &mut wait)?;
        }
    }
}

/// Leaves the reduction of all ranks' `data` in everyone's.
pub(crate) fn all_reduce<T: Element>(
    transport: &mut dyn Transport,
    context: &Context,
    call: Call,
    data: &mut [T],
) -> Result<()> {
    let (size, len) = (context.size, data.len());
    let segment = |index| part(len, size, index);
    let pass = Pass {
        data,
        op: call.op,
        segment: &segment,
        reducing: size - 1,
        steps: 2 * (size - 1),
        first: context.rank,
    };
    run(transport, context, call, pass)
}

/// Leaves the reduction of everyone's `rank`-th part of `input` in `output`. `scratch` is for the partial sums; it is
/// kept between calls because fresh memory costs more than the copy.
pub(crate) fn reduce_scatter<T: Element>(
    transport: &mut dyn Transport,
    context: &Context,
    call: Call,
    input: &[T],
    output: &mut [T],
    scratch: &mut Vec<u64>,
) -> Result<()> {
    let (size, rank, len) = (context.size, context.rank, output.len());
    let words = size_of_val(input).div_ceil(size_of::<u64>());
    if scratch.len() < words {
        scratch.resize(words, 0);
    }
    let sums = &mut bytemuck::cast_slice_mut::<u64, T>(scratch)[..input.len()];
    sums.copy_from_slice(input);
    let segment = |index: usize| index * len..(index + 1) * len;
    let first = (rank + size - 1) % size;
    let pass =
        Pass { data: sums, op: call.op, segment: &segment, reducing: size - 1, steps: size - 1, first };
    run(transport, context, call, pass)?;
    output.copy_from_slice(&sums[segment(rank)]);
    Ok(())
}

/// Gathers everyone's `input` into everyone's `output`, in the order of ranks.
pub(crate) fn all_gather<T: Element>(
    transport: &mut dyn Transport,
    context: &Context,
    call: Call,
    input: &[T],
    output: &mut [T],
) -> Result<()> {
    let (size, rank, len) = (context.size, context.rank, input.len());
    let segment = |index: usize| index * len..(index + 1) * len;
    output[segment(rank)].copy_from_slice(input);
    let pass = Pass {
        data: output,
        op: ReduceOp::Sum,
        segment: &segment,
        reducing: 0,
        steps: size - 1,
        first: rank,
    };
    run(transport, context, call, pass)
}

/// Copies `data` of the call's root to everyone, along a chain that begins there.
pub(crate) fn broadcast<T: Element>(
    transport: &mut dyn Transport,
    context: &Context,
    call: Call,
    data: &mut [T],
) -> Result<()> {
    let (rank, size) = (context.rank, context.size);
    let (right, left) = ((rank + 1) % size, (rank + size - 1) % size);
    let root = call.root as usize;
    let (is_first, is_last) = (rank == root, right == root);
    let header = call.to_bytes();
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(data);
    let total = ENCODED + bytes.len();
    let mut theirs = [0; ENCODED];
    let mut received = if is_first { total } else { 0 };
    let mut sent = if is_last { total } else { 0 };
    let mut streams = Streams { transport, context, call };
    let mut wait = Wait::new(&context.health, context.deadline);
    while received < total || sent < total {
        let mut moved = 0;
        if received < total {
            let target = match received.checked_sub(ENCODED) {
                None => &mut theirs[received..],
                Some(at) => &mut bytes[at..],
            };
            let got = streams.transport.try_recv(left, target)?;
            received += got;
            moved += got;
            if got > 0 && received == ENCODED {
                streams.check(left, theirs)?;
            }
        }
        // The header may go on at once: it is our own call.
        let ready = received.max(ENCODED);
        if sent < ready {
            let source = match sent.checked_sub(ENCODED) {
                None => &header[sent..],
                Some(at) => &bytes[at..ready - ENCODED],
            };
            let count = streams.transport.try_send(right, source)?;
            sent += count;
            moved += count;
        }
        if moved > 0 {
            wait.progress();
        } else {
            let (to, from) = ((sent < ready).then_some(right), (received < total).then_some(left));
            streams.sleep(to, from, &mut wait)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::part;

    #[test]
    fn parts_cover_everything_once() {
        for len in 0..40 {
            for parts in 1..9 {
                let all: Vec<usize> = (0..parts).flat_map(|index| part(len, parts, index)).collect();
                assert_eq!(all, (0..len).collect::<Vec<_>>());
            }
        }
    }
}
