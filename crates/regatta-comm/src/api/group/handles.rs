//! The operations with a handle: they go on while the caller computes, on the group's communication thread, in the
//! order of submission. Buffers come back from [`Pending::wait`].

use super::{Group, QUEUE_PATIENCE};
use crate::api::buffer::Buffer;
use crate::error::Result;
use crate::execution::engine::Core;
use crate::execution::operations::Counts;
use crate::execution::queue::Pending;
use crate::numbers::element::{Element, Reduction};

impl Group {
    fn submit<B: Send + 'static>(
        &self,
        operation: impl FnOnce(&Core) -> Result<B> + Send + 'static,
    ) -> Pending<B> {
        let core = self.inner.core.clone();
        let job = core.job.clone();
        self.inner.queue.submit(move || operation(&core), move |reason| job.give_up(reason))
    }

    /// [`all_reduce`](Self::all_reduce) that goes on while the caller computes.
    pub fn all_reduce_async<T: Element>(
        &self,
        mut data: Buffer<T>,
        reduction: impl Into<Reduction>,
    ) -> Pending<Buffer<T>> {
        let reduction = reduction.into();
        self.submit(move |core| core.all_reduce(&mut data, reduction, QUEUE_PATIENCE).map(|()| data))
    }

    /// [`all_reduce_grouped`](Self::all_reduce_grouped) that goes on while the caller computes.
    pub fn all_reduce_grouped_async<T: Element>(
        &self,
        mut tensors: Vec<Buffer<T>>,
        reduction: impl Into<Reduction>,
    ) -> Pending<Vec<Buffer<T>>> {
        let reduction = reduction.into();
        self.submit(move |core| {
            let mut slices: Vec<&mut [T]> = tensors.iter_mut().map(|tensor| &mut **tensor).collect();
            core.all_reduce_grouped(&mut slices, reduction, QUEUE_PATIENCE)?;
            Ok(tensors)
        })
    }

    /// [`reduce`](Self::reduce) that goes on while the caller computes.
    pub fn reduce_async<T: Element>(
        &self,
        mut data: Buffer<T>,
        reduction: impl Into<Reduction>,
        root: usize,
    ) -> Pending<Buffer<T>> {
        let reduction = reduction.into();
        self.submit(move |core| core.reduce(&mut data, reduction, root, QUEUE_PATIENCE).map(|()| data))
    }

    /// [`reduce_scatter`](Self::reduce_scatter) that goes on while the caller computes.
    pub fn reduce_scatter_async<T: Element>(
        &self,
        input: Buffer<T>,
        mut output: Buffer<T>,
        reduction: impl Into<Reduction>,
    ) -> Pending<(Buffer<T>, Buffer<T>)> {
        let reduction = reduction.into();
        self.submit(move |core| {
            core.reduce_scatter((&input, &mut output), Counts::Even, reduction, QUEUE_PATIENCE)?;
            Ok((input, output))
        })
    }

    /// [`all_gather`](Self::all_gather) that goes on while the caller computes.
    pub fn all_gather_async<T: Element>(
        &self,
        input: Buffer<T>,
        mut output: Buffer<T>,
    ) -> Pending<(Buffer<T>, Buffer<T>)> {
        self.submit(move |core| {
            core.all_gather((&input, &mut output), Counts::Even, QUEUE_PATIENCE)?;
            Ok((input, output))
        })
    }

    /// [`all_to_all`](Self::all_to_all) that goes on while the caller computes.
    pub fn all_to_all_async<T: Element>(
        &self,
        input: Buffer<T>,
        mut output: Buffer<T>,
    ) -> Pending<(Buffer<T>, Buffer<T>)> {
        self.submit(move |core| {
            core.all_to_all((&input, &mut output), QUEUE_PATIENCE)?;
            Ok((input, output))
        })
    }

    /// [`broadcast`](Self::broadcast) that goes on while the caller computes.
    pub fn broadcast_async<T: Element>(&self, mut data: Buffer<T>, root: usize) -> Pending<Buffer<T>> {
        self.submit(move |core| core.broadcast(&mut data, root, vec![], QUEUE_PATIENCE).map(|()| data))
    }

    /// [`barrier`](Self::barrier) that goes on while the caller computes.
    pub fn barrier_async(&self) -> Pending<()> {
        self.submit(|core| core.barrier(QUEUE_PATIENCE))
    }

    /// [`send`](Self::send) that goes on while the caller computes.
    pub fn send_async<T: Element>(&self, data: Buffer<T>, to: usize) -> Pending<Buffer<T>> {
        self.submit(move |core| core.send(&data, to, QUEUE_PATIENCE).map(|()| data))
    }

    /// [`recv`](Self::recv) that goes on while the caller computes.
    pub fn recv_async<T: Element>(&self, mut data: Buffer<T>, from: usize) -> Pending<Buffer<T>> {
        self.submit(move |core| core.recv(&mut data, from, QUEUE_PATIENCE).map(|()| data))
    }
}
