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
use super::leaving::Leaving;
use super::locals::Locals;
use super::ports::Ports;
use crate::config::{Handoff, Ready};
use crate::core::{Event, GenerationId};
use crate::drain::connections::{has_socket, Places};
use crate::drain::retired::Retired;
use crate::handoff::adopt::remote::{Address, Caller, LookError};
use crate::listener::steering::{Group, Key, Origin, Protocol};
use crate::process::spawn::Trap;
use crate::sys::seccomp::{Call, Notification, Notifier};
use crate::sys::socket::{is_readable, queue_length};

/// A generation listens once it has made no further socket for so long.
const QUIET: Duration = Duration::from_millis(250);
/// One that does not listen where the one before does is waited for so long; then that address is given up.
pub(super) const GIVEN_UP: Duration = Duration::from_secs(5);
/// How often the queue of a socket that has been left is looked at.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// All sockets that are steered.
#[derive(Debug, Default)]
pub struct Adopted {
    pub(super) groups: BTreeMap<Key, Group>,
    pub(super) locals: Locals,
    /// Of generations that are gone, until their queues are empty.
    pub(super) left: Vec<Leaving>,
    /// Of UDP, to be closed once nobody else has them.
    pub(super) closing: Vec<(Key, u64)>,
    pub(super) ports: Ports,
    /// From where a canary gets everything.
    pub(super) diverted: Vec<Origin>,
    pub(super) due: Option<Instant>,
    /// Generations that are told to drain once they have accepted what waits in their own sockets.
    pub(super) emptying: Vec<(GenerationId, Vec<Retired>)>,
    /// When to look at those.
    pub(super) emptying_due: Option<Instant>,
    /// Where zddsup was told to listen, with the place in the list of listeners.
    pub(super) declared: BTreeMap<Key, usize>,
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
        self.due.into_iter().chain(self.emptying_due).min()
    }

    /// Where generations listen, for the status and for counting.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.groups.iter().filter(|(_, group)| group.members().next().is_some()).map(|(key, _)| key)
    }

    /// Every socket with its owner, each address in the kernel's order.
    pub fn sockets(&self) -> impl Iterator<Item = (&Key, GenerationId, &Arc<OwnedFd>)> {
        self.groups.iter().flat_map(|(key, group)| group.members().map(move |(owner, socket, _)| (key, owner, socket)))
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

    pub(super) fn of(&self, generation: GenerationId) -> Vec<Arc<OwnedFd>> {
        self.sockets().filter(|(_, owner, _)| *owner == generation).map(|(_, _, socket)| Arc::clone(socket)).collect()
    }

    pub(super) fn addresses(&self, generation: GenerationId) -> Vec<Key> {
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
            Call::Listen { fd, backlog } => self.listens(id, &caller, fd, backlog),
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
        let (asked, before) = (address, self.port_of_before(id, address));
        let address = before.unwrap_or(asked);
        let place = self.listeners.iter().position(|at| at.is_steered() && at.is_meant_by(&own, asked));
        let local = place.and_then(|place| self.listeners[place].local()).unwrap_or(address);
        if let Some(held) = self.waiting_at(id, local) {
            if before.is_some() {
                self.adopted.ports.bound(id, &held);
            }
            return self.replaced(id, caller, (fd, &own), held);
        }
        if let Some(place) = place {
            return Ok(Verdict::Done(self.bind_as_declared(id, place, own)));
        }
        self.warn_of_another(id, address);
        if let Err(error) = socket.set_reuse_port(true) {
            tracing::warn!(generation = %id, "its socket for {address} cannot be shared with a later one: {error}");
        }
        // Done here, so that the port is known. Where it cannot be had any more, the kernel chooses another one.
        if asked.port() == 0 && [address, asked].iter().any(|&address| socket.bind(&address.into()).is_ok()) {
            self.adopted.ports.bound(id, &own);
            return Ok(Verdict::Done(Ok(())));
        }
        Ok(Verdict::GoesOn)
    }

    /// A socket with what waits in its queue takes the place of the service's own.
    pub(super) fn replaced(
        &mut self,
        id: GenerationId,
        caller: &Caller<'_>,
        (fd, own): (RawFd, &OwnedFd),
        held: Arc<OwnedFd>,
    ) -> Result<Verdict, LookError> {
        // Status flags are the socket's, close-on-exec is the number's.
        let flags = fcntl(own, FcntlArg::F_GETFL).map_or(OFlag::empty(), OFlag::from_bits_truncate);
        let close_on_exec = caller.closes_on_exec(fd)?;
        let _cannot_fail_on_an_open_fd = fcntl(&*held, FcntlArg::F_SETFL(flags));
        self.hand_over(&held, id);
        tracing::info!(generation = %id, "gets the socket that is left, with what waits in its queue");
        Ok(Verdict::Replaced { by: held, close_on_exec })
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

    pub(super) fn hand_over(&mut self, socket: &Arc<OwnedFd>, to: GenerationId) {
        self.adopted.left.retain(|leaving| !Arc::ptr_eq(leaving.socket(), socket));
        for group in self.adopted.groups.values_mut() {
            if let Err(error) = group.hand_over(socket, to) {
                tracing::error!(generation = %to, "{error}");
            }
        }
        self.tell_of_gone();
    }

    /// The port that the kernel chose for the generation before, where this one asks for any.
    fn port_of_before(&self, id: GenerationId, asked: SocketAddr) -> Option<SocketAddr> {
        let group = self.running.get(&id)?.group.as_ref()?;
        let is_open = |inode: u64| {
            let pids = group.pids().unwrap_or_default();
            u32::try_from(inode).is_ok_and(|inode| has_socket(&pids, inode))
        };
        self.adopted.ports.of_before(id, asked, is_open)
    }

    fn listens(
        &mut self,
        id: GenerationId,
        caller: &Caller<'_>,
        fd: RawFd,
        backlog: i32,
    ) -> Result<Verdict, LookError> {
        let socket = caller.copy(fd)?;
        if self.listens_local(id, &socket) {
            return Ok(Verdict::GoesOn);
        }
        let Ok(Some(key)) = Key::of(&socket) else { return Ok(Verdict::GoesOn) };
        if key.protocol() != Protocol::Tcp {
            return Ok(Verdict::GoesOn);
        }
        // It came to wait between bind(2) and this.
        if let Some(held) = self.waiting_at(id, key.local()) {
            self.has_listened(id);
            return self.replaced(id, caller, (fd, &socket), held);
        }
        let backlog = self.adopted.declared.get(&key).map_or(backlog, |place| self.listeners[*place].backlog());
        let group = self.adopted.groups.entry(key.clone()).or_insert_with(|| Group::new(key.clone()));
        let others = group.members().any(|(owner, _, _)| owner != id);
        if others {
            // Without this it would get connections before it is ready: better that it fails.
            if let Err(error) = group.pin() {
                tracing::error!(generation = %id, "its listen(2) is refused: {error}");
                return Ok(Verdict::Done(Err(Errno::EADDRINUSE)));
            }
        }
        // Done here, so that the order in the kernel is known.
        if let Err(error) = SockRef::from(&socket).listen(backlog) {
            let errno = error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw);
            tracing::warn!(generation = %id, "cannot listen on {key}: {errno}");
            return Ok(Verdict::Done(Err(errno)));
        }
        tracing::info!(generation = %id, "listens on {key}");
        let socket = Arc::new(socket);
        if let Err(error) = group.join(id, &socket) {
            tracing::error!(generation = %id, "{error}");
        }
        self.record();
        self.has_listened(id);
        if others && self.machine.serving().is_none() {
            if let Some(held) = self.take_what_comes(id, &key, &socket) {
                return self.replaced(id, caller, (fd, &socket), held);
            }
        }
        Ok(Verdict::Done(Ok(())))
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
            Ready::Listen | Ready::Probe(_) => false,
            Ready::Auto => self.speaks,
            Ready::Notify | Ready::Delay(_) => true,
        };
        if running.ready || running.listens != count || says_it_itself {
            return;
        }
        self.forget_closed_by_who_serves();
        self.forget_closed_locals();
        let own = self.adopted.addresses(id);
        let missing = self.expected().into_iter().filter(|key| !own.contains(key)).map(|key| {
            match self.adopted.declared.get(&key) {
                Some(place) => format!("{key} yet, as --listen asks (listener {})", self.listeners[*place].name()),
                None => format!("{key} yet, where the generation before does"),
            }
        });
        let locals = self.missing_locals(id).into_iter();
        let missing: Vec<_> =
            missing.chain(locals.map(|place| format!("{place} yet, where the generation before does"))).collect();
        for place in &missing {
            let why = format!("does not listen on {place}");
            if given_up {
                tracing::warn!(generation = %id, "{why}: not waited for any longer");
            } else if let Some(running) = self.running.get_mut(&id) {
                running.why_not = Some(why);
            }
        }
        let Some(running) = self.running.get_mut(&id) else { return };
        running.has_listened |= missing.is_empty() || given_up;
        if running.has_listened && (running.probed || !matches!(self.config.ready, Ready::Probe(_))) {
            self.happened(Event::Ready(id));
        }
    }

    /// Where a candidate has to listen.
    pub(super) fn expected(&self) -> Vec<Key> {
        if !self.adopts() {
            return Vec::new();
        }
        match self.machine.serving() {
            Some(serving) => self.adopted.addresses(serving),
            None => self.adopted.declared.keys().cloned().collect(),
        }
    }

    /// New connections go to this generation from now on, wherever it listens.
    pub(super) fn steer_to(&mut self, to: GenerationId, from: Option<GenerationId>) {
        let listens: Vec<_> = self.adopted.addresses(to).iter().map(Key::local).collect();
        for group in self.adopted.groups.values_mut() {
            if !group.of(to).is_empty() {
                if let Err(error) = group.steer_to(to) {
                    tracing::error!(generation = %to, "{error}");
                }
            } else if from.is_some_and(|from| !group.of(from).is_empty()) {
                let key = group.key();
                let what_then = if self.adopted.declared.contains_key(key) {
                    "what comes there goes to the old one, and waits once that is gone"
                } else {
                    "closed once nobody is left there"
                };
                tracing::warn!(generation = %to, "does not listen on {key} any more: {what_then}");
            } else if self.adopted.declared.contains_key(group.key()) {
                tracing::warn!(generation = %to, "does not listen on {}, which --listen asks for: what comes there waits", group.key());
            }
        }
        self.leave_nobodys(to);
        let running = &self.running;
        self.adopted.ports.serves(to, &listens, |owner| running.contains_key(&owner));
        self.switch_locals(to);
        self.tend_left();
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

fn fd_of(notification: &Notification) -> RawFd {
    match notification.call {
        Call::Bind { fd, .. } | Call::Listen { fd, .. } => fd,
    }
}
