//! A service that listens without its listen(2) having been caught: by `io_uring` (its `IORING_OP_BIND` and
//! `IORING_OP_LISTEN` are no system calls, and pass by every filter), or with a socket that somebody gave it.

use std::net::SocketAddr;

use procfs::net::{TcpNetEntry, TcpState};

use super::driver::Driver;
use crate::core::GenerationId;
use crate::drain::connections::has_socket;

impl Driver {
    /// Says so if one serves of which no call was caught.
    pub(super) fn tell_of_unseen(&self, id: GenerationId) {
        let Some(running) = self.running.get(&id) else { return };
        if running.notifier.is_none() || running.listens > 0 {
            return;
        }
        let Some(pids) = running.group.as_ref().and_then(|group| group.pids().ok()) else { return };
        for address in listening(&pids) {
            tracing::warn!(
                generation = %id,
                "listens on {address}, and zddsup did not see how (io_uring, or a socket that somebody gave it): the next \
                 version cannot listen there beside it; use --listen {address} with --handoff fds or socket"
            );
        }
    }
}

/// Looks at every socket of the machine: not to be asked often.
fn listening(pids: &[i32]) -> Vec<SocketAddr> {
    let entries = procfs::net::tcp().into_iter().chain(procfs::net::tcp6()).flatten();
    let is_theirs = |entry: &TcpNetEntry| {
        entry.state == TcpState::Listen && u32::try_from(entry.inode).is_ok_and(|inode| has_socket(pids, inode))
    };
    entries.filter(is_theirs).map(|entry| entry.local_address).collect()
}
