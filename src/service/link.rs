//! The generation's end of the handoff socket (docs/handoff.md).
//!
//! One thread reads what the supervisor says, so that it works with any runtime and with none. What is said to the
//! supervisor is sent by whoever says it.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::SigSet;
use nix::sys::socket::{getsockopt, shutdown, sockopt, Shutdown, SockType};
use tokio::sync::{mpsc, Mutex};

use super::drain::Draining;
use super::ServiceError;
use crate::proto::handoff::{FromGeneration, ToGeneration, MAX_PACKET, VERSION};
use crate::sys::scm;

/// How long the supervisor has for its first words, and for reading what fills its queue.
const PATIENCE: Duration = Duration::from_secs(10);
/// The kernel lets nobody send fds while too many are on their way (`ETOOMANYREFS`), and does not say when that is over.
const RETRY: Duration = Duration::from_millis(10);

/// Something that a former generation passed on.
#[derive(Debug)]
pub struct Kept {
    /// What it is called.
    pub name: String,
    /// Bytes that describe it.
    pub state: Vec<u8>,
    /// Its open files, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

#[derive(Debug)]
pub(super) struct Link {
    socket: Arc<OwnedFd>,
    service: String,
    generation: u32,
    kept: Mutex<mpsc::UnboundedReceiver<(u64, Kept)>>,
}

/// The socket that `ZDDSUP_SOCKET` names.
pub(super) fn inherited(value: &OsStr) -> Result<OwnedFd, ServiceError> {
    let wrong = |reason: &dyn ToString| ServiceError::NoHandoffSocket {
        value: value.to_string_lossy().into_owned(),
        reason: reason.to_string(),
    };
    let number = value.to_str().and_then(|text| text.parse().ok()).ok_or_else(|| wrong(&"not a number"))?;
    let socket = scm::inherited(number).map_err(|error| wrong(&error))?;
    let error = match getsockopt(&socket, sockopt::SockType) {
        Ok(SockType::SeqPacket) => return Ok(socket),
        Ok(other) => wrong(&format!("a socket of type {other:?}")),
        Err(errno) => wrong(&errno.desc()),
    };
    // It is somebody else's: stays open.
    let _theirs = socket.into_raw_fd();
    Err(error)
}

/// A thread of the library, which gets no signals: they are for the service's own.
pub(super) fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let run = move || {
        let _signals_come_here_too = SigSet::all().thread_block();
        run();
    };
    thread::Builder::new().name(name.to_owned()).spawn(run).map(|_| ())
}

impl Link {
    /// Says hello, and waits for the supervisor's and for the listeners.
    pub(super) fn open(
        socket: OwnedFd,
        draining: Arc<Draining>,
    ) -> Result<(Self, Vec<(String, OwnedFd)>), ServiceError> {
        let mut reader = Reader { socket: Arc::new(socket), buffer: vec![0; MAX_PACKET + 1] };
        let deadline = Instant::now() + PATIENCE;
        say(&reader.socket, &FromGeneration::Hello { protocol: VERSION }, &[])?;
        let (ToGeneration::Hello { service, generation, .. }, _) = reader.next(Some(deadline))? else {
            return Err(ServiceError::Unexpected("something before hello"));
        };
        let mut listeners = Vec::new();
        loop {
            let (ToGeneration::Listeners { names, last }, fds) = reader.next(Some(deadline))? else {
                return Err(ServiceError::Unexpected("something before the listeners"));
            };
            listeners.extend(names.into_iter().zip(fds));
            if last {
                break;
            }
        }
        let socket = Arc::clone(&reader.socket);
        let (sender, kept) = mpsc::unbounded_channel();
        thread("zddsup", move || listen(reader, &draining, sender)).map_err(ServiceError::io("start a thread"))?;
        Ok((Link { socket, service, generation, kept: Mutex::new(kept) }, listeners))
    }

