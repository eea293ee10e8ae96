//! Listeners: the sockets that zddsup holds from its first bind to its end, so that no connection is ever refused.
//!
//! | file | what it holds |
//! |---|---|
//! | [`address`], [`options`], [`spec`] | `[NAME=]ADDRESS[?OPTIONS]`, read and shown; nothing is opened |
//! | `bind` | a socket from it |
//! | `stale` | files of Unix sockets |
//! | [`inherit`] | sockets that systemd passed |
//! | `open` | all of a service's listeners, from wherever each can be had |
//! | [`steering`] | which of the sockets of one address gets a new connection |
//! | [`error`], `holder` | why not, who is in the way, what to do |

pub mod address;
mod bind;
pub mod error;
mod holder;
pub mod inherit;
mod open;
pub mod options;
pub mod spec;
mod stale;
pub mod steering;

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::sys::stat::fstat;
use nix::unistd::{fchown, geteuid};
use socket2::{SockRef, Socket};

pub use self::bind::DEFAULT_BACKLOG;
pub use self::error::{BindError, Why};
pub use self::open::{open, open_from, take_unasked, ListenError};
pub use self::spec::{ListenFlag, ListenerSpec};

use self::address::{Address, Host};
use self::stale::SocketFile;
use crate::sys::socket::{is_shut_down, tcp_backlog};

/// A socket that generations share. It outlives each of them.
#[derive(Debug)]
pub struct Listener {
    spec: ListenerSpec,
    origin: Origin,
    /// Where it really is: port 0 was chosen by the kernel.
    bound: Address,
    held: Mutex<Held>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// By us, or by a supervisor in whose place we are.
    Bound,
    /// By systemd.
    Passed,
}

#[derive(Debug)]
struct Held {
    fd: Arc<OwnedFd>,
    /// Ours to remove at the end.
    file: Option<SocketFile>,
}

/// Whether a generation had broken a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// It listens, and did.
    Untouched,
    /// It listens again.
    Relistened,
}

impl Listener {
    /// Binds and listens.
    pub fn bind(spec: &ListenerSpec) -> Result<Listener, BindError> {
        let spec = absolute(spec)?;
        let (fd, file) = bind::bind(&spec).map_err(|why| error(&spec, why))?;
        let bound = bind::address_of(&SockRef::from(&fd));
        let bound = bound.map_err(|source| error(&spec, Why::System { step: "asking for its address", source }))?;
        Ok(Listener { spec, origin: Origin::Bound, bound, held: Mutex::new(Held { fd: Arc::new(fd), file }) })
    }

    /// A socket that somebody above us bound and passed: it stays theirs, its file included.
    pub fn inherited(fd: OwnedFd, name: &str) -> Result<Listener, BindError> {
        let address = bind::address_of(&SockRef::from(&fd));
        let nowhere = |source| {
            let why = Why::System { step: "asking for its address", source };
            BindError { listener: name.to_owned(), address: "a socket that was passed".to_owned(), why }
        };
        let address = address.map_err(nowhere)?;
        let options = options::Options::default();
        Listener::passed(fd, ListenerSpec { name: name.to_owned(), address, options, steered: false })
    }

    /// The same for what was asked for. Options that have to be set before bind(2) are up to whoever bound it.
    fn passed(fd: OwnedFd, mut spec: ListenerSpec) -> Result<Listener, BindError> {
        if spec.options.backlog.is_none() {
            spec.options.backlog = backlog_of(&fd, &spec.address);
        }
        Listener::made_by_another(fd, spec, Origin::Passed)
    }

    /// Takes over a socket that a supervisor before us bound for the same purpose; its file becomes ours. An error may
    /// say that it is another one.
    pub fn adopt(fd: OwnedFd, spec: &ListenerSpec) -> Result<Listener, BindError> {
        let listener = Listener::made_by_another(fd, absolute(spec)?, Origin::Bound)?;
        if let Some(path) = listener.bound.path() {
            let file = SocketFile::at(path).map_err(|source| Why::System { step: "looking at its file", source });
            listener.lock().file = Some(file.map_err(|why| error(&listener.spec, why))?);
        }
        Ok(listener)
    }

