//! Where a service listens, in words.
//!
//! ```text
//! 8080  :8080  tcp://:8080            every address, IPv4 and IPv6
//! 127.0.0.1:8080  tcp://[::1]:8080    one address; [fe80::1%eth0]:80 with its interface
//! udp://:53
//! /run/web.sock  unix:///run/web.sock a path; unix:web.sock is relative
//! unix:@web  unix://@web              an abstract name
//! unixgram://…  unixpacket://…        the same for datagrams and sequenced packets
//! ```
//! Bytes with a meaning of their own are written `%3F`.

use std::ffi::OsStr;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use percent_encoding::{percent_decode_str, percent_encode, AsciiSet, CONTROLS};

/// What may not stand for itself in a path or an option's value.
pub(super) const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'%').add(b'?').add(b'#').add(b'&').add(b'"');

/// Bytes that fit into a `sockaddr_un` beside the NUL that ends a path, or begins an abstract name.
const UNIX_MOST: usize = 107;

/// Where a service listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// Over IP.
    Inet {
        /// How.
        transport: Transport,
        /// On which address.
        host: Host,
        /// On which port; 0 lets the kernel choose.
        port: u16,
    },
    /// On this machine.
    Unix {
        /// How.
        kind: UnixKind,
        /// By which name.
        name: UnixName,
    },
}

/// Protocol above IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// Which addresses of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// All, IPv4 and IPv6 in one socket.
    Any,
    /// An IPv4 address, or all with 0.0.0.0.
    V4(Ipv4Addr),
    /// An IPv6 address, or all with `[::]`.
    V6 {
        /// The address.
        ip: Ipv6Addr,
        /// Interface of a link-local one: name or number.
        zone: Option<String>,
    },
}

/// Kind of a Unix socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnixKind {
    /// `SOCK_STREAM`.
    Stream,
    /// `SOCK_DGRAM`.
    Datagram,
    /// `SOCK_SEQPACKET`.
    Seqpacket,
}

/// Name of a Unix socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UnixName {
    /// In the file system.
    Path(PathBuf),
    /// In the network namespace, without a file.
    Abstract(Vec<u8>),
}

/// Why a text is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Not one of ours.
    #[error("{0:?} is no kind of socket; known are tcp, udp, unix, unixgram, unixpacket")]
    Scheme(String),
    /// No number from 0 to 65535.
    #[error("{0:?} is no port; a port is a number from 0 to 65535")]
    Port(String),
    /// Nothing but an address.
    #[error("a port is missing: {0}:8080, for example")]
    NoPort(String),
    /// A name, or nonsense.
    #[error(
        "{0:?} is no IP address; names are not looked up: localhost is 127.0.0.1 or [::1], every address is :PORT"
    )]
    Ip(String),
    /// `::1:80` has two readings.
    #[error("an IPv6 address stands in brackets: [::1]:8080, for example")]
    Brackets,
    /// `unix://run/web.sock`
    #[error("a path after unix:// begins with a slash (three in all): unix:///{0}; a relative one is unix:{0}")]
    Slash(String),
    /// No name, or one that names a directory.
    #[error("the path of a Unix socket is missing")]
    NoPath,
    /// NUL ends a path.
    #[error("the path of a Unix socket has a NUL byte")]
    Nul,
    /// Longer than the kernel's structure.
    #[error("the name of a Unix socket has {0} bytes; the kernel takes {UNIX_MOST}")]
    Long(usize),
    /// Nothing.
    #[error("the address is missing")]
    Empty,
}

impl Address {
    /// Whether connections are made to it, and wait in a queue.
    #[must_use]
    pub fn takes_connections(&self) -> bool {
        match self {
            Address::Inet { transport, .. } => *transport == Transport::Tcp,
            Address::Unix { kind, .. } => *kind != UnixKind::Datagram,
        }
    }

