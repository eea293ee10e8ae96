//! File descriptors and credentials over Unix sockets: `SCM_RIGHTS`, `SCM_CREDENTIALS` (unix(7)).
//!
//! nix receives them too, but gives up on a message whose control part was cut off, and what did arrive of it would stay
//! open for ever. Here every fd is owned before anything else is looked at.

use std::io::{self, IoSlice};
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, FdFlag};
use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags};

/// How many fds a message can carry (`SCM_MAX_FD` in the kernel's net/scm.h).
pub const MAX_FDS: usize = 253;

/// A message that was received.
#[derive(Debug)]
pub struct Received {
    /// How many bytes are in the buffer; none is the end of a connected socket's stream.
    pub len: usize,
    /// Open files that came with it, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// Who sent it, where the receiving socket has `SO_PASSCRED`.
    pub credentials: Option<Credentials>,
    /// Bytes or fds were lost: the buffer was too small, or this process may open no more files.
    pub truncated: bool,
}

/// Whom the kernel vouches for as the sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credentials {
    /// Process; 0 is one outside of our pid namespace.
    pub pid: i32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Sends one message without blocking. `WouldBlock` when the peer's queue is full; no SIGPIPE.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None) {
            Ok(sent) if sent == bytes.len() => return Ok(()),
            Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Receives one message without blocking; none when there is none. At most [`MAX_FDS`] fds come with it.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Option<Received>> {
    let mut control = Control::default();
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: msghdr is plain data (with private padding on some targets); all zeroes is an empty one.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    let mut was_reset = false;
    let len = loop {
        header.msg_control = (&raw mut control).cast();
        header.msg_controllen = mem::size_of::<Control>() as _;
        // SAFETY: recvmsg(2). The header points to a buffer and a control area that live longer than the call, with
        // their true sizes.
        let len = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
        match Errno::result(len) {
            Ok(len) => break usize::try_from(len).unwrap_or(0),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(None),
            // The peer closed without reading all. It is told once, and before what the peer itself had sent.
            Err(Errno::ECONNRESET) if !was_reset => was_reset = true,
            Err(errno) => return Err(errno.into()),
        }
    };
    let mut received = Received {
        len,
        fds: Vec::new(),
        credentials: None,
        truncated: header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0,
    };
    // SAFETY: recvmsg(2) filled in the header; it and its control area are untouched since.
    unsafe { take_control(&header, &mut received) };
    Ok(Some(received))
}

/// Takes ownership of an fd that this process was started with, as its environment says. Standard streams and numbers
/// that are not open are refused, and so is what is close-on-exec: that was opened since, or taken here before.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number <= libc::STDERR_FILENO {
        return Err(Errno::EBADF.into());
    }
    // SAFETY: a number that is borrowed for fcntl(2), which says EBADF if it is not open.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    if FdFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFD)?).contains(FdFlag::FD_CLOEXEC) {
        return Err(Errno::EBADF.into());
    }
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: it came through execve(2), so nothing in this process opened it, and it is taken here once only.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Room for the fds and for the credentials, aligned as cmsg(3) wants it.
#[repr(C, align(8))]
struct Control([u8; Control::SIZE]);

impl Control {
    const SIZE: usize = space(MAX_FDS * mem::size_of::<RawFd>()) + space(mem::size_of::<libc::ucred>());
}

impl Default for Control {
    fn default() -> Self {
        Control([0; Control::SIZE])
    }
}

#[allow(clippy::cast_possible_truncation)]
const fn space(len: usize) -> usize {
    // SAFETY: CMSG_SPACE(3) only computes.
    unsafe { libc::CMSG_SPACE(len as u32) as usize }
}

