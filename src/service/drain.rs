//! The word that this generation is to finish, for futures and for threads.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use signal_hook::consts::SIGTERM;
use signal_hook::low_level::{emulate_default_handler, pipe};
use tokio::sync::Notify;

/// A SIGTERM that comes so much before the deadline counts as one after it: two clocks ran.
const SLACK: Duration = Duration::from_secs(1);

/// What a generation was told with the word to drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Drain {
    /// When it is stopped, as far as that is known.
    pub deadline: Option<Instant>,
    /// Whether no generation serves after this one: the service is being stopped, and nothing can be kept. Live
    /// connections are to be served to their end, or to the deadline.
    pub last: bool,
}

impl Drain {
    /// How long from now on.
    #[must_use]
    pub fn time_left(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }
}

#[derive(Debug)]
pub(super) struct Draining {
    told: Mutex<Option<Drain>>,
    /// It has said that it is done: its end is its own matter.
    done: AtomicBool,
    futures: Notify,
    /// Readable from the word on.
    threads: EventFd,
}

impl Draining {
    pub(super) fn new() -> io::Result<Self> {
        let threads = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Draining { told: Mutex::new(None), done: AtomicBool::new(false), futures: Notify::new(), threads })
    }

    /// The first word counts. A later one can only add that the service is being stopped meanwhile.
    pub(super) fn tell(&self, timeout: Option<Duration>, last: bool) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(drain) = told.as_mut() {
            drain.last |= last;
            return;
        }
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        *told = Some(Drain { deadline, last });
        let _cannot_overflow = self.threads.write(1);
        self.futures.notify_waiters();
    }

    pub(super) fn done(&self) {
        self.done.store(true, Ordering::Relaxed);
    }

    /// Whether it is to be stopped, drained or not.
    fn is_over(&self) -> bool {
        let left = self.now().and_then(|drain| drain.time_left());
        !self.done.load(Ordering::Relaxed) && left.is_some_and(|left| left <= SLACK)
    }

    pub(super) fn now(&self) -> Option<Drain> {
        *self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn told(&self) -> Drain {
        loop {
            // Before looking: one that is told in between wakes it.
            let word = self.futures.notified();
            if let Some(drain) = self.now() {
                return drain;
            }
            word.await;
        }
    }

    pub(super) fn wait(&self) -> io::Result<Drain> {
        loop {
            if let Some(drain) = self.now() {
                return Ok(drain);
            }
            wait_readable(&[self.threads.as_fd()])?;
        }
    }

    /// Blocks until the fd is readable; false when the word came instead.
    pub(super) fn readable_before(&self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        if self.now().is_none() {
            wait_readable(&[fd, self.threads.as_fd()])?;
        }
        Ok(self.now().is_none())
    }
}

fn wait_readable(fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut asked: Vec<_> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    match poll(&mut asked, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// A SIGTERM is the word, too.
pub(super) fn at_sigterm(draining: Arc<Draining>) -> io::Result<()> {
    let (mut signals, written) = UnixStream::pair()?;
    pipe::register(SIGTERM, written)?;
    super::link::thread("zddsup-sigterm", move || {
        while signals.read_exact(&mut [0; 1]).is_ok() {
            if draining.is_over() {
                let _cannot_fail = emulate_default_handler(SIGTERM);
            }
            draining.tell(None, false);
        }
    })
}
