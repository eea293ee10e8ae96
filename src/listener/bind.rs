//! Makes a listener's socket: opens, sets every option, binds, listens.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{open, AtFlags, OFlag, AT_FDCWD};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::stat::{fchmod, fchmodat, FchmodatFlags, Mode};
use nix::unistd::{fchownat, Gid, Group, Uid, User};
use socket2::{Domain, SockAddr, SockRef, Socket, Type};

use super::address::{Address, Host, Transport, UnixKind, UnixName};
use super::error::Why;
use super::holder;
use super::options::Options;
use super::spec::ListenerSpec;
use super::stale::{self, SocketFile};
use crate::sys::socket::{set_defer_accept, set_fastopen};

/// Connections that may wait where nothing else was asked for. The kernel caps it by net.core.somaxconn.
pub const DEFAULT_BACKLOG: i32 = 4096;

/// A bound socket that listens, if it is one that can, and its file.
pub(super) fn bind(spec: &ListenerSpec) -> Result<(OwnedFd, Option<SocketFile>), Why> {
    match &spec.address {
        Address::Inet { transport, host, port } => Ok((inet(spec, *transport, host, *port)?, None)),
        Address::Unix { kind, name } => unix(spec, *kind, name),
    }
}

/// As bind(2) takes it.
pub(super) fn socket_address(host: &Host, port: u16) -> Result<SocketAddr, Why> {
    Ok(match host {
        Host::Any => SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0).into(),
        Host::V4(ip) => SocketAddrV4::new(*ip, port).into(),
        Host::V6 { ip, zone } => {
            let scope = match zone {
                None => 0,
                Some(zone) => match zone.parse() {
                    Ok(index) => index,
                    Err(_) => nix::net::if_::if_nametoindex(zone.as_str()).map_err(|_| Why::NoDevice(zone.clone()))?,
                },
            };
            SocketAddrV6::new(*ip, port, 0, scope).into()
        }
    })
}

fn inet(spec: &ListenerSpec, transport: Transport, host: &Host, port: u16) -> Result<OwnedFd, Why> {
    let kind = match transport {
        Transport::Tcp => Type::STREAM,
        Transport::Udp => Type::DGRAM,
    };
    let mut address = socket_address(host, port)?;
    let socket = match Socket::new(Domain::for_address(address), kind, None) {
        Err(error) if errno(&error) == Errno::EAFNOSUPPORT && address.is_ipv6() => {
            // Without IPv6, every address is every IPv4 address.
            if *host != Host::Any || spec.options.v6only == Some(true) {
                return Err(Why::NoIpv6);
            }
            address = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
            Socket::new(Domain::IPV4, kind, None)
        }
        other => other,
    };
    let socket = socket.map_err(Why::at("opening a socket"))?;
    if address.is_ipv6() {
        let v6only = match host {
            Host::Any => Some(spec.options.v6only.unwrap_or(false)),
            Host::V4(_) | Host::V6 { .. } => spec.options.v6only,
        };
        if let Some(v6only) = v6only {
            socket.set_only_v6(v6only).map_err(|source| Why::Option { option: "v6only", source })?;
        }
    }
    if transport == Transport::Tcp {
        // A listener of before may have left connections in TIME_WAIT.
        socket.set_reuse_address(true).map_err(Why::at("setting SO_REUSEADDR"))?;
    }
    before_bind(&socket, address.is_ipv6(), &spec.options)?;
    at_any_time(&socket, address.is_ipv6(), &spec.options)?;
    socket.bind(&address.into()).map_err(|error| match errno(&error) {
        Errno::EADDRINUSE => Why::InUse { holder: holder::of(&spec.address) },
        Errno::EACCES if port < first_unprivileged_port() => Why::Privileged { first: first_unprivileged_port() },
        Errno::EADDRNOTAVAIL => Why::NotHere,
        Errno::ENODEV => Why::NoDevice(host.to_string()),
        _ => Why::System { step: "binding", source: error },
    })?;
    if spec.steered {
        // Only now: whoever has the address already, with this option too, is to be found out.
        socket.set_reuse_port(true).map_err(Why::at("setting SO_REUSEPORT"))?;
    }
    if transport == Transport::Tcp {
        // Two sockets with SO_REUSEADDR may bind one address, but only one may listen.
        socket.listen(backlog(spec)).map_err(|error| match errno(&error) {
            Errno::EADDRINUSE => Why::InUse { holder: holder::of(&spec.address) },
            _ => Why::System { step: "listening", source: error },
        })?;
    }
    Ok(socket.into())
}

