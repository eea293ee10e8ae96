//! What was passed, by name, as the type that is asked for.

use std::io;
use std::net;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net as unix;

use nix::sys::socket::{getsockname, getsockopt, sockopt, AddressFamily, SockType, SockaddrLike, SockaddrStorage};
use nix::sys::stat::fstat;

use super::drain::Draining;
use super::ServiceError;
use crate::proto::listen_fds::UNNAMED;

/// The names that zddsup and systemd give to what has no name of its own.
const NO_NAMES: [&str; 2] = ["listener", UNNAMED];

/// Listeners, and whatever else was passed, until somebody takes them.
#[derive(Debug, Default)]
pub(super) struct Passed {
    fds: Vec<(String, OwnedFd)>,
    count: usize,
    unnamed: usize,
}

impl Passed {
    /// Adds what is not there yet: with both protocols in use, the same sockets come by both.
    pub(super) fn add(&mut self, fds: Vec<(String, OwnedFd)>) {
        for (name, fd) in fds {
            if !self.fds.iter().any(|(_, known)| is_same_socket(known, &fd)) {
                self.count += 1;
                self.unnamed += usize::from(NO_NAMES.contains(&name.as_str()));
                self.fds.push((name, fd));
            }
        }
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.fds.iter().map(|(name, _)| name.clone()).collect()
    }

    /// The first of that name. None when nothing was passed at all.
    pub(super) fn take<L: Listen>(&mut self, name: &str) -> Result<Option<L>, ServiceError> {
        if self.count == 0 {
            return Ok(None);
        }
        let is_meant = |(passed, _): &(String, OwnedFd)| {
            passed == name || self.unnamed == 1 && NO_NAMES.contains(&passed.as_str())
        };
        let Some(at) = self.fds.iter().position(is_meant) else {
            return Err(ServiceError::Missing { name: name.to_owned(), passed: self.names() });
        };
        let found = describe(&self.fds[at].1);
        if !L::is_type(found) {
            let found = found.to_string();
            return Err(ServiceError::WrongType { name: name.to_owned(), found, wanted: L::TYPE });
        }
        let (_, fd) = self.fds.remove(at);
        L::from_fd(fd).map(Some).map_err(ServiceError::io("use the listener that was passed"))
    }
}

fn is_same_socket(one: &OwnedFd, other: &OwnedFd) -> bool {
    // Sockets have an inode each; files of other kinds are what they are.
    describe(one).is_socket()
        && matches!((fstat(one), fstat(other)), (Ok(one), Ok(other)) if (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino))
}

/// What kind of file something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    family: Option<AddressFamily>,
    socket: Option<SockType>,
    listens: bool,
}

impl Kind {
    fn is_socket(self) -> bool {
        self.socket.is_some()
    }

    fn is_inet(self) -> bool {
        matches!(self.family, Some(AddressFamily::Inet | AddressFamily::Inet6))
    }

    fn is_unix(self) -> bool {
        self.family == Some(AddressFamily::Unix)
    }

    fn accepts(self) -> bool {
        self.socket == Some(SockType::Stream) && self.listens
    }

    fn is_datagram(self) -> bool {
        self.socket == Some(SockType::Datagram)
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some(socket) = self.socket else { return f.write_str("no socket") };
        let family = match self.family {
            Some(AddressFamily::Inet | AddressFamily::Inet6) => "an Internet",
            Some(AddressFamily::Unix) => "a Unix",
            _ => "another",
        };
        let socket = match (socket, self.listens) {
            (SockType::Stream, true) => "stream listener",
            (SockType::Stream, false) => "stream socket that does not listen",
            (SockType::Datagram, _) => "datagram socket",
            _ => "socket of another type",
        };
        write!(f, "{family} {socket}")
    }
}

