//! The supervisor's end: which calls wait, and what becomes of them.
#![allow(clippy::cast_sign_loss, clippy::cast_possible_wrap)] // of fds, pids and flags, as the kernel's structures have them

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::{Mutex, PoisonError};

use libc::{c_void, seccomp_notif, seccomp_notif_addfd, seccomp_notif_resp, Ioctl};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use tokio::io::Interest;

use super::filter::{notification_size, NATIVE};
use crate::sys::readiness::Awaited;

/// A call that waits for an answer. Unless it gets one, it waits until its process is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notification {
    /// By which it is answered.
    pub id: u64,
    /// The thread that called; 0 for one outside of our pid namespace.
    pub tid: i32,
    /// What it called.
    pub call: Call,
}

/// A call with its arguments, as far as they are in registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// bind(2).
    Bind {
        /// Its socket.
        fd: RawFd,
        /// Where in its memory the address is.
        address: u64,
        /// How long that is said to be.
        length: u32,
    },
    /// listen(2).
    Listen {
        /// Its socket.
        fd: RawFd,
        /// How many connections may wait.
        backlog: i32,
    },
}

/// Is told of each call that a [`super::Filter`] catches, in all processes that have it.
#[derive(Debug)]
pub struct Notifier {
    fd: Awaited<OwnedFd>,
    /// Room for the kernel's `seccomp_notif`. Whoever has it is the only one to receive: the system call would wait, and
    /// all of zddsup with it, if somebody else was faster.
    room: Mutex<Vec<u64>>,
}

impl Notifier {
    /// From what [`super::Filter::install`] gave. Within a runtime only.
    ///
    /// # Errors
    /// ENOSYS: the kernel is too old (before Linux 5.9) to answer such calls.
    pub fn new(listener: OwnedFd) -> io::Result<Notifier> {
        let notifier = Notifier::resume(listener)?;
        match notifier.put_in_place(0, notifier.as_fd(), 0, true) {
            Ok(_no_such_call) => Ok(notifier),
            Err(_) => Err(Errno::ENOSYS.into()),
        }
    }

    /// One that was left open over execve(2). Within a runtime only.
    pub fn resume(listener: OwnedFd) -> io::Result<Notifier> {
        let size = notification_size()?.max(size_of::<seccomp_notif>());
        let room = Mutex::new(vec![0; size.div_ceil(size_of::<u64>())]);
        Ok(Notifier { fd: Awaited::new(listener, Interest::READABLE)?, room })
    }

