//! Which group a socket is in: what the kernel compares when a socket joins one (`inet_reuseport_add_sock`,
//! `udp_reuseport_add_sock`).

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use socket2::{Domain, SockRef, Type};

use super::program::{Draw, Family};
use crate::sys::steer::network_namespace;

/// What has ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Protocol {
    /// TCP, and Multipath TCP, which listens with a socket of TCP. A group forms with listen(2).
    Tcp,
    /// UDP. A group forms with bind(2).
    Udp,
}

/// What the sockets of a group have in common. The one thing more, that their user is the same (`fchown(2)` gives a socket
/// another one), the kernel asks for at bind(2) already.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    protocol: Protocol,
    local: SocketAddr,
    v6only: bool,
    /// Index of the network interface that it is bound to; 0 for all.
    device: u32,
    /// Number of its network namespace; 0 where Linux does not tell.
    namespace: u64,
}

impl Key {
    /// The group of a socket. None when it is neither TCP nor UDP, or has no port yet.
    pub fn of(socket: impl AsFd) -> io::Result<Option<Key>> {
        let namespace = network_namespace(&socket);
        let socket = SockRef::from(&socket);
        let protocol = match (socket.domain()?, socket.r#type()?) {
            (Domain::IPV4 | Domain::IPV6, Type::STREAM) => Protocol::Tcp,
            (Domain::IPV4 | Domain::IPV6, Type::DGRAM) => Protocol::Udp,
            _ => return Ok(None),
        };
        let Some(mut local) = socket.local_addr()?.as_socket() else { return Ok(None) };
        if local.port() == 0 {
            return Ok(None);
        }
        let v6only = match &mut local {
            SocketAddr::V4(_) => false,
            SocketAddr::V6(address) => {
                address.set_flowinfo(0);
                socket.only_v6()?
            }
        };
        let device = match local {
            SocketAddr::V4(_) => socket.device_index_v4(),
            SocketAddr::V6(_) => socket.device_index_v6(),
        };
        let namespace = match namespace {
            Err(error) if error.raw_os_error() == Some(Errno::ENOPROTOOPT as i32) => 0,
            other => other?,
        };
        Ok(Some(Key { protocol, local, v6only, device: device?.map_or(0, Into::into), namespace }))
    }

    /// What it speaks.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Where it is.
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// Whether connections to this address may arrive there.
    #[must_use]
    pub fn takes(&self, to: SocketAddr) -> bool {
        let (own, ip) = (self.local.ip().to_canonical(), to.ip().to_canonical());
        let here =
            own == ip || own.is_unspecified() && (own.is_ipv4() == ip.is_ipv4() || own.is_ipv6() && !self.v6only);
        here && self.protocol == Protocol::Tcp && self.local.port() == to.port()
    }

    /// What reaches it.
    pub(super) fn family(&self) -> Family {
        match self.local.ip() {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => Family::V4,
            IpAddr::V6(ip) if ip.is_unspecified() && !self.v6only => Family::Both,
            IpAddr::V6(_) => Family::V6,
        }
    }