    /// Path in the file system, if it has one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Address::Unix { name: UnixName::Path(path), .. } => Some(path),
            Address::Unix { name: UnixName::Abstract(_), .. } | Address::Inet { .. } => None,
        }
    }

    /// Whether it is one of IPv6.
    #[must_use]
    pub fn is_v6(&self) -> bool {
        matches!(self, Address::Inet { host: Host::Any | Host::V6 { .. }, .. })
    }

    /// Whether it is of TCP.
    #[must_use]
    pub fn is_tcp(&self) -> bool {
        matches!(self, Address::Inet { transport: Transport::Tcp, .. })
    }

    /// Whether the kernel chooses the port.
    #[must_use]
    pub fn has_any_port(&self) -> bool {
        matches!(self, Address::Inet { port: 0, .. })
    }

    /// Whether a socket bound to `bound` is what this asks for.
    #[must_use]
    pub fn is_met_by(&self, bound: &Address) -> bool {
        match (self, bound) {
            (
                Address::Inet { transport, host, port },
                Address::Inet { transport: bound_transport, host: bound_host, port: bound_port },
            ) => {
                let same_host = match (host, bound_host) {
                    // Whether a [::] takes IPv4 too is the system's choice where nothing was said.
                    (host, bound) if host.is_any_v6() && bound.is_any_v6() => true,
                    (Host::V6 { ip, .. }, Host::V6 { ip: bound, .. }) => ip == bound,
                    (host, bound) => host == bound,
                };
                transport == bound_transport && same_host && (*port == 0 || port == bound_port)
            }
            (wanted, bound) => wanted == bound,
        }
    }

    /// Whether a client of `ip` and `port` may end up at this TCP address.
    #[must_use]
    pub fn may_answer(&self, ip: IpAddr, port: u16) -> bool {
        let Address::Inet { transport: Transport::Tcp, host, port: own } = self else { return false };
        let ip = ip.to_canonical();
        let same_host = match (host, ip) {
            (Host::Any, _) => true,
            (Host::V4(own), IpAddr::V4(ip)) => own.is_unspecified() || ip.is_unspecified() || *own == ip,
            (Host::V4(own), IpAddr::V6(ip)) => own.is_unspecified() && ip.is_unspecified(),
            // It may take IPv4 as well.
            (Host::V6 { ip: own, .. }, IpAddr::V4(_)) => own.is_unspecified(),
            (Host::V6 { ip: own, .. }, IpAddr::V6(ip)) => own.is_unspecified() || ip.is_unspecified() || *own == ip,
        };
        *own == port && same_host
    }
}

impl Host {
    fn is_any_v6(&self) -> bool {
        match self {
            Host::Any => true,
            Host::V6 { ip, .. } => ip.is_unspecified(),
            Host::V4(_) => false,
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Err(AddressError::Empty);
        }
        if text.starts_with('/') || text.starts_with('@') {
            return unix(UnixKind::Stream, text);
        }
        for (scheme, kind) in
            [("unix:", UnixKind::Stream), ("unixgram:", UnixKind::Datagram), ("unixpacket:", UnixKind::Seqpacket)]
        {
            let Some(rest) = text.strip_prefix(scheme) else { continue };
            return match rest.strip_prefix("//") {
                Some(rest) if rest.is_empty() || rest.starts_with('/') || rest.starts_with('@') => unix(kind, rest),
                Some(rest) => Err(AddressError::Slash(rest.to_owned())),
                None => unix(kind, rest),
            };
        }
        match text.split_once("://") {
            Some(("tcp", rest)) => inet(Transport::Tcp, rest),
            Some(("udp", rest)) => inet(Transport::Udp, rest),
            Some((scheme, _)) => Err(AddressError::Scheme(scheme.to_owned())),
            None => inet(Transport::Tcp, text),
        }
    }
}

fn unix(kind: UnixKind, text: &str) -> Result<Address, AddressError> {
    let bytes: Vec<u8> = percent_decode_str(text).collect();
    let (name, length) = if text.starts_with('@') {
        (UnixName::Abstract(bytes[1..].to_vec()), bytes.len() - 1)
    } else if bytes.contains(&0) {
        return Err(AddressError::Nul);
    } else {
        (UnixName::Path(PathBuf::from(OsStr::from_bytes(&bytes))), bytes.len())
    };
    match length {
        0 => Err(AddressError::NoPath),
        _ if bytes.ends_with(b"/") && matches!(name, UnixName::Path(_)) => Err(AddressError::NoPath),
        1..=UNIX_MOST => Ok(Address::Unix { kind, name }),
        _ => Err(AddressError::Long(length)),
    }
}

