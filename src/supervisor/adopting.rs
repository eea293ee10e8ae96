//! Sockets that services make themselves: their bind(2) and listen(2) are caught, and new connections are steered.
//!
//! ```text
//!  bind(2)   ─> SO_REUSEPORT is set beforehand, so that the next generation can bind the same address beside this one
//!  listen(2) ─> the address is pinned to whoever gets its connections now; then the socket listens, and gets nothing yet
//!               (UDP has no listen(2): pinned, and bound here, in `datagrams`)
//!  switch    ─> one setsockopt(2) an address
//!  release   ─> the socket stays open here until its queue is empty, and only then leaves
//! ```

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, OFlag};
use socket2::{SockRef, Type};

use super::driver::{Driver, Input};
use super::locals::Locals;
use crate::config::{Handoff, Ready};
use crate::core::{Event, GenerationId};
use crate::drain::connections::Places;
use crate::drain::retired::Retired;
use crate::handoff::adopt::remote::{Address, Caller, LookError};
use crate::listener::steering::{Group, Key, Protocol, SteerError};
use crate::process::spawn::Trap;
use crate::sys::seccomp::{Call, Notification, Notifier};
use crate::sys::socket::{is_readable, queue_length};

/// A generation listens once it has made no further socket for so long.
const QUIET: Duration = Duration::from_millis(250);
/// One that does not listen where the one before does is waited for so long; then that address is given up.
pub(super) const GIVEN_UP: Duration = Duration::from_secs(5);
/// How often the queue of a socket that has been left is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// All sockets that are steered.
#[derive(Debug, Default)]
pub struct Adopted {
    pub(super) groups: BTreeMap<Key, Group>,
    pub(super) locals: Locals,
    /// Of generations that are gone, until their queues are empty.
    left: Vec<(Key, Retired)>,
    /// Ports that the kernel chose for a service that bound port 0: the next generation gets the same.
    chosen: Vec<SocketAddr>,
    pub(super) due: Option<Instant>,
}

/// What becomes of a call.
pub(super) enum Verdict {
    /// As if it had not been caught.
    GoesOn,
    /// It was done in the service's place, with this result.
    Done(nix::Result<()>),
    /// A socket whose queue has connections already takes the place of the service's own.
    Replaced { by: Arc<OwnedFd>, close_on_exec: bool },
}

impl Adopted {
    /// When to look at queues again.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Where generations listen, for the status and for counting.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.groups.iter().filter(|(_, group)| group.members().next().is_some()).map(|(key, _)| key)
    }

    /// Every socket with its owner, each address in the kernel's order.
    pub fn sockets(&self) -> impl Iterator<Item = (GenerationId, &Arc<OwnedFd>)> {
        self.groups.values().flat_map(Group::members).map(|(owner, socket, _)| (owner, socket))
    }

    /// Takes a socket as it is found, in the kernel's order.
    pub fn found(&mut self, owner: GenerationId, socket: OwnedFd) {
        if let Ok(Some(key)) = Key::of(&socket) {
            let group = self.groups.entry(key.clone()).or_insert_with(|| Group::new(key));
            if let Err(error) = group.join(owner, &Arc::new(socket)) {
                tracing::error!(generation = %owner, "{error}");
            }
        }
    }

    fn of(&self, generation: GenerationId) -> Vec<Arc<OwnedFd>> {
        self.sockets().filter(|(owner, _)| *owner == generation).map(|(_, socket)| Arc::clone(socket)).collect()
    }

    fn addresses(&self, generation: GenerationId) -> Vec<Key> {
        let has = |group: &Group| group.members().any(|(owner, _, _)| owner == generation);
        self.groups.iter().filter(|(_, group)| has(group)).map(|(key, _)| key.clone()).collect()
    }
}

impl Driver {
    /// Whether services bind for themselves: nothing else was asked for.
    pub(super) fn adopts(&self) -> bool {
        match self.config.handoff {
            Handoff::Adopt => true,
            Handoff::Auto => self.listeners.is_empty(),
            Handoff::Fds | Handoff::Socket => false,
        }
    }

    /// Takes a generation's calls from now on.
    pub(super) fn watch_calls(&mut self, id: GenerationId, trap: Trap) {
        let Some(running) = self.running.get_mut(&id) else { return };
        if trap.no_new_privs {
            tracing::info!(generation = %id, "cannot gain privileges: setuid programs and file capabilities do nothing for it");
        }
        let notifier = Arc::new(trap.notifier);
        running.notifier = Some(Arc::clone(&notifier));
        let inbox = self.inbox.clone();
        let task = tokio::spawn(async move {
            while let Ok(notification) = notifier.next().await {
                if inbox.send(Input::Caught(id, notification)).is_err() {
                    break;
                }
                tokio::task::yield_now().await;
            }
        });
        running.tasks.add(&task);
        self.guard_files();
    }

