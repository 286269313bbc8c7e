//! The operations with a handle: they go on while the caller computes, on the group's communication thread, in the
//! order of submission. Buffers come back from [`Pending::wait`].

use super::Group;
use crate::api::buffer::Buffer;
use crate::error::Result;
use crate::execution::operation::Operation;
use crate::execution::operations::Caller;
use crate::execution::pending::Pending;
use crate::numbers::element::{DType, Element, Reduction};

impl Group {
    pub(super) fn submit<B: Send + 'static>(
        &self,
        operation: impl FnOnce(Caller<'_>) -> Result<B> + Send + 'static,
    ) -> Pending<B> {
        let core = self.inner.core.clone();
        let job = core.job.clone();
        self.inner.queue.submit(move || operation(core.queued()), move |reason| job.give_up(reason))
    }

    /// Submits an operation in place.
    fn submit_in_place<T: Element>(&self, operation: Operation, mut data: Buffer<T>) -> Pending<Buffer<T>> {
        self.submit(move |caller| caller.in_place(&operation, &mut data).map(|()| data))
    }

    /// Submits an operation from an input to an output.
    fn submit_move<T: Element>(
        &self,
        operation: Operation,
        (input, mut output): (Buffer<T>, Buffer<T>),
    ) -> Pending<(Buffer<T>, Buffer<T>)> {
        self.submit(move |caller| {
            caller.move_numbers(&operation, Some(&input), Some(&mut output))?;
            Ok((input, output))
        })
    }

    /// [`all_reduce`](Self::all_reduce) that goes on while the caller computes.
    pub fn all_reduce_async<T: Element>(
        &self,
        data: Buffer<T>,
        reduction: impl Into<Reduction>,
    ) -> Pending<Buffer<T>> {
        self.submit_in_place(Operation::all_reduce(reduction), data)
    }

    /// [`all_reduce_grouped`](Self::all_reduce_grouped) that goes on while the caller computes.
    pub fn all_reduce_grouped_async<T: Element>(
        &self,
        mut tensors: Vec<Buffer<T>>,
        reduction: impl Into<Reduction>,
    ) -> Pending<Vec<Buffer<T>>> {
        let reduction = reduction.into();
        self.submit(move |caller| {
            let mut slices: Vec<&mut [T]> = tensors.iter_mut().map(|tensor| &mut **tensor).collect();
            caller.all_reduce_grouped(&mut slices, reduction)?;
            Ok(tensors)
        })
    }

    /// [`reduce`](Self::reduce) that goes on while the caller computes.
    pub fn reduce_async<T: Element>(
        &self,
        data: Buffer<T>,
        reduction: impl Into<Reduction>,
        root: usize,
    ) -> Pending<Buffer<T>> {
        self.submit_in_place(Operation::reduce(reduction, root), data)
    }

    /// [`reduce_scatter`](Self::reduce_scatter) that goes on while the caller computes.
    pub fn reduce_scatter_async<T: Element>(
        &self,
        input: Buffer<T>,
        output: Buffer<T>,
        reduction: impl Into<Reduction>,
    ) -> Pending<(Buffer<T>, Buffer<T>)> {
        self.submit_move(Operation::reduce_scatter(reduction), (input, output))
    }

    /// [`all_gather`](Self::all_gather) that goes on while the caller computes.
    pub fn all_gather_async<T: Element>(
        &self,
        input: Buffer<T>,
        output: Buffer<T>,
    ) -> Pending<(Buffer<T>, Buffer<T>)> {
        self.submit_move(Operation::all_gather(), (input, output))
    }

    /// [`all_to_all`](Self::all_to_all) that goes on while the caller computes.
    pub fn all_to_all_async<T: Element>(
        &self,
        input: Buffer<T>,
        output: Buffer<T>,
    ) -> Pending<(Buffer<T>, Buffer<T>)> {
        self.submit_move(Operation::all_to_all(), (input, output))
    }

    /// [`broadcast`](Self::broadcast) that goes on while the caller computes.
    pub fn broadcast_async<T: Element>(&self, data: Buffer<T>, root: usize) -> Pending<Buffer<T>> {
        self.submit_in_place(Operation::broadcast(root), data)
    }

    /// [`barrier`](Self::barrier) that goes on while the caller computes.
    pub fn barrier_async(&self) -> Pending<()> {
        self.submit(|caller| caller.run(&Operation::barrier(), DType::U8, None, None))
    }

    /// [`send`](Self::send) that goes on while the caller computes.
    pub fn send_async<T: Element>(&self, data: Buffer<T>, to: usize) -> Pending<Buffer<T>> {
        self.submit(move |caller| {
            caller.move_numbers(&Operation::send(to), Some(&data), None)?;
            Ok(data)
        })
    }

    /// [`recv`](Self::recv) that goes on while the caller computes.
    pub fn recv_async<T: Element>(&self, data: Buffer<T>, from: usize) -> Pending<Buffer<T>> {
        self.submit_in_place(Operation::recv(from), data)
    }
}
