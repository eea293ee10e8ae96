//! Sockets of generations that are gone. What waits in their queues, because a process was killed or never accepted it, is
//! saved where it can be:
//!
//! ```text
//!  nobody serves                      the next generation is given the socket
//!  somebody serves there              the kernel moves the queue to its sockets, while this one is closed
//!  the kernel can't, or may not       the socket stays, and the next generation is given it
//!  nobody listens there any more      it is reset
//! ```

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::adopting::{Adopted, LOOK_AGAIN};
use super::driver::Driver;
use super::steered::NOBODY;
use crate::core::GenerationId;
use crate::drain::migration::moving;
use crate::drain::retired::{Left, Retired};
use crate::listener::steering::{Key, Protocol, SteerError};
use crate::listener::Listener;
use crate::sys::socket::queue_length;

/// A socket whose generation is gone.
#[derive(Debug, Serialize, Deserialize)]
pub struct Leaving {
    owner: GenerationId,
    key: Key,
    retired: Retired,
    /// Its queue waits for the next generation.
    kept: bool,
    /// What became of its queue is known: it is closed as soon as that does the others no harm.
    let_go: bool,
}

impl Leaving {
    /// The socket.
    pub fn socket(&self) -> &Arc<OwnedFd> {
        self.retired.socket()
    }

    /// Whether what waits in it is for the next generation, though another one serves.
    pub fn is_kept(&self) -> bool {
        self.kept
    }
}

/// What became of a queue.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Moved,
    Kept,
    Reset,
}

impl Adopted {
    /// A socket is nobody's from now on.
    pub fn leave(&mut self, owner: GenerationId, socket: Arc<OwnedFd>) {
        let Ok(Some(key)) = Key::of(&*socket) else { return };
        match Retired::new(socket) {
            Ok(retired) => self.left.push(Leaving { owner, key, retired, kept: false, let_go: false }),
            Err(error) => tracing::error!(generation = %owner, "cannot look at its queue: {error}"),
        }
    }
}

impl Driver {
    /// A generation is gone. Its sockets stay until what waits in their queues is gone too, or somebody takes it.
    pub(super) fn leave_sockets(&mut self, id: GenerationId) {
        self.leave_locals(id);
        for socket in self.adopted.of(id) {
            self.adopted.leave(id, socket);
        }
        self.departed.insert(id);
        self.tend_left();
    }

    /// Looks at the queues of sockets that have been left, and closes what is empty.
    pub(super) fn tend_left(&mut self) {
        self.adopted.due = None;
        // With nobody to serve, what comes waits in the dead one's queue for the next one.
        if let Some(serving) = self.machine.serving() {
            let mut left = std::mem::take(&mut self.adopted.left);
            let before = left.len();
            let looks: Vec<_> = left.iter_mut().map(|leaving| leaving.retired.look().ok()).collect();
            let mut index = 0;
            left.retain_mut(|leaving| {
                let look = looks[index];
                index += 1;
                self.tend(leaving, look, serving)
            });
            let some_left = left.len() < before;
            self.adopted.left.extend(left);
            self.close_datagrams();
            self.adopted.groups.retain(|_, group| group.members().next().is_some());
            if some_left {
                self.record();
            }
            let awaited = self.adopted.left.iter().any(|leaving| !leaving.kept);
            self.adopted.due = awaited.then(|| Instant::now() + LOOK_AGAIN);
        }
        self.tell_of_gone();
    }

    /// Whether it stays.
    fn tend(&mut self, leaving: &mut Leaving, look: Option<Left>, serving: GenerationId) -> bool {
        let queued = match look {
            Some(left) if left.half_open > 0 => return true,
            Some(left) => left.queued,
            None => 0,
        };
        if queued > 0 && !leaving.let_go {
            match self.save(leaving, queued, serving) {
                None => return true,
                Some(fate) => self.prove_fate(leaving, queued, fate),
            }
        }
        leaving.let_go = true;
        leaving.kept || self.stays(leaving, serving)
    }

    /// What becomes of what waits. None: that is not known yet.
    fn save(&mut self, leaving: &mut Leaving, queued: u32, serving: GenerationId) -> Option<Fate> {
        let Adopted { groups, declared, .. } = &mut self.adopted;
        let group = groups.get_mut(&leaving.key)?;
        let lives = |owner: GenerationId| self.running.contains_key(&owner);
        let serves = group.members().any(|(owner, _, leaving)| !leaving && owner == serving);
        let in_use = group.members().any(|(owner, ..)| lives(owner));
        if leaving.key.protocol() == Protocol::Udp {
            return (serves || !in_use).then_some(Fate::Reset);
        }
        // Where it would be moved to is not known while others are there, who serve no more or not yet.
        if group.members().any(|(owner, ..)| owner != serving && lives(owner)) {
            return None;
        }
        if !serves {
            return Some(if declared.contains_key(&leaving.key) { Fate::Kept } else { Fate::Reset });
        }
        if !group.may_leave(leaving.socket()) {
            return None;
        }
        match moving(|| left_group(group.leave(leaving.socket()))) {
            Ok(left) => left.then_some(Fate::Moved),
            Err(why) => {
                tracing::warn!(
                    generation = %leaving.owner,
                    "{queued} connections wait at {} for it, and it is gone: the next generation gets them; with \
                     net.ipv4.tcp_migrate_req=1 the one that serves would ({why})",
                    leaving.key
                );
                leaving.kept = true;
                Some(Fate::Kept)
            }
        }
    }