    /// A generation called bind(2) or listen(2), and waits.
    pub(super) fn caught(&mut self, id: GenerationId, notification: &Notification) {
        let Some(notifier) = self.running.get(&id).and_then(|running| running.notifier.clone()) else { return };
        let verdict = match self.judge(id, &notifier, notification) {
            Ok(verdict) => verdict,
            Err(LookError::Gone) => return,
            Err(error) => {
                tracing::error!(generation = %id, "a socket of its own cannot be steered: {error}");
                Verdict::GoesOn
            }
        };
        let (call, fd) = (notification.id, fd_of(notification));
        let answered = match verdict {
            Verdict::GoesOn => notifier.go_on(call),
            Verdict::Done(result) => notifier.answer(call, result),
            Verdict::Replaced { by, close_on_exec } => {
                let placed = notifier.put_in_place(call, by.as_fd(), fd, close_on_exec);
                placed.and_then(|placed| if placed { notifier.answer(call, Ok(())) } else { Ok(false) })
            }
        };
        if let Err(error) = answered {
            tracing::error!(generation = %id, "cannot answer its call: {error}");
        }
    }

    fn judge(
        &mut self,
        id: GenerationId,
        notifier: &Notifier,
        notification: &Notification,
    ) -> Result<Verdict, LookError> {
        let caller = Caller::of(notifier, notification)?;
        match notification.call {
            Call::Bind { fd, address, length } => match caller.address(address, length)? {
                Address::Inet(address) => self.binds(id, &caller, fd, address),
                Address::Unix(name) => self.binds_local(id, &caller, fd, name),
                Address::Other => Ok(Verdict::GoesOn),
            },
            Call::Listen { fd, backlog } => Ok(self.listens(id, caller.copy(fd)?, backlog)),
        }
    }