    /// How one of many is chosen there.
    pub(super) fn draw(&self) -> Draw {
        match self.protocol {
            Protocol::Tcp => Draw::Random,
            Protocol::Udp => Draw::Sender,
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.protocol {
            Protocol::Tcp => write!(f, "tcp:{}", self.local),
            Protocol::Udp => write!(f, "udp:{}", self.local),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::Socket;
    use std::os::unix::net::UnixDatagram;

    fn bound(kind: Type, address: &str, v6only: bool) -> Socket {
        let address: SocketAddr = address.parse().unwrap();
        let socket = Socket::new(Domain::for_address(address), kind, None).unwrap();
        socket.set_reuse_port(true).unwrap();
        if address.is_ipv6() {
            socket.set_only_v6(v6only).unwrap();
        }
        socket.bind(&address.into()).unwrap();
        socket
    }

    fn key(socket: &Socket) -> Key {
        Key::of(socket).unwrap().unwrap()
    }

    #[test]
    fn sockets_without_a_port_are_in_no_group() {
        assert_eq!(Key::of(UnixDatagram::unbound().unwrap()).unwrap(), None);
        assert_eq!(Key::of(Socket::new(Domain::IPV6, Type::STREAM, None).unwrap()).unwrap(), None);
        assert!(Key::of(std::io::pipe().unwrap().0).is_err());
    }

    #[test]
    fn a_second_socket_has_the_same_key_and_any_difference_tells() {
        let first = bound(Type::STREAM, "[::]:0", true);
        let port = key(&first).local().port();
        assert_eq!(key(&first), key(&bound(Type::STREAM, &format!("[::]:{port}"), true)));
        let v4 = bound(Type::STREAM, &format!("0.0.0.0:{port}"), false);
        assert_ne!(key(&first), key(&v4));
        let here = bound(Type::STREAM, &format!("127.0.0.1:{port}"), false);
        assert_ne!(key(&v4), key(&here));
        let both = bound(Type::DGRAM, "[::]:0", false);
        let v6only = bound(Type::DGRAM, &format!("[::]:{}", key(&both).local().port()), true);
        assert_ne!(key(&both), key(&v6only));
        assert_eq!(key(&v4).to_string(), format!("tcp:0.0.0.0:{port}"));
    }

    #[test]
    fn the_network_interface_counts() {
        let anywhere = bound(Type::STREAM, "127.0.0.1:0", false);
        let before = key(&anywhere);
        match anywhere.bind_device(Some(b"lo")) {
            Ok(()) => assert_ne!(key(&anywhere), before),
            Err(error) => eprintln!("not checked: {error}"),
        }
    }

    #[test]
    fn a_socket_given_to_another_user_joins_that_users_group() {
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("not checked: only root gives sockets away");
        }
        let nobody = Some(nix::unistd::Uid::from_raw(65534));
        let first = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        first.set_reuse_port(true).unwrap();
        nix::unistd::fchown(&first, nobody, None).unwrap();
        first.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
        let second = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        second.set_reuse_port(true).unwrap();
        let address = first.local_addr().unwrap();
        assert_eq!(second.bind(&address).unwrap_err().raw_os_error(), Some(Errno::EADDRINUSE as i32));
        nix::unistd::fchown(&second, nobody, None).unwrap();
        second.bind(&address).unwrap();
        first.listen(1).unwrap();
        second.listen(1).unwrap();
    }

    #[test]
    fn what_a_socket_takes() {
        let takes = |own: &str, v6only, to: &str| {
            let key = key(&bound(Type::STREAM, own, v6only));
            key.takes(SocketAddr::new(to.parse().unwrap(), key.local().port()))
        };
        assert!(takes("127.0.0.1:0", false, "127.0.0.1") && !takes("127.0.0.1:0", false, "127.0.0.2"));
        assert!(takes("0.0.0.0:0", false, "127.0.0.1") && !takes("0.0.0.0:0", false, "::1"));
        assert!(takes("[::]:0", false, "127.0.0.1") && !takes("[::]:0", true, "127.0.0.1"));
        assert!(takes("[::]:0", true, "::1") && takes("[::ffff:127.0.0.1]:0", false, "127.0.0.1"));
        let key = key(&bound(Type::STREAM, "127.0.0.1:0", false));
        assert!(!key.takes("127.0.0.1:1".parse().unwrap()));
    }

    #[test]
    fn what_reaches_a_socket() {
        let family = |address, v6only| key(&bound(Type::STREAM, address, v6only)).family();
        assert_eq!(family("127.0.0.1:0", false), Family::V4);
        assert_eq!(family("[::ffff:127.0.0.1]:0", false), Family::V4);
        assert_eq!(family("[::1]:0", false), Family::V6);
        assert_eq!(family("[::]:0", true), Family::V6);
        assert_eq!(family("[::]:0", false), Family::Both);
    }
}