/// # Safety
/// `header` is as recvmsg(2) left it, and its fds have no owner yet.
#[allow(clippy::cast_ptr_alignment)] // read_unaligned
unsafe fn take_control(header: &libc::msghdr, received: &mut Received) {
    // SAFETY: cmsg(3) walks the control area that the kernel filled in, within the length that it set.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !next.is_null() {
        // SAFETY: not null, so a whole cmsghdr lies there.
        let message = unsafe { ptr::read_unaligned(next) };
        // SAFETY: as above; the data lies right behind it.
        let data = unsafe { libc::CMSG_DATA(next) };
        // The type of cmsg_len differs between C libraries.
        #[allow(clippy::unnecessary_cast)]
        let len = (message.cmsg_len as usize).saturating_sub(data as usize - next as usize);
        match (message.cmsg_level, message.cmsg_type) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                for index in 0..len / mem::size_of::<RawFd>() {
                    // SAFETY: within the data, whose length was computed above.
                    let number = unsafe { ptr::read_unaligned(data.cast::<RawFd>().add(index)) };
                    // SAFETY: the kernel has just opened it for this process, and nothing else knows of it.
                    received.fds.push(unsafe { OwnedFd::from_raw_fd(number) });
                }
            }
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if len >= mem::size_of::<libc::ucred>() => {
                // SAFETY: the data is a whole ucred.
                let ucred = unsafe { ptr::read_unaligned(data.cast::<libc::ucred>()) };
                received.credentials = Some(Credentials { pid: ucred.pid, uid: ucred.uid, gid: ucred.gid });
            }
            _ => {}
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        next = unsafe { libc::CMSG_NXTHDR(header, next) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::{AsFd, IntoRawFd};
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use nix::sys::socket::{setsockopt, socketpair, sockopt, AddressFamily, SockFlag, SockType};

    use super::*;

    fn seqpacket() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn an_open_file_arrives_and_works_and_does_not_outlive_exec() {
        let (one, other) = seqpacket();
        let (mut near, far) = UnixStream::pair().unwrap();
        send(one.as_fd(), b"here", &[far.as_fd()]).unwrap();
        drop(far);
        let mut buffer = [0; 16];
        let mut received = receive(other.as_fd(), &mut buffer).unwrap().unwrap();
        assert_eq!((&buffer[..received.len], received.truncated), (&b"here"[..], false));
        let fd = received.fds.remove(0);
        let flags = FdFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFD).unwrap());
        assert!(flags.contains(FdFlag::FD_CLOEXEC));
        UnixStream::from(fd).write_all(b"x").unwrap();
        let mut text = String::new();
        near.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }

    #[test]
    fn as_many_as_the_kernel_allows_arrive_and_one_more_is_an_error() {
        let (one, other) = seqpacket();
        let fds = vec![one.as_fd(); MAX_FDS];
        send(one.as_fd(), b"x", &fds).unwrap();
        let received = receive(other.as_fd(), &mut [0; 1]).unwrap().unwrap();
        assert_eq!((received.fds.len(), received.truncated), (MAX_FDS, false));
        assert!(send(one.as_fd(), b"x", &vec![one.as_fd(); MAX_FDS + 1]).is_err());
    }

    #[test]
    fn what_is_longer_than_the_buffer_is_said_to_be_truncated_and_its_fds_are_owned() {
        let (one, other) = seqpacket();
        send(one.as_fd(), b"too long", &[one.as_fd()]).unwrap();
        let received = receive(other.as_fd(), &mut [0; 3]).unwrap().unwrap();
        assert_eq!((received.len, received.fds.len(), received.truncated), (3, 1, true));
    }

    #[test]
    fn nothing_yet_and_the_end_are_told_apart() {
        let (one, other) = seqpacket();
        assert!(receive(other.as_fd(), &mut [0; 8]).unwrap().is_none());
        drop(one);
        assert_eq!(receive(other.as_fd(), &mut [0; 8]).unwrap().unwrap().len, 0);
        let error = send(other.as_fd(), b"x", &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn what_was_said_before_a_reset_is_received() {
        let (one, other) = seqpacket();
        send(other.as_fd(), b"never read", &[]).unwrap();
        send(one.as_fd(), b"last words", &[]).unwrap();
        drop(one);
        assert_eq!(receive(other.as_fd(), &mut [0; 16]).unwrap().unwrap().len, 10);
        assert_eq!(receive(other.as_fd(), &mut [0; 16]).unwrap().unwrap().len, 0);
    }

    #[test]
    fn the_sender_of_a_datagram_is_known() {
        let (one, other) = UnixDatagram::pair().unwrap();
        setsockopt(&other, sockopt::PassCred, &true).unwrap();
        send(one.as_fd(), b"READY=1", &[one.as_fd()]).unwrap();
        let received = receive(other.as_fd(), &mut [0; 64]).unwrap().unwrap();
        assert_eq!(received.credentials.unwrap().pid, nix::unistd::getpid().as_raw());
        assert_eq!(received.fds.len(), 1);
    }

    #[test]
    fn a_full_queue_blocks_nobody() {
        let (one, _other) = seqpacket();
        let error = (0..100_000).find_map(|_| send(one.as_fd(), &[0; 4096], &[]).err()).unwrap();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn an_inherited_number_is_taken_once() {
        let (one, _other) = seqpacket();
        assert!(inherited(one.as_raw_fd()).is_err(), "opened by this process");
        fcntl(&one, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        let number = one.into_raw_fd();
        let fd = inherited(number).unwrap();
        assert!(inherited(number).is_err(), "taken before");
        assert_eq!(fd.as_raw_fd(), number);
        for never_open in [-1, 0, 2, i32::MAX] {
            assert!(inherited(never_open).is_err());
        }
    }
}
