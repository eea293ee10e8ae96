//! Addresses where each generation has a socket of its own and zddsup was told to listen; and whom a probe reaches.
//!
//! The first socket is there before any generation is, and is nobody's. It is the first generation's then, and each later
//! one gets another. With nobody to serve, what comes waits in the socket of the one before, which the next one is given:
//!
//! ```text
//!  fds, socket   the socket itself is handed to it
//!  adopt         its own is bound in zddsup's name, with the options of --listen, and from its listen(2) on it gets what
//!                is new. Only where connections wait already, the socket that has them takes the place of its own
//! ```

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;

use super::adopting::{Adopted, LOOK_AGAIN};
use super::driver::Driver;
use super::spawning::LaunchError;
use crate::core::{GenerationId, Stage};
use crate::drain::diag;
use crate::drain::retired::Retired;
use crate::listener::steering::{Group, Key, Origin, Protocol};
use crate::listener::{BindError, Listener};
use crate::ready::divert::{Way, Wish};
use crate::sys::socket::queue_length;

/// Owner of a socket that no generation has. They are numbered from 1.
pub(super) const NOBODY: GenerationId = GenerationId(0);

impl Adopted {
    /// A probe of this generation wants to reach it alone, or does not any more.
    pub fn grant(&mut self, id: GenerationId, wish: Wish) {
        match wish {
            Wish::Begin { from, to, way } => {
                let _prober_is_gone = way.send(self.divert(id, from, to));
            }
            Wish::End { from } => {
                for group in self.groups.values_mut() {
                    if let Err(error) = group.end_divert(Origin::socket(from)) {
                        tracing::error!("{error}");
                    }
                }
            }
        }
    }

    /// What comes from there to this address reaches this generation alone. Where sockets of several groups take what
    /// comes there, as at `0.0.0.0` and `127.0.0.1`, it is steered in each: the kernel says which one gets it.
    fn divert(&mut self, id: GenerationId, from: SocketAddr, to: SocketAddr) -> Way {
        let mut way = Way::Anyone;
        for group in self.groups.values_mut().filter(|group| group.key().takes(to)) {
            if group.of(id).is_empty() {
                if way == Way::Anyone {
                    way = Way::Others;
                }
                continue;
            }
            match group.divert(Origin::socket(from), id) {
                Ok(()) => way = Way::Alone,
                Err(error) => return Way::Failed(error.to_string()),
            }
        }
        way
    }
}

/// How many connections wait in a socket's queue, or may come to in a moment.
fn waiting(socket: &OwnedFd, local: SocketAddr) -> u32 {
    let mut half_open = 0;
    let _counted_as_none = diag::half_open(&[local], |_| half_open += 1);
    queue_length(socket).ok().flatten().unwrap_or(0) + half_open
}

impl Driver {
    /// Whether each generation has a socket of its own wherever this service takes connections, so that one that was
    /// switched away from gets nothing new.
    pub(super) fn steers_all(&self) -> bool {
        let of_its_own = self.adopts() && !self.cannot_trap;
        of_its_own || !self.listeners.is_empty() && self.listeners.iter().all(Listener::is_steered)
    }

    /// Notes the sockets that are there before any generation.
    pub(super) fn hold_declared(&mut self) {
        for (place, listener) in self.listeners.iter().enumerate().filter(|(_, listener)| listener.is_steered()) {
            let socket = listener.fd();
            let Ok(Some(key)) = Key::of(&*socket) else { continue };
            self.adopted.declared.insert(key.clone(), place);
            let group = self.adopted.groups.entry(key.clone()).or_insert_with(|| Group::new(key));
            // It is there already if a supervisor before us had it.
            if let Err(error) = group.join(NOBODY, &socket) {
                tracing::error!(listener = listener.name(), "{error}");
            }
        }
    }

    /// A generation's own socket at a listener, that listens.
    pub(super) fn own_socket(&mut self, id: GenerationId, place: usize) -> Result<Arc<OwnedFd>, LaunchError> {
        let mut declared = self.adopted.declared.iter();
        let Some((key, _)) = declared.find(|(_, other)| **other == place) else {
            return Ok(self.listeners[place].fd());
        };
        let key = key.clone();
        if let Some(held) = self.free(id, key.local()) {
            self.hand_over(&held, id);
            self.listeners[place].renew_flags(&held);
            return Ok(held);
        }
        Ok(self.one_more(id, &key, place)?)
    }