/// Gives a socket the options that were asked for, and binds it beside those that have the address already.
pub(super) fn beside(socket: &Socket, address: SocketAddr, v6only: bool, spec: &ListenerSpec) -> Result<(), Why> {
    if address.is_ipv6() {
        socket.set_only_v6(v6only).map_err(|source| Why::Option { option: "v6only", source })?;
    }
    socket.set_reuse_address(true).map_err(Why::at("setting SO_REUSEADDR"))?;
    before_bind(socket, address.is_ipv6(), &spec.options)?;
    at_any_time(socket, address.is_ipv6(), &spec.options)?;
    socket.set_reuse_port(true).map_err(Why::at("setting SO_REUSEPORT"))?;
    socket.bind(&address.into()).map_err(Why::at("binding another socket beside those that are there"))
}

pub(super) fn backlog(spec: &ListenerSpec) -> i32 {
    spec.options.backlog.unwrap_or(DEFAULT_BACKLOG)
}

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw)
}

fn first_unprivileged_port() -> u16 {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(1024)
}

/// Sets what decides which address a socket can have.
fn before_bind(socket: &Socket, v6: bool, options: &Options) -> Result<(), Why> {
    let option = |option| move |source| Why::Option { option, source };
    if options.reuseport {
        socket.set_reuse_port(true).map_err(option("reuseport"))?;
    }
    if let Some(device) = &options.device {
        socket.bind_device(Some(device.as_bytes())).map_err(|error| match errno(&error) {
            Errno::ENODEV => Why::NoDevice(device.clone()),
            _ => Why::Option { option: "device", source: error },
        })?;
    }
    if options.freebind {
        socket.set_freebind_v4(true).map_err(option("freebind"))?;
        if v6 {
            socket.set_freebind_v6(true).map_err(option("freebind"))?;
        }
    }
    if options.transparent {
        socket.set_ip_transparent_v4(true).map_err(option("transparent"))?;
        if v6 {
            socket.set_ip_transparent_v6(true).map_err(option("transparent"))?;
        }
    }
    Ok(())
}

/// Sets what a socket that was bound by somebody else can have as well.
pub(super) fn at_any_time(socket: &Socket, v6: bool, options: &Options) -> Result<(), Why> {
    let option = |option| move |source| Why::Option { option, source };
    if options.nodelay {
        socket.set_tcp_nodelay(true).map_err(option("nodelay"))?;
    }
    if options.keepalive {
        socket.set_keepalive(true).map_err(option("keepalive"))?;
    }
    if let Some(queue) = options.fastopen {
        set_fastopen(socket, queue).map_err(option("fastopen"))?;
    }
    if let Some(seconds) = options.defer_accept {
        set_defer_accept(socket, seconds).map_err(option("defer-accept"))?;
    }
    if let Some(mark) = options.mark {
        socket.set_mark(mark).map_err(option("mark"))?;
    }
    if let Some(tos) = options.tos {
        socket.set_tos_v4(u32::from(tos)).map_err(option("tos"))?;
        if v6 {
            socket.set_tclass_v6(u32::from(tos)).map_err(option("tos"))?;
        }
    }
    // After tos, from which the kernel derives one.
    if let Some(priority) = options.priority {
        socket.set_priority(priority).map_err(option("priority"))?;
    }
    of_any_kind(socket, options)
}

/// Sets what every kind of socket can have.
fn of_any_kind(socket: &Socket, options: &Options) -> Result<(), Why> {
    let option = |option| move |source| Why::Option { option, source };
    if options.nonblock {
        socket.set_nonblocking(true).map_err(option("nonblock"))?;
    }
    // Past the limits of net.core for those who may; others get what the limits allow.
    if let Some(size) = options.rcvbuf.and_then(|size| usize::try_from(size).ok()) {
        let forced = setsockopt(socket, sockopt::RcvBufForce, &size);
        forced
            .or_else(|_| setsockopt(socket, sockopt::RcvBuf, &size))
            .map_err(|errno| option("rcvbuf")(errno.into()))?;
    }
    if let Some(size) = options.sndbuf.and_then(|size| usize::try_from(size).ok()) {
        let forced = setsockopt(socket, sockopt::SndBufForce, &size);
        forced
            .or_else(|_| setsockopt(socket, sockopt::SndBuf, &size))
            .map_err(|errno| option("sndbuf")(errno.into()))?;
    }
    Ok(())
}

fn unix(spec: &ListenerSpec, kind: UnixKind, name: &UnixName) -> Result<(OwnedFd, Option<SocketFile>), Why> {
    let socket_type = match kind {
        UnixKind::Stream => Type::STREAM,
        UnixKind::Datagram => Type::DGRAM,
        UnixKind::Seqpacket => Type::SEQPACKET,
    };
    let socket = Socket::new(Domain::UNIX, socket_type, None).map_err(Why::at("opening a socket"))?;
    of_any_kind(&socket, &spec.options)?;
    let file = match name {
        UnixName::Abstract(name) => {
            let address = [&[0], name.as_slice()].concat();
            let address = SockAddr::unix(std::ffi::OsStr::from_bytes(&address)).map_err(Why::at("naming"))?;
            socket.bind(&address).map_err(|error| match errno(&error) {
                Errno::EADDRINUSE => Why::Live { holder: holder::of(&spec.address) },
                _ => Why::System { step: "binding", source: error },
            })?;
            None
        }
        UnixName::Path(path) => {
            stale::make_room(&spec.address, path, socket_type)?;
            Some(bind_path(&socket, path, spec)?)
        }
    };
    if kind != UnixKind::Datagram {
        socket.listen(backlog(spec)).map_err(Why::at("listening"))?;
    }
    Ok((socket.into(), file))
}

