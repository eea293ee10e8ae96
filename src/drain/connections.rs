//! Whose connections there are: the kernel's list, matched with the fds of each generation's processes.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use super::diag;
use crate::core::GenerationId;

/// Where connections are counted.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// Of TCP.
    pub tcp: Vec<SocketAddr>,
    /// Of UDP: what a server has connected to one client each are its connections.
    pub udp: Vec<SocketAddr>,
    /// Of Unix sockets, by what they were bound to; with a zero at its begin if it is abstract.
    pub unix: Vec<Vec<u8>>,
    /// From when on one counts as still, of which the kernel knows it: of TCP.
    pub still_after: Option<Duration>,
}

/// How many connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Count {
    /// In all.
    pub all: u64,
    /// Of them, those that are still.
    pub still: u64,
}

/// Counts the connections of each generation there. Blocks for as long as the kernel and `/proc` take.
///
/// # Errors
/// When the kernel does not list its sockets. A process that is gone meanwhile, or may not be looked at, counts as none.
pub fn count(places: &Places, generations: Vec<(GenerationId, Vec<i32>)>) -> io::Result<BTreeMap<GenerationId, Count>> {
    // By inode, and whether each is still.
    let mut accepted = HashMap::new();
    let mut note = |connection: diag::Connection| {
        if connection.inode != 0 {
            let still = places.still_after.is_some_and(|after| connection.still_for >= Some(after));
            accepted.insert(connection.inode, still);
        }
    };
    match places.still_after {
        Some(_) => diag::connections_with_times(&places.tcp, &mut note)?,
        None => diag::connections(&places.tcp, &mut note)?,
    }
    diag::connected_datagram_sockets(&places.udp, &mut note)?;
    // When they were used last the kernel does not know.
    diag::unix_connections(&places.unix, |inode| {
        accepted.insert(inode, false);
    })?;
    let count = |pids: Vec<i32>| {
        // One that several processes have is one connection.
        let mut own = HashSet::new();
        let mut still = 0;
        if !accepted.is_empty() {
            for pid in pids {
                sockets_of(pid, |inode| {
                    if let Some(is_still) = accepted.get(&inode) {
                        still += u64::from(own.insert(inode) && *is_still);
                    }
                });
            }
        }
        Count { all: own.len() as u64, still }
    };
    Ok(generations.into_iter().map(|(id, pids)| (id, count(pids))).collect())
}

/// Whether one of these processes has this socket.
#[must_use]
pub fn has_socket(pids: &[i32], inode: u32) -> bool {
    sockets(pids).contains(&inode)
}

/// All sockets of these processes.
#[must_use]
pub fn sockets(pids: &[i32]) -> HashSet<u32> {
    let mut all = HashSet::new();
    for &pid in pids {
        sockets_of(pid, |inode| {
            all.insert(inode);
        });
    }
    all
}

/// The inodes of a process' sockets. Read directly: a hundred thousand fds are a link each, and nothing else of them counts.
fn sockets_of(pid: i32, mut each: impl FnMut(u32)) {
    let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else { return };
    for fd in fds.flatten() {
        let Ok(target) = fs::read_link(fd.path()) else { continue };
        let inode = target.to_str().and_then(|target| target.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        if let Some(inode) = inode {
            each(inode);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn accepted_connections_are_counted_where_they_are() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let clients: Vec<_> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
        let accepted: Vec<_> = (0..15).map(|_| listener.accept().unwrap()).collect();
        let own = i32::try_from(std::process::id()).unwrap();
        let (one, two) = (GenerationId(1), GenerationId(2));
        let places = Places { tcp: vec![address], ..Places::default() };
        let count = || count(&places, vec![(one, vec![own, own]), (two, vec![1])]).unwrap();
        let all = |all| Count { all, still: 0 };
        assert_eq!(count(), BTreeMap::from([(one, all(15)), (two, all(0))]));
        drop(accepted);
        drop(clients);
        assert_eq!(count()[&one], all(0));
    }

    #[test]
    fn those_that_are_still_are_counted_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut clients: Vec<_> = (0..3).map(|_| TcpStream::connect(address).unwrap()).collect();
        let _accepted: Vec<_> = clients.iter().map(|_| listener.accept().unwrap()).collect();
        let own = i32::try_from(std::process::id()).unwrap();
        let one = GenerationId(1);
        let count = |after| {
            let places = Places { tcp: vec![address], still_after: Some(after), ..Places::default() };
            count(&places, vec![(one, vec![own])]).unwrap()[&one]
        };
        assert_eq!(count(Duration::from_secs(60)), Count { all: 3, still: 0 });
        // What is not read yet is under way.
        clients[0].write_all(b"x").unwrap();
        assert_eq!(count(Duration::ZERO), Count { all: 3, still: 2 });
    }

    #[test]
    fn a_datagram_socket_of_one_client_is_a_connection() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let places = Places { udp: vec![server.local_addr().unwrap()], ..Places::default() };
        let own = i32::try_from(std::process::id()).unwrap();
        let count = || count(&places, vec![(GenerationId(1), vec![own])]).unwrap()[&GenerationId(1)].all;
        assert_eq!(count(), 0);
        server.connect("127.0.0.1:9").unwrap();
        assert_eq!(count(), 1);
    }

    #[test]
    fn unix_connections_are_those_of_the_side_that_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let places = Places { unix: vec![path.to_str().unwrap().as_bytes().to_vec()], ..Places::default() };
        let own = i32::try_from(std::process::id()).unwrap();
        let count = || count(&places, vec![(GenerationId(1), vec![own])]).unwrap()[&GenerationId(1)].all;
        let _clients = [(); 3].map(|()| UnixStream::connect(&path).unwrap());
        let _accepted = [(); 2].map(|()| listener.accept().unwrap());
        assert_eq!(count(), 2);
    }
}
