//! Two sockets at one address, of which one is steered to, and a look at what came.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use socket2::{Domain, Socket, Type};

use super::Findings;
use crate::core::GenerationId;
use crate::drain::diag;
use crate::listener::steering::{Group, Key};

/// By chance they would all arrive at one socket once in a thousand million times.
const CONNECTIONS: usize = 30;

pub(super) fn steering(findings: &mut Findings) {
    let steered = steered().map_err(|error| error.to_string());
    let instead = "without it, use --listen: generations then share one accept queue";
    let words = "SO_REUSEPORT, SO_ATTACH_REUSEPORT_CBPF";
    let Some((address, _connections)) = findings.tried("steer connections", words, instead, steered) else { return };
    let counted = counted(address);
    let instead = "without it, use --drain signal";
    let _was_told = findings.tried("watch connections", "sock_diag(7)", instead, counted);
}

fn steered() -> io::Result<(SocketAddr, Vec<(TcpStream, TcpStream)>)> {
    let first = bound((Ipv4Addr::LOCALHOST, 0).into())?;
    first.listen(128)?;
    let key = Key::of(&first)?.ok_or_else(|| io::Error::other("a socket of TCP is not known as such"))?;
    let address = key.local();
    let mut group = Group::new(key);
    let [old, new] = [GenerationId(1), GenerationId(2)];
    let first: Arc<OwnedFd> = Arc::new(first.into());
    group.join(old, &first).map_err(io::Error::other)?;
    group.pin().map_err(io::Error::other)?;
    let second = bound(address)?;
    second.listen(128)?;
    let second: Arc<OwnedFd> = Arc::new(second.into());
    group.join(new, &second).map_err(io::Error::other)?;

    let all = arrive(address, &first, &second, CONNECTIONS, "the old")?;
    group.steer_to(new).map_err(io::Error::other)?;
    drop(all);
    let all = arrive(address, &second, &first, CONNECTIONS, "the new")?;
    Ok((address, all))
}

fn bound(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// All of them come to this one.
fn arrive(
    address: SocketAddr,
    to: &OwnedFd,
    not_to: &OwnedFd,
    count: usize,
    whose: &str,
) -> io::Result<Vec<(TcpStream, TcpStream)>> {
    let listener = |socket: &OwnedFd| -> io::Result<TcpListener> {
        let listener = TcpListener::from(socket.try_clone()?);
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    let (to, not_to) = (listener(to)?, listener(not_to)?);
    let mut all = Vec::new();
    for _ in 0..count {
        let client = TcpStream::connect(address)?;
        // On loopback it is there once connect(2) is over.
        let (served, _) = to.accept().map_err(|error| astray(&error, whose))?;
        all.push((client, served));
    }
    match not_to.accept() {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(all),
        Ok(_) | Err(_) => Err(astray(&ErrorKind::Other.into(), whose)),
    }
}

fn astray(error: &io::Error, whose: &str) -> io::Error {
    io::Error::other(format!("a connection that was steered to {whose} socket did not come to it ({error})"))
}

fn counted(address: SocketAddr) -> Result<(), String> {
    let mut found = 0;
    diag::connections(&[address], |connection| found += usize::from(connection.local == address))
        .map_err(|error| error.to_string())?;
    if found == CONNECTIONS {
        Ok(())
    } else {
        Err(format!("{found} of {CONNECTIONS} connections were listed"))
    }
}