fn inet(transport: Transport, text: &str) -> Result<Address, AddressError> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (inside, after) = rest.split_once(']').ok_or(AddressError::Brackets)?;
            let port = after.strip_prefix(':').ok_or_else(|| AddressError::NoPort(format!("[{inside}]")))?;
            (host_v6(inside)?, port)
        }
        None => match text.split_once(':') {
            Some((_, port)) if port.contains(':') => return Err(AddressError::Brackets),
            Some(("" | "*", port)) => (Host::Any, port),
            Some((ip, port)) => (Host::V4(ip.parse().map_err(|_| AddressError::Ip(ip.to_owned()))?), port),
            None if text.parse::<Ipv4Addr>().is_ok() => return Err(AddressError::NoPort(text.to_owned())),
            None => (Host::Any, text),
        },
    };
    // A leading + would be taken by the standard library.
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|_| digits).ok_or_else(|| AddressError::Port(port.to_owned()))?;
    Ok(Address::Inet { transport, host, port })
}

fn host_v6(text: &str) -> Result<Host, AddressError> {
    let (ip, zone) = match text.split_once('%') {
        Some((ip, zone)) => (ip, Some(zone)),
        None => (text, None),
    };
    let bad = || AddressError::Ip(text.to_owned());
    let zone_is_name = |zone: &str| {
        !zone.is_empty() && zone.bytes().all(|byte| byte.is_ascii_graphic() && !b"/?%&#[]".contains(&byte))
    };
    if !zone.is_none_or(zone_is_name) {
        return Err(bad());
    }
    Ok(Host::V6 { ip: ip.parse().map_err(|_| bad())?, zone: zone.map(str::to_owned) })
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Inet { transport, host, port } => {
                let scheme = match transport {
                    Transport::Tcp => "tcp",
                    Transport::Udp => "udp",
                };
                write!(f, "{scheme}://{host}:{port}")
            }
            Address::Unix { kind, name } => {
                let scheme = match kind {
                    UnixKind::Stream => "unix",
                    UnixKind::Datagram => "unixgram",
                    UnixKind::Seqpacket => "unixpacket",
                };
                match name {
                    UnixName::Abstract(name) => write!(f, "{scheme}:@{}", percent_encode(name, ENCODED)),
                    UnixName::Path(path) => {
                        let slashes = if path.is_absolute() { "//" } else { "" };
                        write!(f, "{scheme}:{slashes}{}", percent_encode(path.as_os_str().as_bytes(), ENCODED))
                    }
                }
            }
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Any => Ok(()),
            Host::V4(ip) => write!(f, "{ip}"),
            Host::V6 { ip, zone: None } => write!(f, "[{ip}]"),
            Host::V6 { ip, zone: Some(zone) } => write!(f, "[{ip}%{zone}]"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shown(text: &str) -> String {
        text.parse::<Address>().unwrap().to_string()
    }

    #[test]
    fn every_form_has_one_meaning() {
        for (text, meaning) in [
            ("8080", "tcp://:8080"),
            (":8080", "tcp://:8080"),
            ("*:8080", "tcp://:8080"),
            ("tcp://:8080", "tcp://:8080"),
            ("127.0.0.1:8080", "tcp://127.0.0.1:8080"),
            ("tcp://[::1]:80", "tcp://[::1]:80"),
            ("[fe80::1%eth0]:80", "tcp://[fe80::1%eth0]:80"),
            ("udp://0.0.0.0:53", "udp://0.0.0.0:53"),
            ("/run/web.sock", "unix:///run/web.sock"),
            ("unix:/run/web.sock", "unix:///run/web.sock"),
            ("unix:///run/web.sock", "unix:///run/web.sock"),
            ("unix:web.sock", "unix:web.sock"),
            ("unix:@web", "unix:@web"),
            ("unix://@web", "unix:@web"),
            ("@web", "unix:@web"),
            ("unixgram:///run/log", "unixgram:///run/log"),
            ("unixpacket://@p", "unixpacket:@p"),
            ("unix:///run/a%3Fb", "unix:///run/a%3Fb"),
        ] {
            assert_eq!(shown(text), meaning, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_a_remedy() {
        for (text, part) in [
            ("", "missing"),
            ("localhost:80", "127.0.0.1"),
            ("::1:80", "brackets"),
            ("[::1]", "port is missing"),
            ("127.0.0.1", "127.0.0.1:8080"),
            ("65536", "65535"),
            ("+80", "no port"),
            (":", "no port"),
            ("http://:80", "unixpacket"),
            ("unix://run/web.sock", "unix:///run/web.sock"),
            ("unix://", "missing"),
            ("unix:@", "missing"),
            ("unix:///run/", "missing"),
            ("unix:///a%00b", "NUL"),
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        let long = format!("/{}", "x".repeat(UNIX_MOST));
        assert_eq!(long.parse::<Address>(), Err(AddressError::Long(108)));
        assert!(long[1..].parse::<Address>().is_err());
        assert!(format!("@{}", &long[1..]).parse::<Address>().is_ok());
    }

    #[test]
    fn a_socket_meets_what_was_asked_for() {
        let met = |wanted: &str, bound: &str| {
            wanted.parse::<Address>().unwrap().is_met_by(&bound.parse::<Address>().unwrap())
        };
        assert!(met(":80", ":80"));
        assert!(met(":80", "[::]:80"));
        assert!(met("127.0.0.1:0", "127.0.0.1:4711"));
        assert!(!met("127.0.0.1:1", "127.0.0.1:4711"));
        assert!(!met(":80", "0.0.0.0:80"));
        assert!(!met(":80", "udp://:80"));
        assert!(met("/run/a", "unix:///run/a"));
        assert!(!met("/run/a", "unixgram:///run/a"));
    }

    #[test]
    fn a_wildcard_may_answer_for_any_address() {
        let may = |own: &str, ip: &str, port| own.parse::<Address>().unwrap().may_answer(ip.parse().unwrap(), port);
        assert!(may(":80", "127.0.0.1", 80));
        assert!(may("[::]:80", "10.0.0.1", 80));
        assert!(may("0.0.0.0:80", "::ffff:10.0.0.1", 80));
        assert!(may("127.0.0.1:80", "0.0.0.0", 80));
        assert!(!may("127.0.0.1:80", "127.0.0.2", 80));
        assert!(!may(":80", "127.0.0.1", 81));
        assert!(!may("udp://:80", "127.0.0.1", 80));
    }

    fn any_address() -> impl Strategy<Value = Address> {
        let zone = proptest::option::of("[a-z0-9.:-]{1,15}");
        let host = prop_oneof![
            Just(Host::Any),
            any::<Ipv4Addr>().prop_map(Host::V4),
            (any::<Ipv6Addr>(), zone).prop_map(|(ip, zone)| Host::V6 { ip, zone }),
        ];
        let transport = prop_oneof![Just(Transport::Tcp), Just(Transport::Udp)];
        let kind = prop_oneof![Just(UnixKind::Stream), Just(UnixKind::Datagram), Just(UnixKind::Seqpacket)];
        let bytes = || proptest::collection::vec(any::<u8>(), 1..100);
        let path = bytes()
            .prop_filter("no path", |bytes| !bytes.contains(&0) && !bytes.ends_with(b"/") && !bytes.starts_with(b"@"));
        let name = prop_oneof![
            path.prop_map(|bytes| UnixName::Path(PathBuf::from(OsStr::from_bytes(&bytes)))),
            bytes().prop_map(UnixName::Abstract),
        ];
        prop_oneof![
            (transport, host, any::<u16>()).prop_map(|(transport, host, port)| Address::Inet { transport, host, port }),
            (kind, name).prop_map(|(kind, name)| Address::Unix { kind, name }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_back(address in any_address()) {
            prop_assert_eq!(address.to_string().parse::<Address>(), Ok(address));
        }

        #[test]
        fn no_text_panics(text in ".{0,120}") {
            let _either = text.parse::<Address>();
        }

        #[test]
        fn no_text_like_an_address_panics(text in "(tcp|udp|unix|unixgram)?:?(//)?[@/]?[\\[\\]0-9a-f:.%*]{0,40}(:[0-9]{0,6})?") {
            if let Ok(address) = text.parse::<Address>() {
                prop_assert_eq!(address.to_string().parse::<Address>(), Ok(address));
            }
        }
    }
}
