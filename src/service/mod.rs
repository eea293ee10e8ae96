//! For supervised Rust services: listeners, ready, drain, and what is kept for the next generation.
//!
//! ```no_run
//! # async fn serve() -> Result<(), Box<dyn std::error::Error>> {
//! let service = zddsup::service::Service::from_env()?;
//! service.drain_at_sigterm()?;
//! let listener: tokio::net::TcpListener = service.listener_or_bind("http", "127.0.0.1:8080")?;
//! service.ready()?;
//! loop {
//!     tokio::select! {
//!         accepted = listener.accept() => { /* serve it */ }
//!         _ = service.draining() => break,
//!     }
//! }
//! drop(listener); // this copy: the supervisor's stays open, and the next generation accepts
//! // … finish what there is …
//! service.drained()?;
//! # Ok(())
//! # }
//! ```
//!
//! The same program runs under `zddsup run` (by the handoff socket, docs/handoff.md), under systemd and others
//! (`LISTEN_FDS`, `NOTIFY_SOCKET`), and alone, when it binds for itself.
//!
//! | file | what it holds |
//! |---|---|
//! | [`listeners`](Listen) | what was passed, by name, as the type that is asked for |
//! | `link` | the handoff socket |
//! | `drain` | the word that this generation is to finish |
//! | `notify` | `sd_notify(3)`, where there is no handoff socket |
#![cfg(feature = "service")]

mod drain;
mod link;
mod listeners;
mod notify;

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::proto::handoff::{FromGeneration, HandoffError, SOCKET_VAR};
use crate::proto::listen_fds::{self, ListenFdsError};
use crate::sys::scm;

pub use drain::Drain;
pub use link::Kept;
pub use listeners::{Accept, Listen};

use drain::Draining;
use link::Link;
use listeners::Passed;
use notify::Notifier;

