//! Loops that are compiled for several vector units; the one for this machine is chosen at run time.

/// Defines a function whose body is compiled for AVX-512, for AVX2 (both with fused multiply-add) and for the baseline
/// (NEON on aarch64). A call runs the version for the best unit that `pulp` finds in the processor.
///
/// Write the body as plain loops over slices. Split a sum into several independent sums to make it fast, because the
/// compiler keeps the order of floating-point operations.
macro_rules! vectorized {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident $(<$gen:ident: $bound:ident>)? ($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)?
        $body:block
    ) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$gen: $bound>)? ($($arg: $type),*) $(-> $ret)? {
            // This is not a closure that `pulp` calls, because nothing makes the compiler inline a closure there, and
            // a body that is not inlined is compiled for the baseline.
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body $(<$gen: $bound>)? ($($arg: $type),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512cd,avx512vl,avx512dq,avx512bw,avx2,fma,bmi1,bmi2")]
                #[allow(clippy::too_many_arguments)]
                fn avx512 $(<$gen: $bound>)? ($($arg: $type),*) $(-> $ret)? { body $(::<$gen>)? ($($arg),*) }
                #[target_feature(enable = "avx2,fma,bmi1,bmi2")]
                #[allow(clippy::too_many_arguments)]
                fn avx2 $(<$gen: $bound>)? ($($arg: $type),*) $(-> $ret)? { body $(::<$gen>)? ($($arg),*) }
                match pulp::Arch::new() {
                    // SAFETY: `pulp` has checked that the processor has these features.
                    pulp::Arch::V4(_) => return unsafe { avx512 $(::<$gen>)? ($($arg),*) },
                    // SAFETY: as above.
                    pulp::Arch::V3(_) => return unsafe { avx2 $(::<$gen>)? ($($arg),*) },
                    _ => {}
                }
            }
            body $(::<$gen>)? ($($arg),*)
        }
    };
}

pub(crate) use vectorized;
