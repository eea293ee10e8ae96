//! TCP, UDP and Unix sockets as the kernel lists them (`sock_diag(7)`). Other processes' too, and without asking them.

use std::io;
use std::mem::offset_of;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use netlink_packet_core::{NetlinkHeader, NetlinkMessage, NetlinkPayload, NLM_F_DUMP, NLM_F_REQUEST};
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags};
use netlink_packet_sock_diag::unix::nlas::UnixDiagName;
use netlink_packet_sock_diag::unix::{self, UnixRequest};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use netlink_sys::Socket;

/// Which sockets, and what of them.
struct Wanted {
    protocol: u8,
    states: StateFlags,
    extensions: ExtensionFlags,
}

/// Connections that a process has or could accept.
const COMPLETE_TCP: Wanted = Wanted {
    protocol: IPPROTO_TCP,
    states: StateFlags::ESTABLISHED
        .union(StateFlags::CLOSE_WAIT)
        .union(StateFlags::FIN_WAIT1)
        .union(StateFlags::FIN_WAIT2),
    extensions: ExtensionFlags::empty(),
};

/// Room for an answer; the kernel fills up to 32 KiB at once.
const BUFFER: usize = 32 * 1024;

/// A connection, from the side of the process that has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    /// Its own end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// Its inode in sockfs; 0 while nobody has accepted it.
    pub inode: u32,
    /// For how long nothing was sent or received. None while something was sent and not acknowledged, or received and not
    /// read, and where it was not asked for.
    pub still_for: Option<Duration>,
}

/// IP version of a listener's socket. One for both versions has its IPv4 connections as IPv6 ones.
fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    }
}

/// Calls `each` for every connection of which the local end has the port of one of these listeners.
pub fn connections(listeners: &[SocketAddr], each: impl FnMut(Connection)) -> io::Result<()> {
    at(listeners, &COMPLETE_TCP, each)
}

/// The same, with how long each has been still.
pub fn connections_with_times(listeners: &[SocketAddr], each: impl FnMut(Connection)) -> io::Result<()> {
    at(listeners, &Wanted { extensions: ExtensionFlags::INFO, ..COMPLETE_TCP }, each)
}

/// The same for UDP sockets that were connected to one client each: they have `TCP_ESTABLISHED` as their state
/// (`__ip4_datagram_connect`).
pub fn connected_datagram_sockets(listeners: &[SocketAddr], each: impl FnMut(Connection)) -> io::Result<()> {
    at(listeners, &Wanted { protocol: IPPROTO_UDP, states: StateFlags::ESTABLISHED, ..COMPLETE_TCP }, each)
}

/// The same for UDP sockets that are open to all. Such a socket has `TCP_CLOSE` as its state.
pub fn open_datagram_sockets(listeners: &[SocketAddr], each: impl FnMut(Connection)) -> io::Result<()> {
    at(listeners, &Wanted { protocol: IPPROTO_UDP, states: StateFlags::CLOSE, ..COMPLETE_TCP }, each)
}

/// The same for connections of which the handshake is not over: the kernel does not say which of the sockets that listen
/// there will get them.
pub fn half_open(listeners: &[SocketAddr], each: impl FnMut(Connection)) -> io::Result<()> {
    at(listeners, &Wanted { states: StateFlags::SYN_RECV, ..COMPLETE_TCP }, each)
}

fn at(listeners: &[SocketAddr], wanted: &Wanted, mut each: impl FnMut(Connection)) -> io::Result<()> {
    let mut asked: Vec<_> = listeners.iter().map(|listener| (family(listener.ip()), listener.port())).collect();
    asked.sort_unstable();
    asked.dedup();
    for (family, port) in asked {
        dump(family, wanted, (port, 0), &mut each)?;
    }
    Ok(())
}

/// The far side of a connection that this process made to a socket of this machine.
pub fn far_side(local: SocketAddr, remote: SocketAddr) -> io::Result<Option<Connection>> {
    let mut found = None;
    for family in [AF_INET, AF_INET6] {
        dump(family, &COMPLETE_TCP, (remote.port(), local.port()), &mut |connection| {
            if same(connection.remote, local) {
                found = Some(connection);
            }
        })?;
    }
    Ok(found)
}

