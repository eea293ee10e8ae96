//! A generation's own `NOTIFY_SOCKET` (`sd_notify(3)`).
//!
//! It is an abstract socket: a service in another directory tree or under another user reaches it, and no file is left
//! behind. Anybody on the machine can send to it, so each datagram carries its sender's credentials, from the kernel.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{bind, getsockname, setsockopt, socket, sockopt, AddressFamily, SockFlag, SockType, UnixAddr};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tokio::io::Interest;

use crate::proto::notify::{parse, Field, NotifyError, MAX_LEN};
use crate::state::fds;
use crate::sys::readiness::Awaited;
use crate::sys::scm::{self, Credentials};

/// Where a generation says READY=1. Gone when dropped.
#[derive(Debug)]
pub struct NotifySocket {
    socket: Awaited<OwnedFd>,
    name: String,
}

/// A socket that outlives execve(2).
#[derive(Deserialize)]
struct Held {
    #[serde(deserialize_with = "fds::owned::deserialize")]
    socket: OwnedFd,
    name: String,
}

#[derive(Serialize)]
struct Lent<'a> {
    #[serde(serialize_with = "fds::owned::serialize")]
    socket: &'a OwnedFd,
    name: &'a str,
}

impl Serialize for NotifySocket {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        Lent { socket: self.socket.get_ref(), name: &self.name }.serialize(to)
    }
}

impl<'de> Deserialize<'de> for NotifySocket {
    /// Within a runtime only.
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let Held { socket, name } = Held::deserialize(from)?;
        Ok(NotifySocket { socket: Awaited::new(socket, Interest::READABLE).map_err(D::Error::custom)?, name })
    }
}

/// Something that was sent to it.
#[derive(Debug)]
pub struct Datagram {
    /// Who sent it, says the kernel.
    pub sender: Credentials,
    /// What it says, or why it says nothing.
    pub fields: Result<Vec<Field>, NotifyError>,
    /// Open files that came with it.
    pub fds: Vec<OwnedFd>,
}

impl NotifySocket {
    /// A new one, with a name that cannot be guessed. Within a runtime only.
    pub fn new() -> io::Result<Self> {
        let name = format!("zddsup/{}/{:032x}", std::process::id(), fastrand::u128(..));
        let fd = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&fd, sockopt::PassCred, &true)?;
        bind(fd.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
        Ok(NotifySocket { socket: Awaited::new(fd, Interest::READABLE)?, name })
    }

    /// One that a supervisor before this one made. Within a runtime only.
    pub fn found(fd: OwnedFd) -> io::Result<Self> {
        let address: UnixAddr = getsockname(fd.as_raw_fd())?;
        let name = address.as_abstract().and_then(|name| std::str::from_utf8(name).ok());
        let name = name.ok_or_else(|| io::Error::other("it is no notify socket"))?.to_owned();
        Ok(NotifySocket { socket: Awaited::new(fd, Interest::READABLE)?, name })
    }

    /// Its address, as `NOTIFY_SOCKET` has it.
    #[must_use]
    pub fn address(&self) -> String {
        format!("@{}", self.name)
    }

    /// The next datagram, if one is there.
    pub fn try_recv(&self) -> io::Result<Option<Datagram>> {
        let mut buffer = [0; MAX_LEN + 1];
        loop {
            let Some(received) = scm::receive(self.socket.get_ref().as_fd(), &mut buffer)? else { return Ok(None) };
            // The kernel adds them to every datagram; one without is from nobody.
            let Some(sender) = received.credentials else { continue };
            let fields = match parse(&buffer[..received.len]) {
                Ok(_) if received.truncated => Err(NotifyError::LostFds),
                parsed => parsed,
            };
            return Ok(Some(Datagram { sender, fields, fds: received.fds }));
        }
    }

    /// The next datagram.
    pub async fn recv(&self) -> io::Result<Datagram> {
        loop {
            let mut ready = self.socket.readable().await?;
            match self.try_recv()? {
                Some(datagram) => return Ok(datagram),
                None => ready.clear_ready(),
            }
        }
    }
}

impl AsFd for NotifySocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};

    fn sender(to: &NotifySocket) -> UnixDatagram {
        let socket = UnixDatagram::unbound().unwrap();
        let name = to.address();
        socket.connect_addr(&SocketAddr::from_abstract_name(&name.as_bytes()[1..]).unwrap()).unwrap();
        socket
    }

    fn open_fds() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_datagram_comes_with_its_sender() {
        let socket = NotifySocket::new().unwrap();
        sender(&socket).send(b"READY=1\nSTATUS=well").unwrap();
        let datagram = socket.recv().await.unwrap();
        assert_eq!(datagram.sender.pid, i32::try_from(std::process::id()).unwrap());
        assert_eq!(datagram.fields.unwrap(), [Field::Ready, Field::Status("well".to_owned())]);
        assert!(socket.try_recv().unwrap().is_none());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_next_supervisor_hears_what_was_said_meanwhile() {
        let first = NotifySocket::new().unwrap();
        let (address, kept) = (first.address(), first.as_fd().try_clone_to_owned().unwrap());
        drop(first);
        let second = NotifySocket::found(kept).unwrap();
        assert_eq!(second.address(), address);
        sender(&second).send(b"READY=1").unwrap();
        assert_eq!(second.recv().await.unwrap().fields.unwrap(), [Field::Ready]);
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        assert!(NotifySocket::found(pipe).is_err());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_is_too_long_or_no_text_is_an_error_and_the_next_one_is_heard() {
        let socket = NotifySocket::new().unwrap();
        let from = sender(&socket);
        from.send(&vec![b'x'; 100_000]).unwrap();
        from.send(b"\xff\xfe=1").unwrap();
        from.send(b"READY=1").unwrap();
        assert_eq!(socket.recv().await.unwrap().fields, Err(NotifyError::TooLong));
        assert!(socket.recv().await.unwrap().fields.is_err());
        assert_eq!(socket.recv().await.unwrap().fields.unwrap(), [Field::Ready]);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn fds_that_nobody_asked_for_are_closed() {
        let socket = NotifySocket::new().unwrap();
        let from = sender(&socket);
        let (read, _write) = nix::unistd::pipe().unwrap();
        let many: Vec<_> = (0..253).map(|_| read.as_fd()).collect();
        for _ in 0..20 {
            scm::send(from.as_fd(), b"STATUS=take these", &many).unwrap();
            assert_eq!(socket.recv().await.unwrap().fds.len(), 253);
        }
        assert!(open_fds() < 253, "{} fds are open", open_fds());
    }
}