    fn prove_fate(&mut self, leaving: &Leaving, queued: u32, fate: Fate) {
        let (owner, key, queued) = (leaving.owner, &leaving.key, u64::from(queued));
        let what = if key.protocol() == Protocol::Udp { "datagrams" } else { "connections" };
        match fate {
            Fate::Moved => {
                tracing::warn!(generation = %owner, "{queued} {what} waited at {key} for it when it was gone: moved to who serves");
            }
            Fate::Kept => {}
            Fate::Reset => {
                tracing::error!(generation = %owner, "{queued} {what} waited at {key} for it when it was gone: lost");
            }
        }
        self.reports.prove(owner, |proof| {
            proof.queued_when_gone += queued;
            *match fate {
                Fate::Moved => &mut proof.moved,
                Fate::Kept => &mut proof.kept,
                Fate::Reset => &mut proof.reset,
            } += queued;
        });
    }

    /// Nothing waits in it that could be saved: whether it cannot be closed yet.
    fn stays(&mut self, leaving: &Leaving, serving: GenerationId) -> bool {
        let Adopted { groups, closing, declared, .. } = &mut self.adopted;
        let Leaving { key, retired, .. } = leaving;
        let Some(group) = groups.get_mut(key) else { return false };
        let serves = group.members().any(|(owner, _, leaving)| !leaving && owner == serving);
        if serves && key.protocol() == Protocol::Udp {
            closing.extend(retired.inode().ok().map(|inode| (key.clone(), inode)));
            return false;
        }
        if serves {
            return !left_group(group.leave(retired.socket()));
        }
        if group.members().any(|(owner, ..)| self.running.contains_key(&owner)) {
            return true;
        }
        if declared.contains_key(key) {
            return group.hand_over(retired.socket(), NOBODY).is_err();
        }
        tracing::info!("nobody listens on {key} any more: closed");
        groups.remove(key);
        false
    }

    /// By now the group has the last copy of each.
    fn close_datagrams(&mut self) {
        for (key, inode) in std::mem::take(&mut self.adopted.closing) {
            if let Some(group) = self.adopted.groups.get_mut(&key) {
                left_group(group.leave_inode(inode));
            }
        }
    }

    /// A generation is gone once its sockets are, too.
    pub(super) fn tell_of_gone(&mut self) {
        let left = &self.adopted.left;
        let gone: Vec<_> = self
            .departed
            .iter()
            .copied()
            .filter(|id| !left.iter().any(|leaving| leaving.owner == *id && !leaving.let_go))
            .collect();
        for id in gone {
            self.departed.remove(&id);
            self.reports.released(id, Instant::now());
        }
    }

    /// New connections go to another generation: how many this one has not accepted yet.
    pub(super) fn prove_switch(&mut self, from: GenerationId) {
        let shared = self.listeners.iter().filter(|listener| !listener.is_steered()).map(Listener::fd);
        let sockets = self.adopted.of(from).into_iter().chain(shared);
        let queued = sockets.filter_map(|socket| queue_length(&*socket).ok().flatten()).map(u64::from).sum();
        self.reports.prove(from, |proof| proof.queued_at_switch = queued);
    }

    /// Everything is gone, and the sockets go now: with what still waits for somebody to come.
    pub(super) fn tell_of_unserved(&self) {
        let shared = self.listeners.iter().filter(|listener| !listener.is_steered());
        let shared = shared.map(|listener| (listener.address(), listener.fd()));
        let own = self.adopted.sockets().map(|(key, _, socket)| (key.to_string(), Arc::clone(socket)));
        for (place, socket) in shared.chain(own) {
            let Ok(Some(queued @ 1..)) = queue_length(&*socket) else { continue };
            if self.stored_above.is_on() {
                tracing::info!(
                    "{queued} connections wait at {place} for the next start, if this is a restart: systemd holds it"
                );
            } else {
                tracing::warn!("{queued} connections wait at {place}, and nobody is left to take them: reset");
            }
        }
    }

    /// A generation is stopped: how many connections it has still, if that is because its drain time is over.
    pub(super) fn prove_stop(&mut self, id: GenerationId) {
        let Some(running) = self.running.get_mut(&id) else { return };
        if running.drained.take() != Some(false) || running.end.is_some() {
            return;
        }
        let cut = running.connections.unwrap_or(0);
        if cut > 0 {
            tracing::error!(generation = %id, "{cut} connections were left when its drain time was over: cut");
        }
        self.reports.prove(id, |proof| proof.cut += cut);
    }
}

/// Whether a socket left its group.
fn left_group(result: Result<bool, SteerError>) -> bool {
    result.unwrap_or_else(|error| {
        tracing::error!("{error}");
        true
    })
}