    /// One more socket in a group. It gets nothing while others do.
    fn one_more(&mut self, owner: GenerationId, key: &Key, place: usize) -> Result<Arc<OwnedFd>, OneMoreError> {
        let listener = &self.listeners[place];
        let socket = Arc::new(listener.another()?);
        let group = self.adopted.groups.entry(key.clone()).or_insert_with(|| Group::new(key.clone()));
        if group.members().next().is_some() {
            group.pin()?;
        }
        listener.listen(&socket).map_err(|source| OneMoreError::Listen { key: key.clone(), source })?;
        group.join(owner, &socket)?;
        Ok(socket)
    }

    /// The socket at this address in which connections wait for somebody to come: nobody's; one that was kept for the next
    /// generation; or, where nobody serves, that of a generation that is gone, or to which what is new is steered still.
    fn free(&self, taker: GenerationId, local: SocketAddr) -> Option<Arc<OwnedFd>> {
        let nobody_serves = self.machine.serving().is_none();
        let is_gone = |owner| self.running.get(&owner).is_none_or(|running| running.end.is_some());
        let here = |group: &&Group| group.key().protocol() == Protocol::Tcp && group.key().local() == local;
        let sockets = self.adopted.groups.values().filter(here).flat_map(|group| {
            let is_target = |owner| group.weights().iter().any(|(target, _)| *target == owner);
            let waits = move |owner| owner == NOBODY || nobody_serves && (is_gone(owner) || is_target(owner));
            let is_kept = |socket| {
                let mut kept = self.adopted.left.iter().filter(|leaving| leaving.is_kept());
                kept.any(|leaving| Arc::ptr_eq(leaving.socket(), socket))
            };
            let is_free = move |owner, socket| owner != taker && (waits(owner) || is_kept(socket));
            group.members().filter(move |(owner, socket, leaving)| !leaving && is_free(*owner, socket))
        });
        let fullest = sockets.max_by_key(|(_, socket, _)| waiting(socket, local));
        fullest.map(|(_, socket, _)| Arc::clone(socket))
    }

    /// The same, if connections wait in it.
    pub(super) fn waiting_at(&self, taker: GenerationId, local: SocketAddr) -> Option<Arc<OwnedFd>> {
        self.free(taker, local).filter(|socket| waiting(socket, local) > 0)
    }

    /// A service's own socket is bound where zddsup was told to listen.
    pub(super) fn bind_as_declared(&self, id: GenerationId, place: usize, own: OwnedFd) -> nix::Result<()> {
        let listener = &self.listeners[place];
        listener.bind_for(own).map_err(|error| {
            tracing::error!(generation = %id, listener = listener.name(), "its bind(2) fails: {error}");
            error.errno().unwrap_or(Errno::EADDRINUSE)
        })
    }

    /// It binds beside what `--listen` has, with the same port: hardly what was meant.
    pub(super) fn warn_of_another(&self, id: GenerationId, address: SocketAddr) {
        let beside = |listener: &&Listener| {
            listener.is_steered() && listener.local().is_some_and(|local| local.port() == address.port())
        };
        for listener in self.listeners.iter().filter(beside) {
            tracing::warn!(
                generation = %id,
                "binds {address}, and --listen has {}, which is another address: it takes the very same one",
                listener.address()
            );
        }
    }

    /// Nobody serves, and a candidate listens beside the socket in which connections waited: what is new is its own from
    /// now on. Gives that socket if a connection came at the last moment and is to be served too.
    pub(super) fn take_what_comes(&mut self, id: GenerationId, key: &Key, own: &Arc<OwnedFd>) -> Option<Arc<OwnedFd>> {
        let group = self.adopted.groups.get_mut(key)?;
        if let Err(error) = group.steer_to(id) {
            tracing::error!(generation = %id, "{error}");
            return None;
        }
        let late = self.waiting_at(id, key.local());
        let group = self.adopted.groups.get_mut(key)?;
        if let Some(late) = late.filter(|_| waiting(own, key.local()) == 0) {
            // Its own one leaves once the other is steered to, which is as soon as that is its own.
            let swapped = group.hand_over(&late, id).and_then(|()| group.leave(own).map(drop));
            if let Err(error) = swapped {
                tracing::error!(generation = %id, "{error}");
            }
            return Some(late);
        }
        self.leave_nobodys(id, false);
        None
    }

    /// Where this generation gets what is new, a socket that nobody has is needed no more. If it `serves`, nor are those of
    /// a supervisor before this one at addresses where it does not listen, and `--listen` does not ask for it.
    pub(super) fn leave_nobodys(&mut self, id: GenerationId, serves: bool) {
        let Adopted { groups, left, declared, .. } = &self.adopted;
        let is_left = |socket| left.iter().any(|leaving| Arc::ptr_eq(leaving.socket(), socket));
        let is_over = |group: &Group| serves && !declared.contains_key(group.key());
        let groups = groups.values().filter(|group| !group.of(id).is_empty() || is_over(group));
        let nobodys = groups.flat_map(Group::members).filter(|(owner, _, leaving)| *owner == NOBODY && !leaving);
        let sockets: Vec<_> = nobodys.map(|(_, socket, _)| socket).filter(|socket| !is_left(socket)).cloned().collect();
        for socket in sockets {
            self.adopted.leave(NOBODY, socket);
        }
    }

