//! How soon a thread gets a processor when it wakes.
//!
//! Linux from 6.12 on takes a slice of its own from each thread, and lets one with a short slice interrupt one with a long
//! slice (EEVDF, Stoica & Abdel-Wahab 1995). Elsewhere nothing changes.

/// The shortest slice that a thread may ask for.
const SHORTEST_NS: u64 = 100_000;

/// Asks the scheduler to run the calling thread soon after it wakes, though only for a short while: what a communication
/// thread needs beside threads that compute all the time, and would otherwise get after milliseconds.
pub(crate) fn be_prompt() {
    change_slice(SHORTEST_NS);
}

/// The calling thread is prompt until this is dropped: for a thread that computes, while it waits for peers.
pub(crate) struct Prompt {
    before_ns: Option<u64>,
}

impl Prompt {
    pub(crate) fn new() -> Self {
        Self { before_ns: change_slice(SHORTEST_NS).filter(|&before| before != SHORTEST_NS) }
    }
}

impl Drop for Prompt {
    fn drop(&mut self) {
        self.before_ns.map(change_slice);
    }
}

/// Changes the calling thread's slice; returns what it was, where that is known and it could be changed.
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
fn change_slice(slice_ns: u64) -> Option<u64> {
    use std::ffi::c_long;
    /// `struct sched_attr` of the kernel.
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime_ns: u64,
        deadline_ns: u64,
        period_ns: u64,
    }
    const SIZE: u32 = size_of::<Attributes>() as u32;
    #[cfg(target_arch = "x86_64")]
    const SET_AND_GET: (c_long, c_long) = (314, 315);
    #[cfg(target_arch = "aarch64")]
    const SET_AND_GET: (c_long, c_long) = (274, 275);
    unsafe extern "C" {
        fn syscall(number: c_long, ...) -> c_long;
    }
    let mut attributes = Attributes { size: SIZE, ..Attributes::default() };
    // SAFETY: the kernel writes at most SIZE bytes there, and reads as many.
    unsafe {
        let this: *mut Attributes = &mut attributes;
        // The policy and nice value stay as they are; a refusal changes nothing.
        if syscall(SET_AND_GET.1, 0, this, SIZE, 0) != 0 || (*this).policy != 0 {
            return None;
        }
        let before = (*this).runtime_ns;
        (*this).size = SIZE;
        (*this).runtime_ns = slice_ns;
        (syscall(SET_AND_GET.0, 0, this, 0) == 0).then_some(before)
    }
}

#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
fn change_slice(_: u64) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_its_slice_back() {
        // Kernels before 6.12 say 0 throughout.
        std::thread::spawn(|| {
            let before = change_slice(0);
            drop(Prompt::new());
            assert_eq!(change_slice(0), before);
        })
        .join()
        .unwrap();
    }
}
