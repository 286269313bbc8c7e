//! Memory of a length that somebody else says: a caller, or a peer.

use crate::error::{Error, Result};
use crate::numbers::element::Element;

/// Most bytes that one vector may have here: what the machine has, as far as that is known.
fn most() -> usize {
    #[cfg(target_os = "linux")]
    {
        let info = rustix::system::sysinfo();
        let total = (info.totalram as u64).saturating_mul(info.mem_unit.into());
        usize::try_from(total).unwrap_or(usize::MAX).min(isize::MAX as usize)
    }
    #[cfg(not(target_os = "linux"))]
    {
        isize::MAX as usize
    }
}

/// `len` times `value`; `what` it is for, in an error.
///
/// # Errors
/// A length that this machine cannot hold.
pub(crate) fn filled<T: Element>(len: usize, value: T, what: &str) -> Result<Vec<T>> {
    let fail = |reason: String| Error::System {
        action: format!("allocate {len} numbers of {} bytes for {what}", size_of::<T>()),
        reason,
    };
    let bytes = len.checked_mul(size_of::<T>()).filter(|&bytes| bytes <= most());
    if bytes.is_none() {
        return Err(fail("this machine has not so much memory".into()));
    }
    let mut vec = vec![];
    vec.try_reserve_exact(len).map_err(|error| fail(error.to_string()))?;
    vec.resize(len, value);
    Ok(vec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_machine_holds_is_an_error() {
        assert_eq!(filled(3, 7i32, "a test").unwrap(), [7; 3]);
        for len in [usize::MAX, usize::MAX / 8, isize::MAX as usize / 8, 1 << 50] {
            let error = filled(len, 0i64, "a test").unwrap_err().to_string();
            assert!(error.contains("for a test") && error.contains(&len.to_string()), "{error}");
        }
    }
}