    /// The one that served is gone while another starts: what is new waits for that one, as nobody else could take it. If it
    /// fails, its sockets are the next one's.
    pub(super) fn steer_to_the_only_one(&mut self, gone: GenerationId) {
        let Stage::Starting(flight) = self.machine.stage() else { return };
        if self.machine.serving() != Some(gone) {
            return;
        }
        let candidate = flight.candidate;
        for group in self.adopted.groups.values_mut().filter(|group| !group.of(candidate).is_empty()) {
            if let Err(error) = group.steer_to(candidate) {
                tracing::error!(generation = %candidate, "{error}");
            }
        }
    }

    /// Puts right what a generation did to sockets of its own: the queue's size; and shutdown(2), after which another
    /// socket takes what comes, for the next generation.
    pub(super) fn repair_declared(&mut self) {
        let declared: Vec<_> = self.adopted.declared.iter().map(|(key, place)| (key.clone(), *place)).collect();
        let serving = self.machine.serving();
        for (key, place) in declared {
            let Some(group) = self.adopted.groups.get_mut(&key) else { continue };
            match group.survey() {
                Ok(owners) => {
                    for owner in owners {
                        tracing::error!(
                            generation = %owner,
                            "called shutdown(2) on its socket of {key}: what waited in its queue was reset by that call"
                        );
                    }
                }
                Err(error) => tracing::error!("{error}"),
            }
            for (_, socket, _) in group.members().filter(|(owner, _, leaving)| Some(*owner) == serving && !leaving) {
                if let Err(error) = self.listeners[place].listen(socket) {
                    tracing::error!("cannot set the queue of {key}: {error}");
                }
            }
            let takes = |owner| serving.is_none_or(|serving| owner == serving) || owner == NOBODY;
            if !group.members().any(|(owner, _, leaving)| takes(owner) && !leaving) {
                if let Err(error) = self.hold_again(&key, place) {
                    tracing::error!("nobody listens on {key}: {error}");
                }
            }
        }
    }

    /// A generation is to drain, and others get what is new: whether connections may wait in its own sockets, which it
    /// accepts before it is told to stop. Nobody else could.
    pub(super) fn empties_first(&mut self, id: GenerationId) -> bool {
        let others_serve = self.machine.serving().is_some_and(|serving| serving != id);
        let sockets = self.adopted.of(id).into_iter().filter_map(|socket| Retired::new(socket).ok());
        let sockets: Vec<_> = sockets.filter(|_| others_serve).collect();
        if sockets.is_empty() || self.running.get(&id).is_none_or(|running| running.end.is_some()) {
            return false;
        }
        self.adopted.emptying.push((id, sockets));
        self.tend_emptying();
        true
    }

    /// Looks at the queues of generations that are to drain, and tells those that have none any more.
    pub(super) fn tend_emptying(&mut self) {
        let (running, mut told) = (&self.running, Vec::new());
        self.adopted.emptying.retain_mut(|(id, sockets)| {
            if running.get(id).is_none_or(|running| running.end.is_some()) {
                return false;
            }
            sockets.retain_mut(|socket| socket.look().is_ok_and(|left| !left.is_nothing()));
            if sockets.is_empty() {
                told.push(*id);
            }
            !sockets.is_empty()
        });
        self.adopted.emptying_due = (!self.adopted.emptying.is_empty()).then(|| Instant::now() + LOOK_AGAIN);
        for id in told {
            if self.is_draining(id) {
                self.begin_drain(id);
            }
        }
    }

    fn hold_again(&mut self, key: &Key, place: usize) -> Result<(), OneMoreError> {
        self.one_more(NOBODY, key, place)?;
        if let Some(group) = self.adopted.groups.get_mut(key) {
            group.steer_to(NOBODY)?;
        }
        tracing::info!("listens on {key} again, for whoever comes next");
        Ok(())
    }
}

/// Why a generation cannot have a socket of its own.
#[derive(Debug, thiserror::Error)]
pub enum OneMoreError {
    /// It cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// It cannot listen.
    #[error("cannot listen on {key} with one more socket: {source}")]
    Listen {
        /// Where.
        key: Key,
        /// Why not.
        source: std::io::Error,
    },
    /// What comes would go astray.
    #[error(transparent)]
    Steer(#[from] crate::listener::steering::SteerError),
}
