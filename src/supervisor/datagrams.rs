//! UDP sockets that services make themselves. From bind(2) on they get datagrams, and so it is done here, in the service's
//! place, once everything new is pinned to whoever gets it now.
//!
//! Not every one that is bound to a port is a listener. Port 0 is a client's. One that a ready generation binds where nobody
//! listens is taken for a client's too (a resolver chooses its own ports, some thousand a second); if the next generation
//! binds there while it is getting ready, it was none.

use std::net::SocketAddr;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::unistd::Pid;
use socket2::SockRef;

use super::caught::Verdict;
use super::driver::Driver;
use super::takeover::socket_of;
use crate::core::GenerationId;
use crate::drain::{connections, diag};
use crate::handoff::adopt::remote::{Caller, LookError};
use crate::listener::steering::{Group, Key, Protocol};
use crate::process::group::Member;

/// A server that makes a socket for each client connects it within that time after bind(2).
const CONNECTED_WITHIN: Duration = Duration::from_secs(1);
/// How often it is looked whether it did.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

impl Driver {
    pub(super) fn binds_datagrams(
        &mut self,
        id: GenerationId,
        caller: &Caller<'_>,
        fd: RawFd,
        own: OwnedFd,
        address: SocketAddr,
    ) -> Result<Verdict, LookError> {
        if address.port() == 0 {
            return Ok(Verdict::GoesOn);
        }
        if let Some(held) = self.left_behind(address) {
            let verdict = self.replaced(id, caller, (fd, &own), held)?;
            self.has_listened(id);
            return Ok(verdict);
        }
        self.forget_closed(id, address);
        let socket = SockRef::from(&own);
        let owners: Vec<_> = self.datagram_groups(address).flat_map(Group::members).map(|(owner, ..)| owner).collect();
        let ready = self.running.get(&id).is_some_and(|running| running.ready);
        let one_more = owners.contains(&id);
        let shares = socket.reuse_port().unwrap_or(false);
        // A client's; one more for a client that it serves; or a mistake, and then the kernel says so.
        if (ready && owners.is_empty()) || (one_more && !shares) || !caller.may_bind(address.port())? {
            return Ok(Verdict::GoesOn);
        }
        let bind = || {
            let bound = socket.set_reuse_port(true).and_then(|()| socket.bind(&address.into()));
            bound.map_err(|error| error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw))
        };
        let bound = match self.pin_datagrams(id, address).and_then(|()| bind()) {
            // Sockets of single clients are there too (`Group::refresh`).
            Err(Errno::EADDRINUSE) if !owners.is_empty() && socket.set_reuse_address(true).is_ok() => bind(),
            Err(Errno::EADDRINUSE) if self.was_a_listener(address) => {
                bind().and_then(|()| self.pin_datagrams(id, address))
            }
            other => other,
        };
        if let Err(errno) = bound {
            tracing::warn!(generation = %id, "cannot bind udp:{address}: {errno}");
            return Ok(Verdict::Done(Err(errno)));
        }
        self.has_bound(id, own, ready && one_more);
        Ok(Verdict::Done(Ok(())))
    }

    /// The socket of a dead generation at this address, where nobody serves.
    fn left_behind(&self, address: SocketAddr) -> Option<Arc<OwnedFd>> {
        if self.machine.serving().is_some() {
            return None;
        }
        let dead = |owner| self.running.get(&owner).is_none_or(|running| running.end.is_some());
        let members = self.datagram_groups(address).flat_map(Group::members);
        let mut sockets = members.filter(|(owner, _, leaving)| !leaving && dead(*owner));
        sockets.next().map(|(_, socket, _)| Arc::clone(socket))
    }

    /// Everything new goes on to whoever gets it now.
    fn pin_datagrams(&mut self, id: GenerationId, address: SocketAddr) -> nix::Result<()> {
        let at = |group: &&mut Group| group.key().protocol() == Protocol::Udp && group.key().local() == address;
        for group in self.adopted.groups.values_mut().filter(at) {
            if let Err(error) = group.refresh(Instant::now()) {
                tracing::error!(generation = %id, "{error}");
            }
            if group.members().any(|(owner, ..)| owner != id) {
                // Without this it would get datagrams before it is ready: better that it fails.
                group.pin().map_err(|error| {
                    tracing::error!(generation = %id, "its bind(2) is refused: {error}");
                    Errno::EADDRINUSE
                })?;
            }
        }
        Ok(())
    }

    /// `late`: a ready generation has one there already. This one may be about to be connected to a single client.
    fn has_bound(&mut self, id: GenerationId, socket: OwnedFd, late: bool) {
        let Ok(Some(key)) = Key::of(&socket) else { return };
        let group = self.adopted.groups.entry(key.clone()).or_insert_with(|| Group::new(key.clone()));
        let socket = Arc::new(socket);
        let now = Instant::now();
        let joined =
            if late { group.join_from(id, &socket, Some(now + CONNECTED_WITHIN)) } else { group.join(id, &socket) };
        if let Err(error) = joined {
            tracing::error!(generation = %id, "{error}");
        }
        if late {
            self.adopted.due.get_or_insert(now + LOOK_AGAIN);
        } else {
            tracing::info!(generation = %id, "gets what comes to {key} once it is switched to");
            self.has_listened(id);
        }
    }

    /// The generation that serves bound this address when it was ready, so that it passed for a client. Makes it share
    /// the address, and whether it does. Until the other one has bound too there is no group, and so no program: for some
    /// microseconds then the kernel's hash chooses.
    fn was_a_listener(&mut self, address: SocketAddr) -> bool {
        let Some(serving) = self.machine.serving() else { return false };
        let group = self.running.get(&serving).and_then(|running| running.group.clone());
        let pids = group.and_then(|group| group.pids().ok()).unwrap_or_default();
        let mut there = Vec::new();
        let listed = diag::open_datagram_sockets(&[address], |socket| {
            if socket.local == address {
                there.push(socket.inode);
            }
        });
        // Of several, only one would become a group with the new one.
        let (Ok(()), [inode]) = (listed, &there[..]) else { return false };
        let found = pids.into_iter().find_map(|pid| {
            let member = Member::of(Pid::from_raw(pid)).ok()?;
            socket_of(member, &member.open().ok()?, (*inode).into())
        });
        let Some(socket) = found else { return false };
        let shares = SockRef::from(&socket).set_reuse_port(true).is_ok();
        self.adopted.found(serving, socket);
        shares
    }

    fn datagram_groups(&self, address: SocketAddr) -> impl Iterator<Item = &Group> {
        let at = move |group: &&Group| group.key().protocol() == Protocol::Udp && group.key().local() == address;
        self.adopted.groups.values().filter(at)
    }

    /// A service that closes a UDP socket asks nobody, and the copy here would go on getting datagrams: when it binds
    /// there again, those that it has no more leave.
    fn forget_closed(&mut self, id: GenerationId, address: SocketAddr) {
        let of_it = |(owner, ..): &(GenerationId, &Arc<OwnedFd>, bool)| *owner == id;
        let count = self.datagram_groups(address).flat_map(Group::members).filter(of_it).count();
        // To look through all of its fds each time would be too much for one that makes a socket for each client.
        if count == 0 || (count > 16 && !count.is_power_of_two()) {
            return;
        }
        self.forget_closed_at(id, |key| key.local() == address);
    }

    /// What the generation that serves has closed is not waited for.
    pub(super) fn forget_closed_by_who_serves(&mut self) {
        if let Some(serving) = self.machine.serving() {
            self.forget_closed_at(serving, |_| true);
        }
    }

    fn forget_closed_at(&mut self, id: GenerationId, at: impl Fn(&Key) -> bool) {
        let Some(group) = self.running.get(&id).and_then(|running| running.group.clone()) else { return };
        let mut its_own = None;
        for group_there in self.adopted.groups.values_mut() {
            let key = group_there.key().clone();
            if key.protocol() != Protocol::Udp || !at(&key) {
                continue;
            }
            // One of which it cannot be said stays.
            let open = its_own.get_or_insert_with(|| group.pids().map(|pids| connections::sockets(&pids)));
            let Ok(open) = open else { return };
            for inode in group_there.inodes_of(id) {
                if !u32::try_from(inode).is_ok_and(|inode| open.contains(&inode)) {
                    if let Err(error) = group_there.leave_inode(inode) {
                        tracing::error!(generation = %id, "{error}");
                    }
                }
            }
        }
        self.adopted.groups.retain(|_, group| group.members().next().is_some());
    }

    /// Those that joined late are steered to unless they were connected meanwhile.
    pub(super) fn refresh_datagrams(&mut self) {
        let now = Instant::now();
        let mut again = false;
        for group in self.adopted.groups.values_mut().filter(|group| group.key().protocol() == Protocol::Udp) {
            match group.refresh(now) {
                Ok(some_are_new) => again |= some_are_new,
                Err(error) => tracing::error!("{error}"),
            }
        }
        if again {
            self.adopted.due.get_or_insert(now + LOOK_AGAIN);
        }
    }
}
