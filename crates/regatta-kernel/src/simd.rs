//! Loops compiled for the vector units that the machine has, chosen at run time.

/// Defines a function whose body is compiled for every vector unit that `pulp` knows (AVX2 and AVX-512 with fused
/// multiply-add, NEON, and the baseline), and calls the one for the best that the processor has.
///
/// Write the body as plain loops over slices, and sums that are to be fast as several side by side: the compiler keeps the
/// order of floating-point operations.
macro_rules! vectorized {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$gen:ident: $bound:ident>)? ($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$gen: $bound>)? ($($arg: $type),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body $(<$gen: $bound>)? ($($arg: $type),*) $(-> $ret)? $body
            // Detecting costs a load where the build already knows, and one look at a flag elsewhere.
            pulp::Arch::new().dispatch(move || body $(::<$gen>)? ($($arg),*))
        }
    };
}

pub(crate) use vectorized;
