//! What it listens on.

use std::os::fd::{FromRawFd, OwnedFd};

use nix::fcntl::{fcntl, FcntlArg, FdFlag};
use socket2::{Domain, SockAddr, Socket, Type};

use super::give_up;

/// Descriptors from 3 with their names (`sd_listen_fds_with_names(3)`).
pub fn inherited(daemon: bool) -> Vec<(String, OwnedFd)> {
    let Some(count) = std::env::var("LISTEN_FDS").ok().and_then(|count| count.parse::<i32>().ok()) else {
        return Vec::new();
    };
    let pid = std::process::id().to_string();
    if let Some(named) = std::env::var("LISTEN_PID").ok().filter(|named| *named != pid && !daemon) {
        give_up(65, &format!("LISTEN_PID is {named}, and this is {pid}"));
    }
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').map(str::to_owned);
    let take = |number| {
        // SAFETY: it is ours by the protocol, and nobody else in this process takes it.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        if let Err(error) = fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
            give_up(66, &format!("LISTEN_FDS={count}, but fd {number}: {error}"));
        }
        (names.next().unwrap_or_default(), fd)
    };
    (3..3 + count).map(take).collect()
}

/// A listener of its own: on TCP, at `unix:PATH`, `unix:@NAME`, or `unixpacket:PATH`.
pub fn bind(address: &str) -> Socket {
    let listen = || {
        if let Some(path) = address.strip_prefix("unix:") {
            return bind_unix(path, Type::STREAM);
        }
        if let Some(path) = address.strip_prefix("unixpacket:") {
            return bind_unix(path, Type::SEQPACKET);
        }
        let address: std::net::SocketAddr = address.parse().map_err(std::io::Error::other)?;
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        socket.listen(1024)?;
        eprintln!("puppet: listens on {}", socket.local_addr()?.as_socket().expect("an internet address"));
        std::io::Result::Ok(socket)
    };
    listen().unwrap_or_else(|error| give_up(67, &format!("cannot listen on {address}: {error}")))
}

/// A Unix socket, which listens if it can.
pub fn bind_unix(path: &str, kind: Type) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, kind, None)?;
    socket.bind(&SockAddr::unix(path.replacen('@', "\0", usize::from(path.starts_with('@'))))?)?;
    if kind != Type::DGRAM {
        socket.listen(1024)?;
    }
    eprintln!("puppet: is at {path}");
    Ok(socket)
}

/// A socket that answers datagrams. Unless it `shares`, it sets no option, as most servers.
pub fn bind_udp(address: &str, shares: bool) -> std::io::Result<Socket> {
    let address: std::net::SocketAddr = address.parse().map_err(std::io::Error::other)?;
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
    socket.set_reuse_port(shares)?;
    socket.bind(&address.into())?;
    Ok(socket)
}