fn describe(fd: &OwnedFd) -> Kind {
    Kind {
        family: getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok().and_then(|address| address.family()),
        socket: getsockopt(fd, sockopt::SockType).ok(),
        listens: getsockopt(fd, sockopt::AcceptConn).unwrap_or(false),
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A type that a listener can be taken as: those of std and of tokio (within a runtime), and `OwnedFd` for anything.
///
/// Those of tokio make the socket non-blocking. Those of std leave it as it is: whether it blocks is the same for all
/// generations, and so another one may have changed it. [`super::Service::accept`] works either way.
pub trait Listen: Sized + sealed::Sealed {
    /// What it is, for errors.
    #[doc(hidden)]
    const TYPE: &'static str;
    #[doc(hidden)]
    fn is_type(kind: Kind) -> bool;
    #[doc(hidden)]
    fn from_fd(fd: OwnedFd) -> io::Result<Self>;
    #[doc(hidden)]
    fn bind(address: &str) -> io::Result<Self>;
}

macro_rules! std_type {
    ($type:ty, $name:literal, $is_type:expr) => {
        impl sealed::Sealed for $type {}
        impl Listen for $type {
            const TYPE: &'static str = $name;
            fn is_type(kind: Kind) -> bool {
                $is_type(kind)
            }
            fn from_fd(fd: OwnedFd) -> io::Result<Self> {
                Ok(fd.into())
            }
            fn bind(address: &str) -> io::Result<Self> {
                <$type>::bind(address)
            }
        }
    };
}

macro_rules! tokio_type {
    ($type:ty, $std:ty) => {
        impl sealed::Sealed for $type {}
        impl Listen for $type {
            const TYPE: &'static str = <$std>::TYPE;
            fn is_type(kind: Kind) -> bool {
                <$std>::is_type(kind)
            }
            fn from_fd(fd: OwnedFd) -> io::Result<Self> {
                let socket = <$std>::from(fd);
                socket.set_nonblocking(true)?;
                <$type>::from_std(socket)
            }
            fn bind(address: &str) -> io::Result<Self> {
                let socket = <$std>::bind(address)?;
                socket.set_nonblocking(true)?;
                <$type>::from_std(socket)
            }
        }
    };
}

std_type!(net::TcpListener, "a TCP listener", |kind: Kind| kind.is_inet() && kind.accepts());
std_type!(net::UdpSocket, "a UDP socket", |kind: Kind| kind.is_inet() && kind.is_datagram());
std_type!(unix::UnixListener, "a Unix stream listener", |kind: Kind| kind.is_unix() && kind.accepts());
std_type!(unix::UnixDatagram, "a Unix datagram socket", |kind: Kind| kind.is_unix() && kind.is_datagram());
tokio_type!(tokio::net::TcpListener, net::TcpListener);
tokio_type!(tokio::net::UdpSocket, net::UdpSocket);
tokio_type!(tokio::net::UnixListener, unix::UnixListener);
tokio_type!(tokio::net::UnixDatagram, unix::UnixDatagram);

impl sealed::Sealed for OwnedFd {}
impl Listen for OwnedFd {
    const TYPE: &'static str = "a file";
    fn is_type(_: Kind) -> bool {
        true
    }
    fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        Ok(fd)
    }
    fn bind(address: &str) -> io::Result<Self> {
        net::TcpListener::bind(address).map(OwnedFd::from)
    }
}

/// A listener of std that connections come from.
pub trait Accept: AsFd + sealed::Sealed {
    /// A connection, and where it comes from.
    type Accepted;
    #[doc(hidden)]
    fn accept_now(&self) -> io::Result<Self::Accepted>;
    #[doc(hidden)]
    fn never_block(&self) -> io::Result<()>;
}

macro_rules! accept_type {
    ($listener:ty, $stream:ty, $address:ty) => {
        impl Accept for $listener {
            type Accepted = ($stream, $address);
            fn accept_now(&self) -> io::Result<Self::Accepted> {
                self.accept()
            }
            fn never_block(&self) -> io::Result<()> {
                self.set_nonblocking(true)
            }
        }
    };
}

accept_type!(net::TcpListener, net::TcpStream, net::SocketAddr);
accept_type!(unix::UnixListener, unix::UnixStream, unix::SocketAddr);

pub(super) fn accept<L: Accept>(listener: &L, draining: &Draining) -> io::Result<Option<L::Accepted>> {
    listener.never_block()?;
    while draining.readable_before(listener.as_fd())? {
        match listener.accept_now() {
            Ok(accepted) => return Ok(Some(accepted)),
            // Another generation had it, or its client was gone before it was taken.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}
