//! The supervisor's end of a generation's handoff socket (docs/handoff.md).
//!
//! ```text
//!   send() ──> queue ──> flush ──> ┌────────┐
//!                                  │ socket │ <──> the generation
//!   incoming() <── take_one <───── └────────┘
//! ```
//!
//! The generation is not trusted: it may be slow, deaf, or send anything. What it says first is hello; the first thing
//! that is not of the protocol ends the channel, and its process is told to drain by a signal from then on.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, socketpair, sockopt, AddressFamily, SockFlag, SockType};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::proto::handoff::{
    FromGeneration, HandoffError, ToGeneration, MAX_FDS, MAX_KEEPS, MAX_KEPT_BYTES, MAX_PACKET, VERSION,
};
use crate::state::fds;
use crate::sys::readiness::Awaited;
use crate::sys::scm;

/// How many messages are taken before others have their turn: a flood fills the kernel's queue, not our memory.
const AT_ONCE: usize = 16;
/// How many are taken when a generation has ended: more than any socket's queue holds.
const LAST_WORDS: usize = 8192;
/// How many wait for a generation that does not read, before it is given up.
const MAX_QUEUED: usize = 2 * MAX_KEEPS;
/// The kernel lets nobody send fds while too many are on their way (`ETOOMANYREFS`), and does not say when that is over.
const RETRY: Duration = Duration::from_millis(20);

/// Something for a generation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outgoing {
    /// What is said.
    pub message: ToGeneration,
    /// Open files that go with it.
    #[serde(with = "fds::shared_list")]
    pub fds: Vec<Arc<OwnedFd>>,
}

/// Something from a generation.
#[derive(Debug)]
pub enum Incoming {
    /// It said something; hello comes first.
    Message {
        /// What.
        message: FromGeneration,
        /// Open files that came with it.
        fds: Vec<OwnedFd>,
    },
    /// It does not keep to the protocol: the channel is closed.
    Malformed(ChannelError),
    /// All of its processes closed the socket.
    Closed,
}

