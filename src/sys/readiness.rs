//! Waiting for an fd with tokio (epoll(7)).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::sys::signalfd::SignalFd;
use tokio::io::unix::AsyncFd;
use tokio::io::Interest;

/// An owner that has the same open fd for its whole life.
pub trait Steady: AsRawFd + sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::OwnedFd {}
    impl Sealed for super::Arc<super::OwnedFd> {}
    impl Sealed for super::SignalFd {}
}

impl Steady for OwnedFd {}
impl Steady for Arc<OwnedFd> {}
impl Steady for SignalFd {}

/// Makes an fd one that can be awaited. Within a runtime only.
pub fn awaited<T: Steady>(fd: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: a Steady owner keeps its fd open, and the same, until it is dropped; AsyncFd owns it until then and
    // hands out only what cannot close it.
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    registered.map_err(Into::into)
}