    /// A socket that is what was asked for, with the options that can be set afterwards.
    fn made_by_another(fd: OwnedFd, spec: ListenerSpec, origin: Origin) -> Result<Listener, BindError> {
        let socket = Socket::from(fd);
        let bound = bind::address_of(&SockRef::from(&socket));
        let bound = bound.map_err(|source| error(&spec, Why::System { step: "asking for its address", source }))?;
        if !meets(&spec.address, &bound) {
            return Err(error(&spec, Why::Other { passed: bound.to_string() }));
        }
        let v6 = socket.local_addr().is_ok_and(|address| address.is_ipv6());
        bind::at_any_time(&socket, v6, &spec.options).map_err(|why| error(&spec, why))?;
        let held = Mutex::new(Held { fd: Arc::new(socket.into()), file: None });
        let listener = Listener { spec, origin, bound, held };
        match listener.repair() {
            Ok(_) => Ok(listener),
            // It was put right as far as it goes.
            Err(why) if SockRef::from(&*listener.fd()).is_listener().unwrap_or(false) => {
                tracing::error!(listener = listener.name(), "{why}");
                Ok(listener)
            }
            Err(source) => Err(error(&listener.spec, Why::System { step: "listening", source })),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Where it is bound, port 0 replaced by the one that the kernel chose.
    #[must_use]
    pub fn address(&self) -> String {
        self.bound.to_string()
    }

    /// The same, in parts.
    #[must_use]
    pub fn bound(&self) -> &Address {
        &self.bound
    }

    /// Its IP address, if it has one.
    #[must_use]
    pub fn local(&self) -> Option<SocketAddr> {
        match &self.bound {
            Address::Inet { host, port, .. } => bind::socket_address(host, *port).ok(),
            Address::Unix { .. } => None,
        }
    }

    /// Whether each generation has a socket of its own there, and this one is the first of them.
    #[must_use]
    pub fn is_steered(&self) -> bool {
        self.spec.steered
    }

    /// Whether it is somebody else's, above us.
    #[must_use]
    pub fn is_passed(&self) -> bool {
        self.origin == Origin::Passed
    }

    /// Whether others can be bound beside it.
    #[must_use]
    pub fn is_shareable(&self) -> bool {
        SockRef::from(&*self.fd()).reuse_port().unwrap_or(false)
    }

    /// Another socket at the same address, with the same options. It does not listen yet.
    pub fn another(&self) -> Result<OwnedFd, BindError> {
        let socket = match self.local() {
            Some(address) => Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None),
            None => Err(io::ErrorKind::Unsupported.into()),
        };
        let socket = socket.map_err(|source| error(&self.spec, Why::System { step: "opening a socket", source }))?;
        self.bind_beside(&socket)?;
        Ok(socket.into())
    }

    /// Binds a service's own socket here, in its place: with our rights, and with the options that were asked for.
    pub fn bind_for(&self, own: OwnedFd) -> Result<(), BindError> {
        let failed = |source: io::Error| error(&self.spec, Why::System { step: "taking its socket for ours", source });
        // The kernel lets nobody else's socket beside ours: it is to be our user's.
        let us = geteuid();
        let found = fstat(&own).map_err(|errno| failed(errno.into()))?;
        if found.st_uid != us.as_raw() {
            fchown(&own, Some(us), None).map_err(|errno| failed(errno.into()))?;
        }
        self.bind_beside(&Socket::from(own))
    }

    fn bind_beside(&self, socket: &Socket) -> Result<(), BindError> {
        let v6only = self.bound.is_v6() && SockRef::from(&*self.fd()).only_v6().unwrap_or(false);
        let address = self.local().ok_or_else(|| error(&self.spec, Why::NotHere))?;
        bind::beside(socket, address, v6only, &self.spec).map_err(|why| error(&self.spec, why))
    }

    /// Lets one of its sockets listen, or again with the queue that was asked for.
    pub fn listen(&self, socket: &OwnedFd) -> io::Result<()> {
        SockRef::from(socket).listen(self.backlog())
    }

    /// How many connections may wait.
    #[must_use]
    pub fn backlog(&self) -> i32 {
        bind::backlog(&self.spec)
    }

    /// Gives a socket of a generation that is gone the status flags of a new one.
    pub fn renew_flags(&self, socket: &OwnedFd) {
        let flags = if self.spec.options.nonblock { OFlag::O_NONBLOCK } else { OFlag::empty() };
        let _cannot_fail_on_an_open_fd = fcntl(socket, FcntlArg::F_SETFL(flags));
    }

    /// Whether a service's bind(2) to this address is meant to be this one: the very same, or any port where any was asked
    /// for here.
    #[must_use]
    pub fn is_meant_by(&self, own: &OwnedFd, address: SocketAddr) -> bool {
        let socket = SockRef::from(own);
        let Some(mut here) = self.local() else { return false };
        if address.port() == 0 && self.spec.address.has_any_port() {
            here.set_port(0);
        }
        let any_v6 = address.is_ipv6() && address.ip().is_unspecified();
        let same_versions = || socket.only_v6().ok() == SockRef::from(&*self.fd()).only_v6().ok();
        (here.ip(), here.port()) == (address.ip(), address.port()) && (!any_v6 || same_versions())
    }

    /// What generations are given.
    #[must_use]
    pub fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.lock().fd)
    }

    /// Its inode in sockfs, by which it is known in `/proc/PID/fd`; 0 if the kernel does not say.
    #[must_use]
    pub fn inode(&self) -> u64 {
        fstat(self.fd()).map_or(0, |found| found.st_ino)
    }

    /// Its status flags, which all who have it share.
    pub fn status_flags(&self) -> io::Result<OFlag> {
        Ok(OFlag::from_bits_truncate(fcntl(self.fd(), FcntlArg::F_GETFL)?))
    }

    /// Gives it status flags, as they were before a generation changed them.
    pub fn restore_flags(&self, flags: OFlag) {
        if self.status_flags().is_ok_and(|now| now != flags) {
            let _cannot_fail_on_an_open_fd = fcntl(self.fd(), FcntlArg::F_SETFL(flags));
        }
    }

    /// Undoes what a generation may have done to all: shutdown(2), or listen(2) with a queue of its own size.
    pub fn repair(&self) -> io::Result<Repair> {
        if !self.bound.takes_connections() {
            return Ok(Repair::Untouched);
        }
        let fd = self.fd();
        let socket = SockRef::from(&*fd);
        match &self.bound {
            Address::Unix { .. } => {
                if is_shut_down(&*fd)? {
                    self.replace()?;
                    return Err(io::Error::other(
                        "a generation called shutdown(2) on it, which Linux cannot undo for a Unix socket; generations \
                         started from now on have a new one: run `zddsup restart`",
                    ));
                }
            }
            Address::Inet { host, port, .. } => {
                if !socket.is_listener()? {
                    // A port that the kernel chose was given back with that shutdown; a bound socket says EINVAL.
                    if let Ok(address) = bind::socket_address(host, *port) {
                        let _still_bound = socket.bind(&address.into());
                    }
                }
            }
        }
        let listened = socket.is_listener()?;
        socket.listen(bind::backlog(&self.spec))?;
        Ok(if listened { Repair::Untouched } else { Repair::Relistened })
    }

    /// Binds a new socket in the place of a Unix socket that is of no use any more.
    fn replace(&self) -> io::Result<()> {
        let remedy = match (self.origin, self.bound.path()) {
            (Origin::Bound, Some(_)) => {
                let mut held = self.lock();
                held.file = None;
                let (fd, file) = bind::bind(&self.spec).map_err(io::Error::other)?;
                *held = Held { fd: Arc::new(fd), file };
                return Ok(());
            }
            (Origin::Bound, None) => {
                "its abstract name stays taken while a generation lives: run `zddsup stop` and start it anew"
            }
            (Origin::Passed, _) => "systemd passed it: restart the socket unit",
        };
        Err(io::Error::other(format!("a generation called shutdown(2) on it, which Linux cannot undo; {remedy}")))
    }

    /// Its file stays when this is dropped: somebody else has the socket for whoever comes next.
    pub fn leave_file(&self) {
        std::mem::forget(self.lock().file.take());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A relative path means the same for ever.
fn absolute(spec: &ListenerSpec) -> Result<ListenerSpec, BindError> {
    let mut spec = spec.clone();
    if let Address::Unix { name: address::UnixName::Path(path), .. } = &mut spec.address {
        match std::path::absolute(&*path) {
            Ok(absolute) => *path = absolute,
            Err(source) => return Err(error(&spec, Why::System { step: "finding the working directory", source })),
        }
    }
    Ok(spec)
}

fn error(spec: &ListenerSpec, why: Why) -> BindError {
    BindError { listener: spec.name.clone(), address: spec.address.to_string(), why }
}

/// Whether a socket is what was asked for. Without IPv6, every address is every IPv4 address.
fn meets(wanted: &Address, bound: &Address) -> bool {
    let v4_for_any = || match (wanted, bound) {
        (Address::Inet { transport, host: Host::Any, port }, Address::Inet { .. }) => {
            let v4 = Address::Inet { transport: *transport, host: Host::V4([0; 4].into()), port: *port };
            v4.is_met_by(bound) && Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).is_err()
        }
        _ => false,
    };
    wanted.is_met_by(bound) || v4_for_any()
}

/// The queue limit of a socket that somebody else made, so that it is not shrunk.
fn backlog_of(fd: &OwnedFd, bound: &Address) -> Option<i32> {
    let found = match bound {
        Address::Inet { .. } if bound.takes_connections() => tcp_backlog(fd).ok(),
        // The kernel does not say; it caps what is asked for.
        Address::Unix { .. } if bound.takes_connections() => Some(u32::MAX),
        Address::Inet { .. } | Address::Unix { .. } => None,
    };
    found.filter(|backlog| *backlog > 0).map(|backlog| i32::try_from(backlog).unwrap_or(i32::MAX))
}

#[cfg(test)]
mod tests;