/// Why a channel was closed.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// A packet that is none of the protocol.
    #[error("the generation sent {0}")]
    Packet(#[from] HandoffError),
    /// Fds were lost.
    #[error("fds of a packet were lost: zddsup may open no more files; raise its limit (LimitNOFILE=, ulimit -n)")]
    LostFds,
    /// Something came before hello, or hello came twice.
    #[error("the generation sent {0}; its first packet, and only that, is hello")]
    Hello(&'static str),
    /// More than a generation may leave.
    #[error("the generation keeps more than {MAX_KEEPS} things, {MAX_KEPT_BYTES} bytes of state, or {0} fds")]
    KeepsTooMuch(usize),
    /// It does not read what it is sent.
    #[error("the generation does not read its handoff socket: {MAX_QUEUED} messages wait")]
    Deaf,
    /// Something that cannot be said in a packet.
    #[error("cannot send the generation {0}")]
    Unsendable(HandoffError),
    /// The socket failed.
    #[error("the handoff socket failed: {0}")]
    Socket(#[from] io::Error),
}

/// What of a channel outlives the program that has it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Carried {
    #[serde(with = "fds::owned")]
    socket: OwnedFd,
    queue: VecDeque<Outgoing>,
    spoken: bool,
    reader: Reader,
}

/// A generation's handoff socket. Dropped, it is closed.
pub struct Channel {
    shared: Arc<Shared>,
    task: AbortHandle,
}

struct Shared {
    socket: Awaited<OwnedFd>,
    incoming: Box<dyn Fn(Incoming) + Send + Sync>,
    state: Mutex<State>,
    /// Held from receiving a packet to its report, so that the order is kept.
    reader: Mutex<Reader>,
    queued: Notify,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Outgoing>,
    spoken: bool,
    closed: bool,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Reader {
    keeps: usize,
    kept_bytes: usize,
    kept_fds: usize,
    most_fds: usize,
}

/// How far the queue got.
#[derive(Clone, Copy)]
enum Flushed {
    /// To its end.
    All,
    /// The generation has to read first.
    Full,
    /// Worth another try in a while.
    Later,
}

impl Channel {
    /// A channel, and the generation's end of it, to be closed here once the generation has it. Hello and the listeners
    /// are sent first; `incoming` is called with all that the generation says, and last with why no more comes. It may
    /// keep up to `most_fds` for others. Within a runtime only.
    pub fn pair(
        service: &str,
        generation: u32,
        listeners: &[(String, Arc<OwnedFd>)],
        most_fds: usize,
        incoming: impl Fn(Incoming) + Send + Sync + 'static,
    ) -> io::Result<(Channel, OwnedFd)> {
        Channel::with_batches(service, generation, listeners, MAX_FDS, most_fds, incoming)
    }

    fn with_batches(
        service: &str,
        generation: u32,
        listeners: &[(String, Arc<OwnedFd>)],
        batch: usize,
        most_fds: usize,
        incoming: impl Fn(Incoming) + Send + Sync + 'static,
    ) -> io::Result<(Channel, OwnedFd)> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        for end in [&ours, &theirs] {
            // The kernel's default is enough for a packet; where it was lowered, this gets what is allowed.
            let _capped = setsockopt(end, sockopt::SndBuf, &(2 * MAX_PACKET));
        }
        let hello = ToGeneration::Hello { protocol: VERSION, service: service.to_owned(), generation };
        let mut queue = VecDeque::from([Outgoing { message: hello, fds: Vec::new() }]);
        queue.extend(batches(listeners, batch));
        let reader = Reader { most_fds, ..Reader::default() };
        let shared = Shared::new(Carried { socket: ours, queue, spoken: false, reader }, incoming)?;
        // At once as far as the socket takes it: it lies there before the generation's first instruction.
        shared.flush().map_err(io::Error::other)?;
        let task = tokio::spawn(run(Arc::clone(&shared))).abort_handle();
        Ok((Channel { shared, task }, theirs))
    }

    /// Goes on with one of the program in whose place this one is. Within a runtime only.
    pub fn resume(carried: Carried, incoming: impl Fn(Incoming) + Send + Sync + 'static) -> io::Result<Channel> {
        let shared = Shared::new(carried, incoming)?;
        let task = tokio::spawn(run(Arc::clone(&shared))).abort_handle();
        Ok(Channel { shared, task })
    }

    /// What the program that takes this one's place needs of it; none of one that is closed.
    pub fn carry(&self) -> io::Result<Option<Carried>> {
        let state = self.shared.state();
        if state.closed {
            return Ok(None);
        }
        let socket = self.shared.socket.get_ref().try_clone()?;
        let reader = self.shared.reader.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(Some(Carried { socket, queue: state.queue.clone(), spoken: state.spoken, reader }))
    }

    /// Says something, after all that was to be said before. Never waits.
    pub fn send(&self, outgoing: Outgoing) {
        let mut state = self.shared.state();
        if state.closed {
            return;
        }
        if state.queue.len() >= MAX_QUEUED {
            drop(state);
            self.shared.close(Incoming::Malformed(ChannelError::Deaf));
            return;
        }
        state.queue.push_back(outgoing);
        drop(state);
        self.shared.queued.notify_one();
    }

    /// Whether the generation said hello, and so hears what it is told.
    #[must_use]
    pub fn has_spoken(&self) -> bool {
        let state = self.shared.state();
        state.spoken && !state.closed
    }

    /// Takes all that the generation has said until now. To be called when its process has ended, so that what it kept
    /// is known before its end is acted on.
    pub fn catch_up(&self) {
        for _ in 0..LAST_WORDS {
            if !self.shared.take_one() {
                break;
            }
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.task.abort();
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.state();
        f.debug_struct("Channel")
            .field("socket", self.shared.socket.get_ref())
            .field("spoken", &state.spoken)
            .field("queued", &state.queue.len())
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn new(carried: Carried, incoming: impl Fn(Incoming) + Send + Sync + 'static) -> io::Result<Arc<Shared>> {
        let Carried { socket, queue, spoken, reader } = carried;
        Ok(Arc::new(Shared {
            socket: Awaited::new(socket, Interest::READABLE | Interest::WRITABLE)?,
            incoming: Box::new(incoming),
            state: Mutex::new(State { queue, spoken, closed: false }),
            reader: Mutex::new(reader),
            queued: Notify::new(),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what is queued, as far as the socket takes it.
    fn flush(&self) -> Result<Flushed, ChannelError> {
        let mut state = self.state();
        while let Some(next) = state.queue.front() {
            let packet = next.message.encode().map_err(ChannelError::Unsendable)?;
            let fds: Vec<_> = next.fds.iter().map(AsFd::as_fd).collect();
            match scm::send(self.socket.as_fd(), &packet, &fds) {
                Ok(()) => {
                    state.queue.pop_front();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Flushed::Full),
                Err(error) if error.raw_os_error() == Some(Errno::ETOOMANYREFS as i32) => return Ok(Flushed::Later),
                // Nobody hears it, but what was said before may still have to be read.
                Err(error) if is_gone(&error) => state.queue.clear(),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Flushed::All)
    }

    /// Reports one packet; false when there is none now, or none any more.
    fn take_one(&self) -> bool {
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        if self.state().closed {
            return false;
        }
        // Not kept: most generations say little or nothing.
        let mut buffer = vec![0; MAX_PACKET + 1];
        let received = match scm::receive(self.socket.as_fd(), &mut buffer) {
            Ok(Some(received)) => received,
            Ok(None) => return false,
            Err(error) => {
                self.close(Incoming::Malformed(error.into()));
                return false;
            }
        };
        // An empty packet cannot be told from the end, and says as little.
        if received.len == 0 && received.fds.is_empty() {
            self.close(Incoming::Closed);
            return false;
        }
        match reader.understand(&received, &buffer).and_then(|message| self.in_turn(message)) {
            Ok(message) => (self.incoming)(Incoming::Message { message, fds: received.fds }),
            Err(error) => {
                self.close(Incoming::Malformed(error));
                return false;
            }
        }
        true
    }

    /// Hello comes first, and once.
    fn in_turn(&self, message: FromGeneration) -> Result<FromGeneration, ChannelError> {
        let mut state = self.state();
        match (&message, state.spoken) {
            (FromGeneration::Hello { .. }, false) => state.spoken = true,
            (FromGeneration::Hello { .. }, true) => return Err(ChannelError::Hello("hello again")),
            (_, true) => {}
            (_, false) => return Err(ChannelError::Hello("something before hello")),
        }
        Ok(message)
    }

    /// No more is sent or taken.
    fn close(&self, why: Incoming) {
        let mut state = self.state();
        if std::mem::replace(&mut state.closed, true) {
            return;
        }
        state.queue.clear();
        drop(state);
        self.queued.notify_one();
        (self.incoming)(why);
    }
}

impl Reader {
    fn understand(&mut self, received: &scm::Received, buffer: &[u8]) -> Result<FromGeneration, ChannelError> {
        if received.len > MAX_PACKET {
            return Err(HandoffError::TooLong.into());
        }
        if received.truncated {
            return Err(ChannelError::LostFds);
        }
        let message = FromGeneration::decode(&buffer[..received.len], received.fds.len())?;
        if let FromGeneration::Keep { name, state } = &message {
            self.keeps += 1;
            self.kept_bytes += name.len() + state.len();
            self.kept_fds += received.fds.len();
            if self.keeps > MAX_KEEPS || self.kept_bytes > MAX_KEPT_BYTES || self.kept_fds > self.most_fds {
                return Err(ChannelError::KeepsTooMuch(self.most_fds));
            }
        }
        Ok(message)
    }
}

/// The listeners in packets of at most `batch`; at least one packet, so that the generation knows when there are none.
fn batches(listeners: &[(String, Arc<OwnedFd>)], batch: usize) -> Vec<Outgoing> {
    let count = listeners.len().div_ceil(batch).max(1);
    (0..count)
        .map(|index| {
            let (names, fds) = listeners.iter().skip(index * batch).take(batch).cloned().unzip();
            Outgoing { message: ToGeneration::Listeners { names, last: index + 1 == count }, fds }
        })
        .collect()
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

async fn run(shared: Arc<Shared>) {
    loop {
        let flushed = match shared.flush() {
            Ok(flushed) => flushed,
            Err(error) => return shared.close(Incoming::Malformed(error)),
        };
        let turn = tokio::select! {
            ready = shared.socket.readable() => ready.map(|mut ready| {
                if !(0..AT_ONCE).all(|_| shared.take_one()) {
                    ready.clear_ready();
                }
            }),
            () = shared.queued.notified() => Ok(()),
            // Whether it is true is seen by the next flush; if not, the wait is for the next time.
            ready = shared.socket.writable(), if matches!(flushed, Flushed::Full) => ready.map(|mut ready| ready.clear_ready()),
            () = tokio::time::sleep(RETRY), if matches!(flushed, Flushed::Later) => Ok(()),
        };
        if let Err(error) = turn {
            shared.close(Incoming::Malformed(error.into()));
        }
        if shared.state().closed {
            return;
        }
        tokio::task::yield_now().await;
    }
}

#[cfg(test)]
#[path = "channel_tests.rs"]
mod tests;