/// An IPv4 address is the same one as its form in IPv6.
fn same(one: SocketAddr, other: SocketAddr) -> bool {
    one.port() == other.port() && one.ip().to_canonical() == other.ip().to_canonical()
}

fn dump(
    family: u8,
    wanted: &Wanted,
    (local_port, remote_port): (u16, u16),
    each: &mut impl FnMut(Connection),
) -> io::Result<()> {
    let mut id = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
    id.source_port = local_port;
    id.destination_port = remote_port;
    let Wanted { protocol, states, extensions } = wanted;
    let request = InetRequest {
        family,
        protocol: *protocol,
        extensions: extensions.clone(),
        states: states.clone(),
        socket_id: id,
    };
    list(SockDiagMessage::InetRequest(request), |message| {
        if let SockDiagMessage::InetResponse(response) = message {
            let id = &response.header.socket_id;
            each(Connection {
                local: SocketAddr::new(id.source_address, id.source_port),
                remote: SocketAddr::new(id.destination_address, id.destination_port),
                inode: response.header.inode,
                still_for: still_for(&response),
            });
        }
    })
}

/// The queues are what was not read and what was not acknowledged, sent or not (`tcp_diag_get_info`).
fn still_for(response: &InetResponse) -> Option<Duration> {
    if (response.header.recv_queue, response.header.send_queue) != (0, 0) {
        return None;
    }
    let info = response.nlas.iter().find_map(|nla| if let Nla::TcpInfo(info) = nla { Some(info) } else { None })?;
    let ms_at = |offset: usize| Some(u32::from_ne_bytes(info.get(offset..offset + 4)?.try_into().ok()?));
    let sent = ms_at(offset_of!(libc::tcp_info, tcpi_last_data_sent))?;
    let received = ms_at(offset_of!(libc::tcp_info, tcpi_last_data_recv))?;
    Some(Duration::from_millis(sent.min(received).into()))
}

/// Calls `each` with the inode of every connection that was accepted by a Unix socket that was bound to one of these names;
/// an abstract one has a zero at its begin.
pub fn unix_connections(names: &[Vec<u8>], mut each: impl FnMut(u32)) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    if names.is_empty() {
        return Ok(());
    }
    let request = UnixRequest {
        state_flags: unix::StateFlags::ESTABLISHED,
        inode: 0,
        show_flags: unix::ShowFlags::NAME,
        // Of any.
        cookie: [0xff; 8],
    };
    list(SockDiagMessage::UnixRequest(request), |message| {
        let SockDiagMessage::UnixResponse(response) = message else { return };
        // An accepted one has its listener's name. One that waits in the queue has no inode.
        let found = match response.name() {
            Some(UnixDiagName::Pathname(path)) => names.iter().any(|name| name == path.as_bytes()),
            Some(UnixDiagName::Abstract(abstracted)) => {
                names.iter().any(|name| name[..1] == [0] && name[1..] == **abstracted)
            }
            None => false,
        };
        if found && response.header.inode != 0 {
            each(response.header.inode);
        }
    })
}