    fn binds(
        &mut self,
        id: GenerationId,
        caller: &Caller<'_>,
        fd: RawFd,
        address: SocketAddr,
    ) -> Result<Verdict, LookError> {
        let own = caller.copy(fd)?;
        let socket = SockRef::from(&own);
        match socket.r#type() {
            Ok(Type::STREAM) => {}
            Ok(Type::DGRAM) if matches!(socket.protocol(), Ok(Some(socket2::Protocol::UDP))) => {
                return self.binds_datagrams(id, caller, fd, own, address);
            }
            Ok(_) | Err(_) => return Ok(Verdict::GoesOn),
        }
        if let Some(held) = self.left_behind(Protocol::Tcp, address) {
            return self.replaces(id, caller, (fd, &own), held, address);
        }
        if let Err(error) = socket.set_reuse_port(true) {
            tracing::warn!(generation = %id, "its socket for {address} cannot be shared with a later one: {error}");
        }
        if let Some(chosen) = self.port_of_before(id, address) {
            if socket.bind(&chosen.into()).is_ok() {
                return Ok(Verdict::Done(Ok(())));
            }
        }
        Ok(Verdict::GoesOn)
    }

    /// The socket of a dead generation takes the place of this one's own.
    pub(super) fn replaces(
        &mut self,
        id: GenerationId,
        caller: &Caller<'_>,
        (fd, own): (RawFd, &OwnedFd),
        held: Arc<OwnedFd>,
        address: SocketAddr,
    ) -> Result<Verdict, LookError> {
        // Status flags are the socket's, close-on-exec is the number's.
        let flags = fcntl(own, FcntlArg::F_GETFL).map_or(OFlag::empty(), OFlag::from_bits_truncate);
        let _cannot_fail_on_an_open_fd = fcntl(&*held, FcntlArg::F_SETFL(flags));
        self.hand_over(&held, id);
        tracing::info!(generation = %id, "gets the socket of {address} that is left, with what waits in its queue");
        Ok(Verdict::Replaced { by: held, close_on_exec: caller.closes_on_exec(fd)? })
    }

    /// The socket of a dead generation at this address, where nobody serves.
    pub(super) fn left_behind(&self, protocol: Protocol, address: SocketAddr) -> Option<Arc<OwnedFd>> {
        if self.machine.serving().is_some() {
            return None;
        }
        let groups = self
            .adopted
            .groups
            .values()
            .filter(|group| group.key().protocol() == protocol && group.key().local() == address);
        let dead = |owner| self.running.get(&owner).is_none_or(|running| running.end.is_some());
        let mut sockets = groups.flat_map(Group::members).filter(|(owner, _, leaving)| !leaving && dead(*owner));
        sockets.next().map(|(_, socket, _)| Arc::clone(socket))
    }

    fn hand_over(&mut self, socket: &Arc<OwnedFd>, to: GenerationId) {
        self.adopted.left.retain(|(_, retired)| !Arc::ptr_eq(retired.socket(), socket));
        for group in self.adopted.groups.values_mut() {
            if let Err(error) = group.hand_over(socket, to) {
                tracing::error!(generation = %to, "{error}");
            }
        }
    }

    /// The port that the kernel chose for the generation before, where this one asks for any.
    fn port_of_before(&self, id: GenerationId, address: SocketAddr) -> Option<SocketAddr> {
        if address.port() != 0 {
            return None;
        }
        let own = self.adopted.addresses(id);
        let mut chosen = self.adopted.chosen.iter().filter(|chosen| chosen.ip() == address.ip());
        chosen.find(|chosen| own.iter().all(|key| key.local() != **chosen)).copied()
    }

    fn listens(&mut self, id: GenerationId, socket: OwnedFd, backlog: i32) -> Verdict {
        if self.listens_local(id, &socket) {
            return Verdict::GoesOn;
        }
        let Ok(Some(key)) = Key::of(&socket) else { return Verdict::GoesOn };
        if key.protocol() != Protocol::Tcp {
            return Verdict::GoesOn;
        }
        let group = self.adopted.groups.entry(key.clone()).or_insert_with(|| Group::new(key.clone()));
        let others = group.members().any(|(owner, _, _)| owner != id);
        if others {
            // Without this it would get connections before it is ready: better that it fails.
            if let Err(error) = group.pin() {
                tracing::error!(generation = %id, "its listen(2) is refused: {error}");
                return Verdict::Done(Err(Errno::EADDRINUSE));
            }
        }
        // Done here, so that the order in the kernel is known.
        if let Err(error) = SockRef::from(&socket).listen(backlog) {
            let errno = error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw);
            tracing::warn!(generation = %id, "cannot listen on {key}: {errno}");
            return Verdict::Done(Err(errno));
        }
        tracing::info!(generation = %id, "listens on {key}");
        if let Err(error) = group.join(id, &Arc::new(socket)) {
            tracing::error!(generation = %id, "{error}");
        }
        self.has_listened(id);
        Verdict::Done(Ok(()))
    }

    pub(super) fn has_listened(&mut self, id: GenerationId) {
        let Some(running) = self.running.get_mut(&id) else { return };
        running.listens += 1;
        let (count, inbox) = (running.listens, self.inbox.clone());
        let task = tokio::spawn(async move {
            for (wait, given_up) in [(QUIET, false), (GIVEN_UP.saturating_sub(QUIET), true)] {
                tokio::time::sleep(wait).await;
                let _loop_is_gone = inbox.send(Input::Quiet { generation: id, count, given_up });
            }
        });
        running.tasks.add(&task);
    }

    /// It made no further socket for a while: it listens, if it does so wherever the one before does.
    pub(super) fn quiet(&mut self, id: GenerationId, count: u32, given_up: bool) {
        let Some(running) = self.running.get(&id) else { return };
        let says_it_itself = match self.config.ready {
            Ready::Listen => false,
            Ready::Auto => self.speaks,
            Ready::Notify | Ready::Probe(_) | Ready::Delay(_) => true,
        };
        if running.ready || running.listens != count || says_it_itself {
            return;
        }
        self.forget_closed_by_who_serves();
        self.forget_closed_locals();
        let own = self.adopted.addresses(id);
        let missing = self.expected().into_iter().filter(|key| !own.contains(key)).map(|key| key.to_string());
        let missing: Vec<_> = missing.chain(self.missing_locals(id)).collect();
        for place in &missing {
            let why = format!("does not listen on {place} yet, where the generation before does");
            if given_up {
                tracing::warn!(generation = %id, "{why}: taken as ready without it");
            } else if let Some(running) = self.running.get_mut(&id) {
                running.why_not = Some(why);
            }
        }
        if missing.is_empty() || given_up {
            self.happened(Event::Ready(id));
        }
    }

    /// Where a candidate has to listen.
    pub(super) fn expected(&self) -> Vec<Key> {
        self.machine.serving().map(|serving| self.adopted.addresses(serving)).unwrap_or_default()
    }

    /// New connections go to this generation from now on, wherever it listens.
    pub(super) fn steer_to(&mut self, to: GenerationId, from: Option<GenerationId>) {
        let chosen: Vec<_> = self.adopted.addresses(to).iter().map(Key::local).collect();
        for group in self.adopted.groups.values_mut() {
            if !group.of(to).is_empty() {
                if let Err(error) = group.steer_to(to) {
                    tracing::error!(generation = %to, "{error}");
                }
            } else if from.is_some_and(|from| !group.of(from).is_empty()) {
                tracing::warn!(generation = %to, "does not listen on {} any more: closed once nobody is left there", group.key());
            }
        }
        self.adopted.chosen = chosen;
        self.switch_locals(to);
        self.tend_left();
    }

    /// A generation is gone. Its sockets stay until what waits in their queues is gone too, or somebody takes it.
    pub(super) fn leave_sockets(&mut self, id: GenerationId) {
        self.leave_locals(id);
        for socket in self.adopted.of(id) {
            let Ok(Some(key)) = Key::of(&*socket) else { continue };
            match Retired::new(socket) {
                Ok(retired) => self.adopted.left.push((key, retired)),
                Err(error) => tracing::error!(generation = %id, "cannot look at its queue: {error}"),
            }
        }
        self.tend_left();
    }

    /// Looks at the queues of sockets that have been left, and closes what is empty.
    pub(super) fn tend_left(&mut self) {
        // With nobody to serve, what comes waits in the dead one's queue for the next one.
        self.adopted.due = None;
        let Some(serving) = self.machine.serving() else { return };
        let running = &self.running;
        let Adopted { groups, left, due, .. } = &mut self.adopted;
        let mut closing = Vec::new();
        left.retain_mut(|(key, retired)| {
            let Some(group) = groups.get_mut(key) else { return false };
            let others = group.members().any(|(owner, _, leaving)| !leaving && owner == serving);
            let in_use = group.members().any(|(owner, _, _)| running.contains_key(&owner));
            match retired.look() {
                Ok(found) if found.half_open > 0 => return true,
                Ok(found) if found.queued > 0 && key.protocol() == Protocol::Udp => {
                    tracing::error!("datagrams that waited at {key} for a generation that is gone are lost");
                }
                Ok(found) if found.queued > 0 => tracing::error!(
                    "{} connections that waited at {key} for a generation that is gone are reset",
                    found.queued
                ),
                Ok(_) | Err(_) => {}
            }
            if others && key.protocol() == Protocol::Udp {
                closing.push((key.clone(), retired.inode()));
                return false;
            }
            if others {
                return !left_group(group.leave(retired.socket()));
            }
            if !in_use {
                tracing::info!("nobody listens on {key} any more: closed");
                groups.remove(key);
            }
            in_use
        });
        // By now the group has the last copy of each.
        for (key, inode) in closing {
            if let (Some(group), Ok(inode)) = (groups.get_mut(&key), inode) {
                left_group(group.leave_inode(inode));
            }
        }
        groups.retain(|_, group| group.members().next().is_some());
        *due = (!left.is_empty()).then(|| Instant::now() + LOOK_AGAIN);
    }

    /// Whether it gets datagrams, of which nobody can see how long it takes to answer them.
    pub(super) fn gets_datagrams(&self, id: GenerationId) -> bool {
        self.gets_local_datagrams(id) || self.adopted.addresses(id).iter().any(|key| key.protocol() == Protocol::Udp)
    }

    /// Whether connections that a generation has not accepted yet, or datagrams, wait in its sockets' queues.
    pub(super) fn has_waiting(&self, id: GenerationId) -> bool {
        // One of TCP that was shut down is readable and has no queue.
        let waits =
            |socket: &OwnedFd| queue_length(socket).map(|queue| queue > Some(0)).or_else(|_| is_readable(socket));
        self.has_waiting_local(id) || self.adopted.of(id).iter().any(|socket| waits(socket).unwrap_or(false))
    }

    /// Where connections are counted.
    pub(super) fn places(&self) -> Places {
        let own = self.listeners.iter().filter_map(crate::listener::Listener::local);
        let of = |protocol| self.adopted.keys().filter(move |key| key.protocol() == protocol).map(Key::local);
        Places {
            tcp: own.chain(of(Protocol::Tcp)).collect(),
            udp: of(Protocol::Udp).collect(),
            unix: self.adopted.locals.names(),
            still_after: self.config.drain_idle,
        }
    }
}

/// Whether a socket left its group.
fn left_group(result: Result<bool, SteerError>) -> bool {
    result.unwrap_or_else(|error| {
        tracing::error!("{error}");
        true
    })
}

fn fd_of(notification: &Notification) -> RawFd {
    match notification.call {
        Call::Bind { fd, .. } | Call::Listen { fd, .. } => fd,
    }
}
