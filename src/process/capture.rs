//! A service's stderr: passed on unchanged, and its last lines kept.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{fcntl, open, FcntlArg, OFlag};
use nix::sys::stat::{fstat, Mode, SFlag};
use nix::unistd::{pipe2, read};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::task::AbortHandle;

use super::output::{Output, Source};
use super::tail::Tail;
use crate::state::fds;
use crate::sys::readiness::Awaited;

/// As much as an unprivileged process may ask for (pipe(7)): what a service can write while zddsup is busy.
const PIPE_SIZE: i32 = 1024 * 1024;

/// What [`Capture::catch_up`] reads at most, from a service that never stops writing.
const MOST_AT_ONCE: usize = 4 * 1024 * 1024;

/// What of a capture outlives the program that has it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Carried {
    #[serde(with = "fds::shared")]
    pipe: Arc<OwnedFd>,
    tail: Tail,
}

/// Reads a service's stderr, until nobody has it open any more, or this is dropped.
pub struct Capture {
    pipe: Arc<Pipe>,
    task: AbortHandle,
}

struct Pipe {
    fd: Arc<OwnedFd>,
    output: Output,
    /// Locked over reading and passing on, so that the order stays.
    source: Mutex<Source>,
    tail: Tail,
}

/// What one read came to.
enum Step {
    Some(usize),
    NothingNow,
    End,
}

impl Capture {
    pub(super) fn new(output: &Output) -> io::Result<(Capture, OwnedFd)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        // Only root may have it larger; it works with what it has.
        let _unprivileged = fcntl(&write, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE));
        // Open for reading too: a service whose supervisor was killed reads its own pipe, as far as the kernel knows, and
        // gets no SIGPIPE. (It waits once the pipe is full, until the next supervisor takes it over.)
        let childs = reopen(&write, OFlag::O_RDWR).unwrap_or(write);
        let read = reopen(&read, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
        Ok((Capture::of(read, output)?, childs))
    }

    /// Goes on with the pipe of a service that was started by another supervisor: `fd` is any fd of it. Within a runtime
    /// only.
    pub fn adopt(fd: &OwnedFd, output: &Output) -> io::Result<Capture> {
        let kind = SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT;
        if kind != SFlag::S_IFIFO {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "its stderr is no pipe"));
        }
        // Opened anew: the flags of the service's own are not ours to change, and as a writer we would never see the end.
        Capture::of(reopen(fd, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?, output)
    }

    /// Goes on with one of the program in whose place this one is. Within a runtime only.
    pub fn resume(carried: Carried, output: &Output) -> io::Result<Capture> {
        Capture::with(carried.pipe, carried.tail, output)
    }

    /// What the program that takes this one's place needs of it.
    #[must_use]
    pub fn carry(&self) -> Carried {
        Carried { pipe: Arc::clone(&self.pipe.fd), tail: self.pipe.tail.clone() }
    }

    fn of(read: OwnedFd, output: &Output) -> io::Result<Capture> {
        Capture::with(Arc::new(read), Tail::default(), output)
    }

    fn with(fd: Arc<OwnedFd>, tail: Tail, output: &Output) -> io::Result<Capture> {
        let awaited = Awaited::new(fd.clone(), Interest::READABLE)?;
        let pipe = Arc::new(Pipe { fd, output: output.clone(), source: Mutex::default(), tail });
        let task = tokio::spawn(pump(pipe.clone(), awaited)).abort_handle();
        Ok(Capture { pipe, task })
    }

    /// The pipe, to be kept for a supervisor after this one: [`Capture::adopt`].
    #[must_use]
    pub fn pipe(&self) -> &Arc<OwnedFd> {
        &self.pipe.fd
    }

    /// Reads now what is in the pipe, so that [`Capture::tail`] has a dead process' last words.
    pub fn catch_up(&self) {
        let mut total = 0;
        while total < MOST_AT_ONCE {
            match self.pipe.read_some() {
                Step::Some(count) => total += count,
                Step::NothingNow | Step::End => break,
            }
        }
    }

    /// The last lines that were read.
    #[must_use]
    pub fn tail(&self) -> &Tail {
        &self.pipe.tail
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.catch_up();
        self.task.abort();
    }
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture").field("fd", &self.pipe.fd).finish_non_exhaustive()
    }
}

async fn pump(pipe: Arc<Pipe>, fd: Awaited<Arc<OwnedFd>>) {
    while let Ok(mut ready) = fd.readable().await {
        pipe.output.room().await;
        match pipe.read_some() {
            // Others get their turn, whatever a service writes.
            Step::Some(_) => tokio::task::yield_now().await,
            Step::NothingNow => ready.clear_ready(),
            Step::End => break,
        }
    }
}

impl Pipe {
    fn read_some(&self) -> Step {
        let mut source = self.source.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = [0; 16 * 1024];
        loop {
            return match read(&self.fd, &mut buffer) {
                Ok(0) => Step::End,
                Ok(count) => {
                    self.output.push(&mut source, &buffer[..count]);
                    self.tail.push(&buffer[..count]);
                    Step::Some(count)
                }
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => Step::NothingNow,
                Err(_) => Step::End,
            };
        }
    }
}

/// The same pipe, as an open file of its own: with flags of its own.
fn reopen(fd: &OwnedFd, flags: OFlag) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    Ok(open(path.as_str(), flags | OFlag::O_CLOEXEC, Mode::empty())?)
}