    /// Waits for the next call. Can be cancelled; can be awaited by several.
    ///
    /// # Errors
    /// `UnexpectedEof` when the last process that has the filter is gone.
    pub async fn next(&self) -> io::Result<Notification> {
        loop {
            let mut ready = self.fd.readable().await?;
            match ready.try_io(|_| self.receive()) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }

    /// Whether a call still waits. Only if it does *after* something was read of its process, that was its process.
    #[must_use]
    pub fn still_waits(&self, id: u64) -> bool {
        let mut id = id;
        self.request(libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &mut id).is_ok()
    }

    /// Lets a call go on as if it had not been caught. False: it is over already, its process was killed or interrupted.
    pub fn go_on(&self, id: u64) -> io::Result<bool> {
        self.respond(id, 0, CONTINUE)
    }

    /// Ends a call with this result. False: it was over already.
    pub fn answer(&self, id: u64, result: nix::Result<()>) -> io::Result<bool> {
        let error = result.map_or_else(|errno| -(errno as i32), |()| 0);
        self.respond(id, error, 0)
    }

    /// Makes an fd of the process that waits be this file instead. The call waits on. False: it is over already.
    ///
    /// Others of its fds for the same socket stay what they are, and what was registered in epoll(7) is lost.
    pub fn put_in_place(&self, id: u64, file: BorrowedFd<'_>, number: RawFd, close_on_exec: bool) -> io::Result<bool> {
        let mut request = seccomp_notif_addfd {
            id,
            flags: SETFD,
            srcfd: file.as_raw_fd() as u32,
            newfd: number as u32,
            newfd_flags: if close_on_exec { libc::O_CLOEXEC as u32 } else { 0 },
        };
        still_there(self.request(libc::SECCOMP_IOCTL_NOTIF_ADDFD, &mut request))
    }

    fn respond(&self, id: u64, error: i32, flags: u32) -> io::Result<bool> {
        let mut response = seccomp_notif_resp { id, val: 0, error, flags };
        still_there(self.request(libc::SECCOMP_IOCTL_NOTIF_SEND, &mut response))
    }

    /// `WouldBlock` when no call waits.
    fn receive(&self) -> io::Result<Notification> {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            // Looked at each time: epoll(7) tells of several calls once, and the ioctl does not know O_NONBLOCK.
            let mut polled = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
            poll(&mut polled, PollTimeout::ZERO)?;
            let found = polled[0].revents().unwrap_or(PollFlags::empty());
            if !found.contains(PollFlags::POLLIN) {
                let is_over = found.intersects(PollFlags::POLLHUP | PollFlags::POLLERR);
                return Err(if is_over { io::ErrorKind::UnexpectedEof } else { io::ErrorKind::WouldBlock }.into());
            }
            // The kernel wants zeroes.
            room.fill(0);
            let place = room.as_mut_ptr().cast::<seccomp_notif>();
            // SAFETY: the room is aligned and at least as large as the kernel's seccomp_notif.
            match unsafe { self.ioctl(libc::SECCOMP_IOCTL_NOTIF_RECV, place.cast()) } {
                Ok(()) => {}
                // Its process was killed, or a signal interrupted it, or us.
                Err(Errno::ENOENT | Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            // SAFETY: the kernel has filled in a seccomp_notif there, which is plain numbers.
            let received = unsafe { ptr::read(place) };
            match call(&received.data) {
                Some(call) => return Ok(Notification { id: received.id, tid: received.pid as i32, call }),
                // Of a filter that is not ours.
                None => self.go_on(received.id)?,
            };
        }
    }

    /// `argument` is what the request expects to be pointed to.
    fn request<T: Argument>(&self, request: Ioctl, argument: &mut T) -> nix::Result<()> {
        loop {
            // SAFETY: an `Argument` of the kernel's layout, alive for the call.
            match unsafe { self.ioctl(request, ptr::from_mut(argument).cast()) } {
                Err(Errno::EINTR) => {}
                result => return result,
            }
        }
    }

    /// # Safety
    /// `argument` points to what the request reads and writes.
    unsafe fn ioctl(&self, request: Ioctl, argument: *mut c_void) -> nix::Result<()> {
        // SAFETY: the fd is open; the rest is the caller's to see to.
        Errno::result(unsafe { libc::ioctl(self.fd.get_ref().as_raw_fd(), request, argument) }).map(drop)
    }
}

impl AsFd for Notifier {
    /// To be kept over execve(2): as long as a copy of it is open, the calls wait instead of failing.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }
}

#[allow(clippy::cast_possible_truncation)] // One bit.
const CONTINUE: u32 = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32;
#[allow(clippy::cast_possible_truncation)]
const SETFD: u32 = libc::SECCOMP_ADDFD_FLAG_SETFD as u32;

/// What requests other than receiving point to.
trait Argument {}
impl Argument for u64 {}
impl Argument for seccomp_notif_addfd {}
impl Argument for seccomp_notif_resp {}

/// ESRCH: it was killed while its fd was changed.
fn still_there(result: nix::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(Errno::ENOENT | Errno::ESRCH) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// The kernel looks at 32 bits of these arguments, whatever else is in the registers.
#[allow(clippy::cast_possible_truncation)]
fn call(data: &libc::seccomp_data) -> Option<Call> {
    let machine = NATIVE.filter(|machine| machine.convention == data.arch)?;
    let [fd, second, third, ..] = data.args;
    let fd = fd as RawFd;
    match data.nr as u32 {
        nr if nr == machine.bind => Some(Call::Bind { fd, address: second, length: third as u32 }),
        nr if nr == machine.listen => Some(Call::Listen { fd, backlog: second as i32 }),
        _ => None,
    }
}
