//! Sockets that services make themselves: their bind(2) and listen(2) are caught (`caught`), and new connections are steered.
//!
//! ```text
//!  bind(2)   ─> SO_REUSEPORT is set beforehand, so that the next generation can bind the same address beside this one
//!  listen(2) ─> the address is pinned to whoever gets its connections now; then the socket listens, and gets nothing yet
//!               (UDP has no listen(2): pinned, and bound here, in `datagrams`)
//!  switch    ─> one setsockopt(2) an address
//!  release   ─> the socket stays open here until its queue is empty, and only then leaves
//! ```

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::driver::{Driver, Input};
use super::leaving::Leaving;
use super::locals::Locals;
use super::ports::Ports;
use crate::config::{Handoff, Ready};
use crate::core::{Event, GenerationId};
use crate::drain::connections::Places;
use crate::drain::retired::Retired;
use crate::listener::steering::{Group, Key, Origin, Protocol};
use crate::state::with;
use crate::sys::socket::{is_readable, queue_length};

/// A generation listens once it has made no further socket for so long.
const QUIET: Duration = Duration::from_millis(250);
/// One that does not listen where the one before does is waited for so long; then that address is given up.
pub(super) const GIVEN_UP: Duration = Duration::from_secs(5);
/// How often the queue of a socket that has been left is looked at.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// All sockets that are steered.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Adopted {
    #[serde(with = "with::pairs")]
    pub(super) groups: BTreeMap<Key, Group>,
    pub(super) locals: Locals,
    /// Of generations that are gone, until their queues are empty.
    pub(super) left: Vec<Leaving>,
    /// Of UDP, to be closed once nobody else has them.
    pub(super) closing: Vec<(Key, u64)>,
    pub(super) ports: Ports,
    /// From where a canary gets everything.
    pub(super) diverted: Vec<Origin>,
    #[serde(with = "with::moment_option")]
    pub(super) due: Option<Instant>,
    /// Generations that are told to drain once they have accepted what waits in their own sockets.
    pub(super) emptying: Vec<(GenerationId, Vec<Retired>)>,
    /// When to look at those.
    #[serde(with = "with::moment_option")]
    pub(super) emptying_due: Option<Instant>,
    /// Where zddsup was told to listen, with the place in the list of listeners.
    #[serde(with = "with::pairs")]
    pub(super) declared: BTreeMap<Key, usize>,
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

    /// A socket of one that is gone is this generation's from now on.
    pub(super) fn hand_over(&mut self, socket: &Arc<OwnedFd>, to: GenerationId) {
        self.adopted.left.retain(|leaving| !Arc::ptr_eq(leaving.socket(), socket));
        for group in self.adopted.groups.values_mut() {
            if let Err(error) = group.hand_over(socket, to) {
                tracing::error!(generation = %to, "{error}");
            }
        }
        self.tell_of_gone();
    }

    /// One of its sockets can be used: a supervisor after this one has to know of it.
    pub(super) fn has_listened(&mut self, id: GenerationId) {
        self.record();
        let Some(running) = self.running.get_mut(&id) else { return };
        running.listens += 1;
        self.await_quiet(id);
    }

    /// Reports when it makes no further socket.
    pub(super) fn await_quiet(&mut self, id: GenerationId) {
        let Some(running) = self.running.get_mut(&id).filter(|running| running.listens > 0) else { return };
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
        self.leave_nobodys(to, true);
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
