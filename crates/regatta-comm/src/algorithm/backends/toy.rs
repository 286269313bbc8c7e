//! What a backend for a device takes: this file, and one line in the list of algorithms. Its device is number 7, whose
//! memory is really the host's, and all that it can do is an all-reduce, over the ranks' streams.

use crate::algorithm::backend::{Backend, Offer, Task, Turn, Wanted};
use crate::algorithm::{Algorithm, streams};
use crate::error::{Error, Result};
use crate::member::call::Kind;
use crate::numbers::element::{Element, Typed};
use crate::numbers::memory::{OnDevice, Output, Space};

pub(crate) struct Toy;

impl Backend for Toy {
    fn offers(&self, _: Algorithm, wanted: &Wanted) -> Offer {
        match (wanted.kind, wanted.space) {
            (Kind::AllReduce, Space::Device(7)) => Offer::Best,
            _ => Offer::No,
        }
    }

    fn run(&self, turn: &mut Turn<'_>, task: &mut Task<'_>) -> Result<()> {
        match task.output {
            Some(Output::Device(memory)) => task.call.dtype.with(Run(turn, memory)),
            _ => Err(Error::Internal("not the toy's memory".into())),
        }
    }
}

struct Run<'a, 'b>(&'a mut Turn<'b>, OnDevice);

impl Typed for Run<'_, '_> {
    type Output = Result<()>;

    fn call<T: Element>(self) -> Result<()> {
        let Self(turn, OnDevice { start, bytes, .. }) = self;
        // SAFETY: the memory of device 7 is the host's, aligned for its numbers, and the buffer's alone.
        let data = unsafe { std::slice::from_raw_parts_mut(start.cast::<T>(), bytes / size_of::<T>()) };
        streams::all_reduce(&mut turn.session, Algorithm::Ring, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Group, Operation, RawBuffer, ReduceOp};

    fn on_device(mut numbers: Vec<f32>, device: u32) -> RawBuffer {
        let (start, len) = (numbers.as_mut_ptr().cast(), numbers.len());
        // SAFETY: the vector goes with the buffer and is not used otherwise.
        let made = unsafe {
            RawBuffer::from_parts(Box::new(numbers), start, len, DType::F32, Space::Device(device))
        };
        made.unwrap()
    }

    #[test]
    fn memory_goes_to_the_backend_that_serves_it() {
        let rank = |group: Group| {
            let sum = Operation::all_reduce(ReduceOp::Sum);
            let mut data = on_device(vec![group.rank() as f32, 1.0], 7);
            group.run(&sum, None, Some(&mut data)).unwrap();
            let (_, data) = group.run_async(sum.clone(), None, Some(data)).wait().unwrap();
            let data = data.unwrap();
            assert!(data.as_slice::<f32>().is_none());
            assert_eq!(*data.into_owner().downcast::<Vec<f32>>().unwrap(), [9.0, 9.0]);

            // What nothing serves is refused before anything is sent.
            let refused = |operation: &Operation, device| {
                let mut data = on_device(vec![1.0; 3], device);
                let error = group.run(operation, None, Some(&mut data)).unwrap_err();
                assert!(matches!(error, Error::Usage(_)));
                error.to_string()
            };
            assert!(refused(&sum, 8).contains("nothing here reaches the memory of device 8 over thread"));
            assert!(refused(&Operation::broadcast(0), 7).contains("memory of device 7"));
            let scaled = Operation::all_reduce(ReduceOp::Sum.scaled_after(0.5));
            assert!(refused(&scaled, 7).contains("factors"));
            let (input, mut output) = (RawBuffer::from(vec![1.0f32]), on_device(vec![0.0; 3], 7));
            let error = group.run(&Operation::all_gather(), Some(&input), Some(&mut output)).unwrap_err();
            assert!(error.to_string().contains("not in one memory"), "{error}");

            let mut on_host = RawBuffer::from(vec![1.0f32]);
            group.run(&sum, None, Some(&mut on_host)).unwrap();
            assert_eq!(on_host.as_slice(), Some(&[3.0f32][..]));
        };
        std::thread::scope(|scope| {
            for group in Group::threads(3) {
                scope.spawn(move || rank(group));
            }
        });
    }
}
