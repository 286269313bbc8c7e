//! Loops compiled for the vector units that the machine has, chosen at run time.

/// Defines a function whose body is compiled for AVX-512, AVX2 (both with fused multiply-add) and the baseline (NEON on
/// aarch64), and calls the one for the best that `pulp` finds in the processor.
///
/// Write the body as plain loops over slices, and sums that are to be fast as several side by side: the compiler keeps the
/// order of floating-point operations.
macro_rules! vectorized {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$gen:ident: $bound:ident>)? ($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$gen: $bound>)? ($($arg: $type),*) $(-> $ret)? {
            // Not a closure for `pulp` to call: nothing makes the compiler inline that, and a body that is not inlined
            // is compiled for the baseline.
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body $(<$gen: $bound>)? ($($arg: $type),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512cd,avx512vl,avx512dq,avx512bw,avx2,fma,bmi1,bmi2")]
                #[allow(clippy::too_many_arguments)]
                fn wide $(<$gen: $bound>)? ($($arg: $type),*) $(-> $ret)? { body $(::<$gen>)? ($($arg),*) }
                #[target_feature(enable = "avx2,fma,bmi1,bmi2")]
                #[allow(clippy::too_many_arguments)]
                fn half $(<$gen: $bound>)? ($($arg: $type),*) $(-> $ret)? { body $(::<$gen>)? ($($arg),*) }
                match pulp::Arch::new() {
                    // SAFETY: the processor has these features, which are among those that `pulp` asks for.
                    pulp::Arch::V4(_) => return unsafe { wide $(::<$gen>)? ($($arg),*) },
                    // SAFETY: as above.
                    pulp::Arch::V3(_) => return unsafe { half $(::<$gen>)? ($($arg),*) },
                    _ => {}
                }
            }
            body $(::<$gen>)? ($($arg),*)
        }
    };
}

pub(crate) use vectorized;