/// Why something does not work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServiceError {
    /// `ZDDSUP_SOCKET` is not what it says.
    #[error(
        "ZDDSUP_SOCKET={value} is no handoff socket ({reason}): unset it, or have zddsup run this process directly, \
         not through something that closes its files"
    )]
    NoHandoffSocket {
        /// What the variable has.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The supervisor says nothing.
    #[error("the supervisor sent no listeners within {0} seconds on the handoff socket")]
    Silent(u64),
    /// The handoff socket is closed.
    #[error("there is no supervisor at the other end of the handoff socket")]
    Gone,
    /// What was said, or was to be said, is not of the protocol.
    #[error("handoff socket: {0}")]
    Handoff(#[from] HandoffError),
    /// The supervisor broke the protocol.
    #[error("the supervisor sent {0} on the handoff socket; are zddsup and this program of one time?")]
    Unexpected(&'static str),
    /// `LISTEN_FDS` and its like are not understood.
    #[error(transparent)]
    ListenFds(#[from] ListenFdsError),
    /// `LISTEN_FDS` counts what is not there.
    #[error("LISTEN_FDS says that fd {0} was passed, but it was not open when this process began: unset LISTEN_FDS")]
    NotOpen(i32),
    /// A listener that was not passed.
    #[error("no listener {name:?} was passed, only {}: give zddsup --listen {name}=ADDRESS", .passed.join(", "))]
    Missing {
        /// What was asked for.
        name: String,
        /// What was passed and is not taken yet.
        passed: Vec<String>,
    },
    /// No listener was passed at all, and no address to bind was given.
    #[error("no listener {0:?} was passed: run this under zddsup with --listen {0}=ADDRESS")]
    NotPassed(String),
    /// A listener of another type.
    #[error("listener {name:?} is {found}, not {wanted}: change its address given to zddsup")]
    WrongType {
        /// Which.
        name: String,
        /// What it is.
        found: String,
        /// What was asked for.
        wanted: &'static str,
    },
    /// It cannot be bound.
    #[error("cannot bind {address}: {source}")]
    Bind {
        /// Where.
        address: String,
        /// Why not.
        source: io::Error,
    },
    /// Keeping needs a handoff socket.
    #[error("nothing can be kept for a next generation: run this under zddsup with --handoff socket or auto")]
    NothingKeeps,
    /// The service is being stopped.
    #[error("nothing can be kept: the service is being stopped, and no generation comes after this one")]
    NobodyFollows,
    /// More fds than go with one message.
    #[error("{0} fds at once, which may be {max}; keep them in several turns", max = scm::MAX_FDS)]
    TooManyFds(usize),
    /// A system call failed.
    #[error("cannot {step}: {source}")]
    Io {
        /// What it was for.
        step: &'static str,
        /// Why not.
        source: io::Error,
    },
}

impl ServiceError {
    fn io(step: &'static str) -> impl Fn(io::Error) -> ServiceError {
        move |source| ServiceError::Io { step, source }
    }
}

/// This process as a supervised service. Cheap to clone; all clones are the same. With the last one the handoff socket is
/// closed: keep one for as long as the process serves.
#[derive(Debug, Clone)]
pub struct Service(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    passed: Mutex<Passed>,
    link: Option<Link>,
    notifier: Option<Notifier>,
    draining: Arc<Draining>,
}

/// What the environment says.
#[derive(Debug, Default)]
struct Given {
    socket: Option<OwnedFd>,
    fds: Vec<(String, OwnedFd)>,
    notify: Option<OsString>,
}

impl Service {
    /// Takes what the supervisor passed. To be called once, early in `main`: the variables are removed from the
    /// environment (which is not to be done while other threads read it), so that no child of this process believes them.
    ///
    /// Waits for the supervisor's first words, which are there when it runs at all.
    pub fn from_env() -> Result<Self, ServiceError> {
        let socket = env::var_os(SOCKET_VAR);
        let names = listen_fds::decode(|key| env::var(key).ok(), std::process::id());
        let notify = env::var_os("NOTIFY_SOCKET");
        for key in listen_fds::VARS.iter().chain(&[SOCKET_VAR, "NOTIFY_SOCKET"]) {
            env::remove_var(key);
        }
        let fds = names?
            .into_iter()
            .zip(listen_fds::FIRST_FD..)
            .map(|(name, number)| Ok((name, scm::inherited(number).map_err(|_| ServiceError::NotOpen(number))?)))
            .collect::<Result<_, ServiceError>>()?;
        let socket = socket.map(|value| link::inherited(&value)).transpose()?;
        Service::new(Given { socket, fds, notify })
    }

    fn new(given: Given) -> Result<Self, ServiceError> {
        let draining = Arc::new(Draining::new().map_err(ServiceError::io("make an eventfd"))?);
        let mut passed = Passed::default();
        let link = match given.socket {
            Some(socket) => {
                let (link, listeners) = Link::open(socket, Arc::clone(&draining))?;
                passed.add(listeners);
                Some(link)
            }
            None => None,
        };
        passed.add(given.fds);
        let notifier = given.notify.map(Notifier::new).transpose().map_err(ServiceError::io("use NOTIFY_SOCKET"))?;
        Ok(Service(Arc::new(Inner { passed: Mutex::new(passed), link, notifier, draining })))
    }

    /// The listener of that name, once. When there is but one and it has no name of its own, it has any name.
    ///
    /// The open socket is shared with the supervisor and all generations: never call `shutdown(2)` on it.
    pub fn listener<L: Listen>(&self, name: &str) -> Result<L, ServiceError> {
        self.passed().take(name)?.ok_or_else(|| ServiceError::NotPassed(name.to_owned()))
    }

    /// The same, or one that is bound here when no listener was passed at all: this process then runs alone.
    /// `address` is `HOST:PORT`, or the path of a Unix socket.
    pub fn listener_or_bind<L: Listen>(&self, name: &str, address: &str) -> Result<L, ServiceError> {
        match self.passed().take(name)? {
            Some(listener) => Ok(listener),
            None => L::bind(address).map_err(|source| ServiceError::Bind { address: address.to_owned(), source }),
        }
    }

    /// Names of the listeners, and of stored fds, that were passed and are not taken yet.
    #[must_use]
    pub fn listener_names(&self) -> Vec<String> {
        self.passed().names()
    }

    /// For servers with threads: the next connection, or none once this generation is to drain.
    ///
    /// Makes the listener non-blocking, which all generations see: two of them may wait for one connection.
    pub fn accept<L: Accept>(&self, listener: &L) -> Result<Option<L::Accepted>, ServiceError> {
        listeners::accept(listener, &self.0.draining).map_err(ServiceError::io("accept a connection"))
    }

    /// Says that this generation can serve: the one before may go.
    pub fn ready(&self) -> Result<(), ServiceError> {
        self.tell(&FromGeneration::Ready, "READY=1")
    }

    /// Says how it is, in one line for people.
    pub fn status(&self, text: &str) -> Result<(), ServiceError> {
        let line = text.replace(['\n', '\0'], " ");
        self.tell(&FromGeneration::Status { text: line.clone() }, &format!("STATUS={line}"))
    }

    /// Says that it has finished all that it had. Nothing needs to be waited for: what was said before is not lost when
    /// the process exits. A SIGTERM changes nothing from now on, if [`Service::drain_at_sigterm`] was called.
    pub fn drained(&self) -> Result<(), ServiceError> {
        self.0.draining.done();
        self.tell(&FromGeneration::Drained, "STOPPING=1")
    }

    /// Sends `sd_notify(3)` lines such as `WATCHDOG=1`, where there is a `NOTIFY_SOCKET`.
    pub fn notify(&self, lines: &str) -> io::Result<()> {
        self.0.notifier.as_ref().map_or(Ok(()), |notifier| notifier.send(lines))
    }

    /// From now on a SIGTERM means drain, for [`Service::draining`] and its like. A supervisor that has no handoff socket
    /// to this process drains it that way. A second one changes nothing, except after the drain's deadline, when it ends
    /// the process. Other handlers, also those of tokio and of the crate signal-hook, go on to be called.
    pub fn drain_at_sigterm(&self) -> Result<(), ServiceError> {
        drain::at_sigterm(Arc::clone(&self.0.draining)).map_err(ServiceError::io("handle SIGTERM"))
    }

    /// Resolves when this generation is to take no new connections, finish what it has, and exit. At once if it was told
    /// already; never if nobody tells it.
    pub async fn draining(&self) -> Drain {
        self.0.draining.told().await
    }

    /// The same for threads: blocks until then.
    pub fn wait_draining(&self) -> Result<Drain, ServiceError> {
        self.0.draining.wait().map_err(ServiceError::io("wait for the drain"))
    }

    /// Whether this generation is to drain.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.0.draining.now().is_some()
    }

    /// Whether [`Service::keep`] works: there is a supervisor that passes things on, and it has not said that the service
    /// is being stopped ([`Drain::last`]).
    #[must_use]
    pub fn can_keep(&self) -> bool {
        self.0.link.is_some() && !self.nobody_follows()
    }

    /// Passes open files, and up to 64 KiB that describe them, to the generation that serves after this one: live
    /// connections, memfds with caches. To be called once this one drains. Each call is one [`Kept`] there.
    ///
    /// Once this returns `Ok`, the supervisor has a copy and this process can close its own, without a `shutdown(2)`.
    /// At an error nothing was passed, and what there is can be served to its end here. Waits for the supervisor
    /// while its queue is full, for ten seconds at most.
    pub fn keep(&self, name: &str, state: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), ServiceError> {
        let link = self.0.link.as_ref().ok_or(ServiceError::NothingKeeps)?;
        if self.nobody_follows() {
            return Err(ServiceError::NobodyFollows);
        }
        let message = FromGeneration::Keep { name: name.to_owned(), state: state.to_owned() };
        link.say(&message, fds)
    }

    /// The next thing that a former generation passed on. None when no more can come. What nobody asked for when this
    /// process ends is passed to the next generation; where there is none ([`Drain::last`]), ask until it is None.
    pub async fn kept(&self) -> Option<Kept> {
        self.0.link.as_ref()?.kept().await
    }

    /// The same for threads: blocks until there is something. Not within an async runtime.
    #[must_use]
    pub fn wait_kept(&self) -> Option<Kept> {
        self.0.link.as_ref()?.wait_kept()
    }

    /// Number of this generation, counted by the supervisor from 1.
    #[must_use]
    pub fn generation(&self) -> Option<u32> {
        self.0.link.as_ref().map(Link::generation)
    }

    /// The supervisor's name of this service.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.0.link.as_ref().map(Link::service)
    }

    fn nobody_follows(&self) -> bool {
        self.0.draining.now().is_some_and(|drain| drain.last)
    }

    fn passed(&self) -> MutexGuard<'_, Passed> {
        self.0.passed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// By the handoff socket or else by `NOTIFY_SOCKET`. A service outlives its supervisor, so that one is gone is no
    /// error.
    fn tell(&self, message: &FromGeneration, lines: &str) -> Result<(), ServiceError> {
        match &self.0.link {
            Some(link) => match link.say(message, &[]) {
                Err(ServiceError::Gone) => Ok(()),
                other => other,
            },
            None => self.notify(lines).map_err(ServiceError::io("write to NOTIFY_SOCKET")),
        }
    }
}

#[cfg(test)]
mod tests;
