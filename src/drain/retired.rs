//! A socket that nothing new is steered to, until what it had before is gone: closing it earlier resets connections that the
//! kernel has accepted for it.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};
use socket2::{SockRef, Type};

use super::diag;
use crate::sys::socket::{is_readable, queue_length};

/// When the program was replaced, a SYN may have been on its way through the one before: it is there at the second look.
const LOOKS_THAT_LEARN: u32 = 2;

/// A socket that has been switched away from.
#[derive(Debug, Serialize, Deserialize)]
pub struct Retired {
    #[serde(with = "crate::state::fds::shared")]
    socket: Arc<OwnedFd>,
    local: SocketAddr,
    stream: bool,
    /// The other ends of handshakes that may be this socket's. Those that began later are others', and are not waited for:
    /// on a busy address some are there at all times.
    half_open: HashSet<SocketAddr>,
    looks: u32,
}

/// What a retired socket still has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    /// Connections in its queue. One for all datagrams that wait.
    pub queued: u32,
    /// Handshakes that may end in its queue.
    pub half_open: u32,
}

impl Left {
    /// Whether it may be closed.
    #[must_use]
    pub fn is_nothing(self) -> bool {
        self == Left { queued: 0, half_open: 0 }
    }
}

impl Retired {
    /// A TCP or UDP socket to which nothing is steered any more.
    pub fn new(socket: Arc<OwnedFd>) -> io::Result<Retired> {
        let asked = SockRef::from(&*socket);
        let (local, stream) = (asked.local_addr()?.as_socket(), asked.r#type()? == Type::STREAM);
        let local = local.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(Retired { socket, local, stream, half_open: HashSet::new(), looks: 0 })
    }

    /// The socket.
    #[must_use]
    pub fn socket(&self) -> &Arc<OwnedFd> {
        &self.socket
    }

    /// Its inode in sockfs.
    pub fn inode(&self) -> io::Result<u64> {
        Ok(fstat(&*self.socket)?.st_ino)
    }

    /// What it still has. Only the second look, some milliseconds after the first, may find that it is nothing.
    pub fn look(&mut self) -> io::Result<Left> {
        if !self.stream {
            return Ok(Left { queued: is_readable(&*self.socket)?.into(), half_open: 0 });
        }
        // Before the queue: a handshake that ends meanwhile is in the one or the other.
        let mut now = HashSet::new();
        if self.looks < LOOKS_THAT_LEARN || !self.half_open.is_empty() {
            diag::half_open(&[self.local], |half| {
                now.insert(half.remote);
            })?;
        }
        if self.looks < LOOKS_THAT_LEARN {
            self.half_open = now;
            self.looks += 1;
        } else {
            self.half_open.retain(|remote| now.contains(remote));
        }
        let unlearned = u32::from(self.looks < LOOKS_THAT_LEARN);
        // One that was shut down has no queue.
        let queued = queue_length(&*self.socket)?.unwrap_or(0);
        Ok(Left { queued, half_open: u32::try_from(self.half_open.len()).unwrap_or(u32::MAX).max(unlearned) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::socket::set_defer_accept;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream, UdpSocket};

    const NOTHING: Left = Left { queued: 0, half_open: 0 };

    #[test]
    fn a_handshake_and_then_the_queue_are_waited_for_and_new_ones_are_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        set_defer_accept(&listener, 60).unwrap();
        let connect = || TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut early = connect();
        let mut retired = Retired::new(Arc::new(listener.try_clone().unwrap().into())).unwrap();
        assert_eq!(retired.look().unwrap(), Left { queued: 0, half_open: 1 });
        assert_eq!(retired.look().unwrap(), Left { queued: 0, half_open: 1 });
        let _others = [connect(), connect()];
        assert_eq!(retired.look().unwrap(), Left { queued: 0, half_open: 1 });
        early.write_all(b"x").unwrap();
        while !is_readable(&listener).unwrap() {}
        assert_eq!(retired.look().unwrap(), Left { queued: 1, half_open: 0 });
        let _accepted = listener.accept().unwrap();
        assert!(retired.look().unwrap().is_nothing());
    }

    #[test]
    fn the_first_look_is_never_the_last() {
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let mut retired = Retired::new(Arc::new(listener.into())).unwrap();
        assert!(!retired.look().unwrap().is_nothing());
        assert_eq!(retired.look().unwrap(), NOTHING);
        SockRef::from(&**retired.socket()).shutdown(std::net::Shutdown::Read).unwrap();
        assert_eq!(retired.look().unwrap(), NOTHING);
    }

    #[test]
    fn datagrams_are_waited_for() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut retired = Retired::new(Arc::new(socket.try_clone().unwrap().into())).unwrap();
        assert_eq!(retired.look().unwrap(), NOTHING);
        socket.send_to(b"", socket.local_addr().unwrap()).unwrap();
        assert_eq!(retired.look().unwrap(), Left { queued: 1, half_open: 0 });
        socket.recv_from(&mut [0; 1]).unwrap();
        assert_eq!(retired.look().unwrap(), NOTHING);
        let (stream, _) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Retired::new(Arc::new(stream.into())).is_err());
    }
}
