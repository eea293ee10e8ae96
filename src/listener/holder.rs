//! Who has an address that cannot be had. Asked only once something failed, for the error's text.

use std::path::Path;

use procfs::net::TcpState;
use procfs::process::{all_processes, FDTarget};

use super::address::{Address, Transport};

/// The process that has the address, as far as /proc shows it to us.
pub(super) fn of(address: &Address) -> Option<String> {
    let inodes = match address {
        Address::Inet { transport: Transport::Tcp, port, .. } => {
            let entries = procfs::net::tcp().into_iter().chain(procfs::net::tcp6()).flatten();
            let listening =
                entries.filter(|entry| entry.state == TcpState::Listen && entry.local_address.port() == *port);
            listening.map(|entry| entry.inode).collect()
        }
        Address::Inet { transport: Transport::Udp, port, .. } => {
            let entries = procfs::net::udp().into_iter().chain(procfs::net::udp6()).flatten();
            entries.filter(|entry| entry.local_address.port() == *port).map(|entry| entry.inode).collect()
        }
        Address::Unix { .. } => of_name(&shown_name(address)?),
    };
    owner(&inodes)
}

/// As /proc/net/unix has it.
fn shown_name(address: &Address) -> Option<String> {
    use super::address::UnixName;
    match address {
        Address::Unix { name: UnixName::Path(path), .. } => path.to_str().map(str::to_owned),
        Address::Unix { name: UnixName::Abstract(name), .. } => Some(format!("@{}", std::str::from_utf8(name).ok()?)),
        Address::Inet { .. } => None,
    }
}

fn of_name(name: &str) -> Vec<u64> {
    let entries = procfs::net::unix().unwrap_or_default();
    entries.iter().filter(|entry| entry.path.as_deref() == Some(Path::new(name))).map(|entry| entry.inode).collect()
}

fn owner(inodes: &[u64]) -> Option<String> {
    if inodes.is_empty() {
        return None;
    }
    for process in all_processes().ok()?.flatten() {
        let Ok(fds) = process.fd() else { continue };
        let has_it =
            |fd: procfs::process::FDInfo| matches!(fd.target, FDTarget::Socket(inode) if inodes.contains(&inode));
        if fds.flatten().any(has_it) {
            if u32::try_from(process.pid()) == Ok(std::process::id()) {
                return Some("by another --listen of this zddsup".to_owned());
            }
            let name = process.stat().map_or_else(|_| "unknown".to_owned(), |stat| stat.comm);
            return Some(format!("by process {}, {name}", process.pid()));
        }
    }
    None
}
