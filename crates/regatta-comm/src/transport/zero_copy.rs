//! Sends that lend their memory to the kernel instead of having it copied (Linux, `MSG_ZEROCOPY`; de Bruijn & Dumazet
//! 2017, "sendmsg copy avoidance with MSG_ZEROCOPY").
//!
//! The kernel says through the socket's error queue when it needs the memory no longer, and whether it has copied
//! after all, as it does where both ends are on one machine. Then lending costs more than it saves, and stops.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Shorter sends are copied: that costs less than keeping track.
const LONG: usize = 64 << 10;
/// In the error queue: about memory that was lent, and that it was copied after all (linux/errqueue.h).
const ORIGIN: u8 = 5;
const COPIED: u8 = 1;

/// What one socket has lent.
#[derive(Debug, Default)]
pub(crate) struct ZeroCopy {
    /// Sends that lent memory.
    lent: u32,
    /// Those of them that are over.
    back: u32,
    /// The kernel copies.
    useless: bool,
}

impl ZeroCopy {
    /// Asks the kernel for it; none where it has no such thing.
    pub(crate) fn new(socket: BorrowedFd<'_>) -> Option<Self> {
        let on: libc::c_int = 1;
        // SAFETY: the option's value is an int that lives through the call.
        let outcome = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ZEROCOPY,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        };
        (outcome == 0).then(Self::default)
    }

    /// Whether a send of so many bytes should lend them.
    pub(crate) fn is_for(&self, bytes: usize) -> bool {
        bytes >= LONG && !self.useless
    }

    /// Memory is still lent.
    pub(crate) fn is_out(&self) -> bool {
        self.lent != self.back
    }

    /// Names the last send that lent memory.
    pub(crate) fn mark(&self) -> u32 {
        self.lent
    }

    /// Whether that send, and all before it, lend nothing any longer.
    pub(crate) fn is_back(&self, mark: u32) -> bool {
        self.back.wrapping_sub(mark).cast_signed() >= 0
    }

    /// Sends as many bytes of `parts` as go without waiting. The memory must stay as it is until
    /// [`is_out`](Self::is_out) is false, or the peer is known to have received it.
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>, parts: [&[u8]; 2]) -> io::Result<usize> {
        let mut slices = parts.map(IoSlice::new);
        // SAFETY: all-zero is a valid header.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = slices.as_mut_ptr().cast();
        message.msg_iovlen = slices.len() as _;
        let mut flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL | libc::MSG_ZEROCOPY;
        loop {
            // SAFETY: an `IoSlice` is an iovec; both slices live through the call, and what the kernel keeps of them
            // are references to pages, which outlive any mapping.
            let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
            if let Ok(sent) = usize::try_from(sent) {
                if flags & libc::MSG_ZEROCOPY != 0 && sent > 0 {
                    self.lent = self.lent.wrapping_add(1);
                }
                return Ok(sent);
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // No more memory may be lent at present: this one is copied.
                Some(libc::ENOBUFS) if flags & libc::MSG_ZEROCOPY != 0 => flags &= !libc::MSG_ZEROCOPY,
                Some(libc::EAGAIN) => return Ok(0),
                _ => return Err(error),
            }
        }
    }

    /// Hears which memory is no longer lent.
    pub(crate) fn reap(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        while self.is_out() {
            // SAFETY: all-zero is a valid header.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            let mut control = [0u64; 32];
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = size_of_val(&control) as _;
            let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
            // SAFETY: the control buffer is aligned, as long as said, and lives through the call.
            if unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) } < 0 {
                let error = io::Error::last_os_error();
                return match error.raw_os_error() {
                    Some(libc::EAGAIN | libc::EINTR) => Ok(()),
                    _ => Err(error),
                };
            }
            // SAFETY: the kernel has filled the header and the buffer; the macros stay within it.
            let mut at = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
            while !at.is_null() {
                // SAFETY: not null, so it points at a whole header.
                let header = unsafe { at.read_unaligned() };
                let of_ip = (header.cmsg_level, header.cmsg_type) == (libc::SOL_IP, libc::IP_RECVERR)
                    || (header.cmsg_level, header.cmsg_type) == (libc::SOL_IPV6, libc::IPV6_RECVERR);
                if of_ip {
                    // SAFETY: messages of this kind carry this structure.
                    let told =
                        unsafe { libc::CMSG_DATA(at).cast::<libc::sock_extended_err>().read_unaligned() };
                    if told.ee_origin == ORIGIN {
                        // A range of sends, first and last.
                        let count = told.ee_data.wrapping_sub(told.ee_info).wrapping_add(1);
                        self.back = self.back.wrapping_add(count);
                        self.useless |= told.ee_code == COPIED;
                    }
                }
                // SAFETY: as for the first.
                at = unsafe { libc::CMSG_NXTHDR(&raw const message, at) };
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::time::{Duration, Instant};

    #[test]
    fn memory_is_lent_and_comes_back() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let out = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut into, _) = listener.accept().unwrap();
        let Some(mut zero) = ZeroCopy::new(out.as_fd()) else {
            return eprintln!("skipped: this kernel has no MSG_ZEROCOPY");
        };
        let head: Vec<u8> = (0..32).collect();
        let data: Vec<u8> = (0..3_000_017).map(|i| (i * 7) as u8).collect();
        let len = head.len() + data.len();
        assert!(zero.is_for(len) && !zero.is_for(100));
        let reader = std::thread::spawn(move || {
            let mut got = vec![0; len];
            into.read_exact(&mut got).unwrap();
            (into, got)
        });
        let begun = Instant::now();
        let (mut at, mut lent) = (0, false);
        while at < len || zero.is_out() {
            assert!(begun.elapsed() < Duration::from_secs(20), "{zero:?}");
            let parts = [&head[at.min(32)..], &data[at.saturating_sub(32)..]];
            if at < len {
                at += zero.send(out.as_fd(), parts).unwrap();
            }
            lent |= zero.is_out();
            zero.reap(out.as_fd()).unwrap();
            std::thread::yield_now();
        }
        let (_into, got) = reader.join().unwrap();
        assert!(got == [head, data].concat() && lent);
        // Both ends are on this machine.
        assert!(!zero.is_for(len));
    }
}