/// Binds a path, with permissions and owner as asked for before anybody else can reach the socket.
fn bind_path(socket: &Socket, path: &Path, spec: &ListenerSpec) -> Result<SocketFile, Why> {
    let Options { mode, user, group, .. } = &spec.options;
    let user = user.as_deref().map(uid).transpose()?;
    let group = group.as_deref().map(gid).transpose()?;
    let restricted = mode.is_some() || user.is_some() || group.is_some();
    if restricted {
        // The file that bind(2) makes has the socket's own mode, less the umask.
        fchmod(socket, Mode::empty())
            .map_err(|errno| Why::System { step: "closing the file to others", source: errno.into() })?;
    }
    let address = SockAddr::unix(path).map_err(Why::at("naming"))?;
    socket.bind(&address).map_err(|error| match errno(&error) {
        Errno::EADDRINUSE => Why::Live { holder: holder::of(&spec.address) },
        Errno::ENOENT => Why::NoDirectory(path.parent().unwrap_or(path).to_owned()),
        _ => Why::System { step: "binding", source: error },
    })?;
    let file = SocketFile::at(path).map_err(Why::at("looking at the socket's file"))?;
    if restricted {
        let mode = mode.map_or_else(default_mode, Mode::from_bits_truncate);
        give(path, user, group, mode)
            .map_err(|errno| Why::System { step: "setting owner and mode", source: errno.into() })?;
    }
    Ok(file)
}

/// By an fd on the very file, which whoever may write to the directory cannot exchange for another.
fn give(path: &Path, user: Option<Uid>, group: Option<Gid>, mode: Mode) -> nix::Result<()> {
    let file = open(path, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
    if user.is_some() || group.is_some() {
        fchownat(&file, "", user, group, AtFlags::AT_EMPTY_PATH)?;
    }
    let by_fd = format!("/proc/self/fd/{}", file.as_raw_fd());
    fchmodat(AT_FDCWD, by_fd.as_str(), mode, FchmodatFlags::FollowSymlink)
}

/// What the file would have had without our closing it: everything but the umask, which Linux shows in /proc.
fn default_mode() -> Mode {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let umask = status.lines().find_map(|line| u32::from_str_radix(line.strip_prefix("Umask:")?.trim(), 8).ok());
    Mode::from_bits_truncate(0o777 & !umask.unwrap_or(0o022))
}

fn uid(name: &str) -> Result<Uid, Why> {
    if let Ok(number) = name.parse() {
        return Ok(Uid::from_raw(number));
    }
    let found = User::from_name(name).ok().flatten();
    found.map(|user| user.uid).ok_or_else(|| Why::NoAccount { kind: "user", name: name.to_owned() })
}

fn gid(name: &str) -> Result<Gid, Why> {
    if let Ok(number) = name.parse() {
        return Ok(Gid::from_raw(number));
    }
    let found = Group::from_name(name).ok().flatten();
    found.map(|group| group.gid).ok_or_else(|| Why::NoAccount { kind: "group", name: name.to_owned() })
}

/// Where a socket is bound.
pub(super) fn address_of(socket: &SockRef<'_>) -> io::Result<Address> {
    let bound = socket.local_addr()?;
    let kind = socket.r#type()?;
    if let Some(address) = bound.as_socket() {
        let transport = match kind {
            Type::STREAM => Transport::Tcp,
            Type::DGRAM => Transport::Udp,
            _ => return Err(io::Error::other("it is neither TCP nor UDP")),
        };
        let host = match address {
            SocketAddr::V4(address) => Host::V4(*address.ip()),
            SocketAddr::V6(address) if address.ip().is_unspecified() && !socket.only_v6()? => Host::Any,
            SocketAddr::V6(address) => {
                let zone = (address.scope_id() != 0).then(|| address.scope_id().to_string());
                Host::V6 { ip: *address.ip(), zone }
            }
        };
        return Ok(Address::Inet { transport, host, port: address.port() });
    }
    let kind = match kind {
        Type::STREAM => UnixKind::Stream,
        Type::DGRAM => UnixKind::Datagram,
        Type::SEQPACKET => UnixKind::Seqpacket,
        _ => return Err(io::Error::other("it is of no kind that is known")),
    };
    let name = match (bound.as_pathname(), bound.as_abstract_namespace()) {
        (Some(path), _) => UnixName::Path(path.to_owned()),
        (None, Some(name)) => UnixName::Abstract(name.to_owned()),
        (None, None) => return Err(io::Error::other("it is bound to no address")),
    };
    Ok(Address::Unix { kind, name })
}
