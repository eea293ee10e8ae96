//! Whose connections there are: the kernel's list, matched with the fds of each generation's processes.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::net::SocketAddr;

use super::diag;
use crate::core::GenerationId;

/// Where connections are counted.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// Of TCP.
    pub tcp: Vec<SocketAddr>,
    /// Of UDP: what a server has connected to one client each are its connections.
    pub udp: Vec<SocketAddr>,
}

/// Counts the connections of each generation there. Blocks for as long as the kernel and `/proc` take.
///
/// # Errors
/// When the kernel does not list its sockets. A process that is gone meanwhile, or may not be looked at, counts as none.
pub fn count(places: &Places, generations: Vec<(GenerationId, Vec<i32>)>) -> io::Result<BTreeMap<GenerationId, u64>> {
    let mut accepted = HashSet::new();
    let mut note = |connection: diag::Connection| {
        if connection.inode != 0 {
            accepted.insert(connection.inode);
        }
    };
    diag::connections(&places.tcp, &mut note)?;
    diag::connected_datagram_sockets(&places.udp, &mut note)?;
    let count = |pids: Vec<i32>| {
        // One that several processes have is one connection.
        let mut own = HashSet::new();
        if !accepted.is_empty() {
            for pid in pids {
                sockets_of(pid, |inode| {
                    if accepted.contains(&inode) {
                        own.insert(inode);
                    }
                });
            }
        }
        own.len() as u64
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
    use std::net::{TcpListener, TcpStream, UdpSocket};

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
        assert_eq!(count(), BTreeMap::from([(one, 15), (two, 0)]));
        drop(accepted);
        drop(clients);
        assert_eq!(count()[&one], 0);
    }

    #[test]
    fn a_datagram_socket_of_one_client_is_a_connection() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let places = Places { udp: vec![server.local_addr().unwrap()], ..Places::default() };
        let own = i32::try_from(std::process::id()).unwrap();
        let count = || count(&places, vec![(GenerationId(1), vec![own])]).unwrap()[&GenerationId(1)];
        assert_eq!(count(), 0);
        server.connect("127.0.0.1:9").unwrap();
        assert_eq!(count(), 1);
    }
}