    pub(super) fn say(&self, message: &FromGeneration, fds: &[BorrowedFd<'_>]) -> Result<(), ServiceError> {
        say(&self.socket, message, fds)
    }

    pub(super) async fn kept(&self) -> Option<Kept> {
        let received = self.kept.lock().await.recv().await;
        received.map(|(id, kept)| self.taken(id, kept))
    }

    pub(super) fn wait_kept(&self) -> Option<Kept> {
        let received = self.kept.blocking_lock().blocking_recv();
        received.map(|(id, kept)| self.taken(id, kept))
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation
    }

    pub(super) fn service(&self) -> &str {
        &self.service
    }

    /// Whoever asked has it now: the supervisor need not hold it any longer.
    fn taken(&self, id: u64, kept: Kept) -> Kept {
        // A supervisor that cannot be told holds a copy, as if this had never been taken; that is all.
        let _gone = self.say(&FromGeneration::Taken { id }, &[]);
        kept
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Ends the thread.
        let _closed_already = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
    }
}

struct Reader {
    socket: Arc<OwnedFd>,
    buffer: Vec<u8>,
}

impl Reader {
    /// The next message; waits for it, until `deadline` if there is one.
    fn next(&mut self, deadline: Option<Instant>) -> Result<(ToGeneration, Vec<OwnedFd>), ServiceError> {
        loop {
            match scm::receive(self.socket.as_fd(), &mut self.buffer).map_err(ServiceError::io("read"))? {
                Some(received) if received.len == 0 => return Err(ServiceError::Gone),
                Some(received) if received.truncated => {
                    return Err(ServiceError::Unexpected("more than fits, or more fds than this process may open"));
                }
                Some(received) => {
                    let message = ToGeneration::decode(&self.buffer[..received.len], received.fds.len())?;
                    return Ok((message, received.fds));
                }
                None => {
                    if !wait(self.socket.as_fd(), PollFlags::POLLIN, deadline)? {
                        return Err(ServiceError::Silent(PATIENCE.as_secs()));
                    }
                }
            }
        }
    }
}

/// Until the supervisor is gone, or this process has no use for it.
fn listen(mut reader: Reader, draining: &Draining, keeper: mpsc::UnboundedSender<(u64, Kept)>) {
    let mut keeper = Some(keeper);
    let mut drain = None;
    // What cannot be understood ends it too: the supervisor sees the socket closed when this process ends, and a service
    // is not stopped for a supervisor's mistake. It drains at a signal then.
    loop {
        // What lies there is read before the word is passed on: the service may have been stopped since.
        let deadline = drain.map(|_| Instant::now());
        match (reader.next(deadline), drain.take()) {
            (Ok((ToGeneration::Drain { timeout_ms, last, more }, _)), earlier) => {
                let (timeout_ms, was_last) = earlier.unwrap_or((timeout_ms, false));
                drain = Some((timeout_ms, was_last || last));
                if last && !more {
                    keeper = None;
                }
            }
            (Ok((ToGeneration::Kept { id, name, state }, fds)), earlier) => {
                drain = earlier;
                let _link_is_dropped = keeper.as_ref().map(|keeper| keeper.send((id, Kept { name, state, fds })));
            }
            (Ok((ToGeneration::Hello { .. } | ToGeneration::Listeners { .. }, _)), earlier) => drain = earlier,
            (Err(_), Some((timeout_ms, last))) => draining.tell(timeout_ms.map(Duration::from_millis), last),
            (Err(_), None) => break,
        }
    }
    let _closed_already = shutdown(reader.socket.as_raw_fd(), Shutdown::Both);
}

fn say(socket: &OwnedFd, message: &FromGeneration, fds: &[BorrowedFd<'_>]) -> Result<(), ServiceError> {
    if fds.len() > scm::MAX_FDS {
        return Err(ServiceError::TooManyFds(fds.len()));
    }
    let packet = message.encode()?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let Err(error) = scm::send(socket.as_fd(), &packet, fds) else { return Ok(()) };
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => return Err(ServiceError::Gone),
            io::ErrorKind::WouldBlock if wait(socket.as_fd(), PollFlags::POLLOUT, Some(deadline))? => {}
            _ if error.raw_os_error() == Some(Errno::ETOOMANYREFS as i32) && Instant::now() < deadline => {
                thread::sleep(RETRY);
            }
            _ => return Err(ServiceError::Io { step: "write to the handoff socket", source: error }),
        }
    }
}

/// Waits for the socket; false when the deadline passed.
fn wait(socket: BorrowedFd<'_>, flags: PollFlags, deadline: Option<Instant>) -> Result<bool, ServiceError> {
    let timeout = match deadline {
        None => PollTimeout::NONE,
        Some(deadline) => {
            let left = deadline.saturating_duration_since(Instant::now());
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        }
    };
    match poll(&mut [PollFd::new(socket, flags)], timeout) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::EINTR) => Ok(deadline.is_none_or(|deadline| Instant::now() < deadline)),
        Err(errno) => Err(ServiceError::io("wait for the handoff socket")(errno.into())),
    }
}
