//! Waiting for an fd with tokio (epoll(7)).

use std::io;
use std::ops::Deref;
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

/// An fd that can be awaited: `readable()`, `writable()`, `get_ref()` of [`AsyncFd`], without what could take it away.
#[derive(Debug)]
pub struct Awaited<T: Steady>(AsyncFd<T>);

impl<T: Steady> Awaited<T> {
    /// Registers it. Within a runtime only.
    pub fn new(fd: T, interest: Interest) -> io::Result<Self> {
        // SAFETY: a Steady owner keeps its fd open, and the same, until it is dropped. AsyncFd owns it until then, and
        // is lent out shared only, so that nothing can be put in its place.
        let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
        Ok(Awaited(registered?))
    }
}

impl<T: Steady> Deref for Awaited<T> {
    type Target = AsyncFd<T>;

    fn deref(&self) -> &AsyncFd<T> {
        &self.0
    }
}
