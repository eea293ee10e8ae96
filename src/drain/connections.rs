//! Whose connections there are: the kernel's list, matched with the fds of each generation's processes.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::net::SocketAddr;

use super::diag;
use crate::core::GenerationId;

/// Counts the TCP connections of each generation at these listeners. Blocks for as long as the kernel and `/proc` take.
///
/// # Errors
/// When the kernel does not list its sockets. A process that is gone meanwhile, or may not be looked at, counts as none.
pub fn count(
    listeners: &[SocketAddr],
    generations: Vec<(GenerationId, Vec<i32>)>,
) -> io::Result<BTreeMap<GenerationId, u64>> {
    let mut accepted = HashSet::new();
    diag::connections(listeners, |connection| {
        if connection.inode != 0 {
            accepted.insert(connection.inode);
        }
    })?;
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
    pids.iter().any(|&pid| {
        let mut found = false;
        sockets_of(pid, |own| found |= own == inode);
        found
    })
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
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn accepted_connections_are_counted_where_they_are() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let clients: Vec<_> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
        let accepted: Vec<_> = (0..15).map(|_| listener.accept().unwrap()).collect();
        let own = i32::try_from(std::process::id()).unwrap();
        let (one, two) = (GenerationId(1), GenerationId(2));
        let count = || count(&[address], vec![(one, vec![own, own]), (two, vec![1])]).unwrap();
        assert_eq!(count(), BTreeMap::from([(one, 15), (two, 0)]));
        drop(accepted);
        drop(clients);
        assert_eq!(count()[&one], 0);
    }
}