/// Asks the kernel for a list, and calls `each` for what is in it.
pub(super) fn list(request: SockDiagMessage, mut each: impl FnMut(SockDiagMessage)) -> io::Result<()> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut packet = NetlinkMessage::new(header, request.into());
    packet.finalize();
    let mut bytes = vec![0; packet.buffer_len()];
    packet.serialize(&mut bytes);

    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
    socket.send(&bytes, 0)?;
    let mut buffer = Vec::with_capacity(BUFFER);
    loop {
        buffer.clear();
        let mut rest = match socket.recv(&mut buffer, 0)? {
            0 => return Ok(()),
            _ => buffer.as_slice(),
        };
        while !rest.is_empty() {
            let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest).map_err(io::Error::other)?;
            let length = message.header.length as usize;
            match message.payload {
                NetlinkPayload::InnerMessage(message) => each(message),
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
            // Messages are padded to four bytes; a length of 0 would never end.
            let padded = length.max(1).next_multiple_of(4);
            rest = rest.get(padded..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream, UdpSocket};

    #[test]
    fn both_versions_and_the_inode_after_accept() {
        for bind in ["127.0.0.1:0", "[::]:0"] {
            let listener = TcpListener::bind(bind).unwrap();
            let port = listener.local_addr().unwrap().port();
            let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
            let (local, remote) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
            assert_eq!(far_side(local, remote).unwrap().unwrap().inode, 0, "{bind}");
            let _accepted = listener.accept().unwrap();
            assert_ne!(far_side(local, remote).unwrap().unwrap().inode, 0, "{bind}");
            let mut count = 0;
            connections(&[listener.local_addr().unwrap()], |_| count += 1).unwrap();
            assert_eq!(count, 1, "{bind}");
        }
    }

    #[test]
    fn a_handshake_that_is_not_over_is_none_of_the_connections() {
        for (bind, client) in [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1"), ("[::]:0", "127.0.0.1")] {
            let listener = TcpListener::bind(bind).unwrap();
            // The kernel waits with the end of the handshake until data comes.
            crate::sys::socket::set_defer_accept(&listener, 60).unwrap();
            let address = listener.local_addr().unwrap();
            let mut client = TcpStream::connect((client, address.port())).unwrap();
            let halves = || {
                let mut found = Vec::new();
                half_open(&[address], |half| found.push(half.remote)).unwrap();
                found
            };
            let [remote] = halves()[..] else { panic!("{bind}: {:?}", halves()) };
            assert!(same(remote, client.local_addr().unwrap()), "{bind}: {remote}");
            connections(&[address], |found| panic!("{found:?}")).unwrap();
            client.write_all(b"x").unwrap();
            let _accepted = listener.accept().unwrap();
            assert_eq!(halves(), [], "{bind}");
        }
    }

    #[test]
    fn a_connection_is_still_only_while_nothing_is_under_way() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut client = TcpStream::connect(address).unwrap();
        let (mut accepted, _) = listener.accept().unwrap();
        let still = || {
            let mut found = Vec::new();
            connections_with_times(&[address], |connection| found.push(connection.still_for)).unwrap();
            let [still] = found[..] else { panic!("{found:?}") };
            still
        };
        let wait_until = |wanted: &dyn Fn(Option<Duration>) -> bool| {
            let begin = std::time::Instant::now();
            while !wanted(still()) {
                assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", still());
            }
        };
        wait_until(&|still| still > Some(Duration::from_millis(50)));
        client.write_all(b"x").unwrap();
        wait_until(&|still| still.is_none());
        accepted.read_exact(&mut [0]).unwrap();
        wait_until(&|still| still.is_some());
        wait_until(&|still| still > Some(Duration::from_millis(50)));
        // What the client does not read is on its way for as long as it takes.
        accepted.set_nonblocking(true).unwrap();
        while matches!(accepted.write(&[0; 1 << 14]), Ok(1..)) {}
        assert_eq!(still(), None);
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(still(), None);
    }

    #[test]
    fn datagram_sockets_are_told_apart() {
        let open = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = open.local_addr().unwrap();
        let found = |connected: bool| {
            let mut found = 0;
            if connected {
                connected_datagram_sockets(&[address], |_| found += 1).unwrap();
            } else {
                open_datagram_sockets(&[address], |_| found += 1).unwrap();
            }
            found
        };
        assert_eq!((found(false), found(true)), (1, 0));
        open.connect("127.0.0.1:9").unwrap();
        assert_eq!((found(false), found(true)), (0, 1));
    }

    #[test]
    fn nobody_is_there() {
        let unused: SocketAddr = "127.0.0.1:1".parse().unwrap();
        assert_eq!(far_side(unused, unused).unwrap(), None);
    }
}
