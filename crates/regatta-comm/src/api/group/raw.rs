//! Operations on numbers whose type is known only when the program runs.

use super::Group;
use crate::api::raw::RawBuffer;
use crate::error::{Error, Result};
use crate::execution::operation::Operation;
use crate::execution::operations::Caller;
use crate::execution::pending::Pending;
use crate::numbers::element::{DType, Element, Typed};

/// The memory of an operation: its input and its output.
type Sides = (Option<RawBuffer>, Option<RawBuffer>);

impl Group {
    /// Carries `operation` out from `input` to `output`, which have the same type of numbers; whichever it does not use
    /// is left out. The same operation as the method of that name, with which other ranks may call it.
    ///
    /// # Errors
    /// Memory that is missing or not used, of another type or on a device that nothing here reaches; else as the method.
    pub fn run(
        &self,
        operation: &Operation,
        input: Option<&RawBuffer>,
        output: Option<&mut RawBuffer>,
    ) -> Result<()> {
        run(self.turn(), operation, input, output)
    }

    /// [`run`](Self::run) that goes on while the caller computes; the memory comes back.
    pub fn run_async(
        &self,
        operation: Operation,
        input: Option<RawBuffer>,
        mut output: Option<RawBuffer>,
    ) -> Pending<Sides> {
        self.submit(move |caller| {
            run(caller, &operation, input.as_ref(), output.as_mut())?;
            Ok((input, output))
        })
    }

    /// As [`buffer`](Self::buffer), of numbers of the type `dtype`.
    ///
    /// # Errors
    /// As [`buffer`](Self::buffer).
    pub fn raw_buffer(&self, dtype: DType, len: usize) -> Result<RawBuffer> {
        dtype.with(Zeros(self, len))
    }
}

struct Zeros<'a>(&'a Group, usize);

impl Typed for Zeros<'_> {
    type Output = Result<RawBuffer>;

    fn call<T: Element>(self) -> Result<RawBuffer> {
        Ok(self.0.buffer::<T>(self.1)?.into())
    }
}

fn run(
    caller: Caller<'_>,
    operation: &Operation,
    input: Option<&RawBuffer>,
    output: Option<&mut RawBuffer>,
) -> Result<()> {
    let dtypes = (input.map(RawBuffer::dtype), output.as_ref().map(|output| output.dtype()));
    if let (Some(input), Some(output)) = dtypes
        && input != output
    {
        return Err(Error::Usage(format!(
            "{}: the input's numbers are {input}, the output's are {output}",
            operation.name()
        )));
    }
    // A barrier has no numbers.
    let dtype = dtypes.1.or(dtypes.0).unwrap_or(DType::U8);
    caller.run(operation, dtype, input.map(RawBuffer::input), output.map(RawBuffer::output))
}
