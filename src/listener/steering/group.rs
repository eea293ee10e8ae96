//! The sockets of one address, in the kernel's order, and who is steered to.
//!
//! An index is a socket's place in the order of listen(2) (of bind(2) for UDP), and when one leaves, the last moves into its
//! place. Between that and the next program an index may name another socket or none, and then the kernel chooses among all.
//! So a socket leaves only when the programs before and after it are right meanwhile; until then it stays, and gets nothing:
//!
//! ```text
//!  [ a b c C ]  steered to C; a leaves: C moves to 0, "3" is nobody      a waits until somebody joins or is switched to
//!  [ a b C C ]  steered to both C; a leaves: first steer to 2 alone, then a goes, then steer to 0 and 2
//!  [ a C ]      a leaves: C is alone, whatever the program says
//! ```

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};
use socket2::SockRef;

use super::key::{Key, Protocol};
use super::program::{Choice, Origin, Part, Rule, TooLong};
use crate::core::GenerationId;
use crate::sys::steer::attach;

/// The sockets of an address. Nothing but this may take a socket out of the group, and whoever lets one in tells it at once.
#[derive(Debug, Serialize, Deserialize)]
pub struct Group {
    key: Key,
    /// By index.
    members: Vec<Member>,
    /// Who gets new connections, and how many beside the others. Nobody: the kernel's hash chooses among all.
    weights: Vec<(GenerationId, u32)>,
    /// Who gets those of one origin.
    diverted: Vec<(Origin, GenerationId)>,
}

/// A socket of a group.
#[derive(Debug, Serialize, Deserialize)]
struct Member {
    owner: GenerationId,
    #[serde(with = "crate::state::fds::shared")]
    socket: Arc<OwnedFd>,
    /// It gets nothing more, and goes as soon as that does no harm.
    leaving: bool,
    /// It gets nothing before that.
    #[serde(with = "crate::state::with::moment_option")]
    from: Option<Instant>,
}

/// What is to be chosen while a socket leaves and the last one moves into its place.
#[derive(Debug)]
enum Meanwhile {
    /// Nothing else: the one that moves is not chosen, or will be alone.
    AsBefore,
    /// Others than the one that moves.
    Without(Choice),
    /// There are no others, or nobody is steered to: it would let a connection go astray.
    Harm,
}

/// Why new connections are not steered as asked. Those of before go on.
#[derive(Debug, thiserror::Error)]
pub enum SteerError {
    /// The generation has no socket there.
    #[error("no generation that is steered to has a socket at {key}: its new version does not listen there")]
    Nobody {
        /// Where.
        key: Key,
    },
    /// EOPNOTSUPP.
    #[error(
        "Linux cannot steer connections of Multipath TCP, with which the service listens at {key}; let it use TCP (Go: \
         GODEBUG=multipathtcp=0), or use `--switch shared`"
    )]
    Multipath {
        /// Where.
        key: Key,
    },
    /// Too many sockets.
    #[error("cannot steer the connections of {key}: {source}; let the service listen with fewer sockets")]
    TooLong {
        /// Where.
        key: Key,
        /// How many.
        source: TooLong,
    },
    /// More sockets than a group has.
    #[error("a group has 65,535 sockets at most, and {key} has them; let the service listen with fewer sockets")]
    Full {
        /// Where.
        key: Key,
    },
    /// EINVAL, ENOMEM (`net.core.optmem_max`), or another error of setsockopt(2).
    #[error("cannot steer the connections of {key}: {step}: {source}")]
    System {
        /// Where.
        key: Key,
        /// What was done.
        step: &'static str,
        /// The error.
        source: io::Error,
    },
    /// The service itself called shutdown(2) on some, and which place is whose is not known any more.
    #[error(
        "the service took several of its sockets out of {key} at once: connections can't be steered there until it is \
         started anew: run `zddsup restart`"
    )]
    Disorder {
        /// Where.
        key: Key,
    },
}

impl Group {
    /// Without a socket yet.
    #[must_use]
    pub fn new(key: Key) -> Group {
        Group { key, members: Vec::new(), weights: Vec::new(), diverted: Vec::new() }
    }

    /// What its sockets have in common.
    #[must_use]
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Its sockets by index, and whether each has left. Whoever takes over lets them join a new group in this order.
    pub fn members(&self) -> impl Iterator<Item = (GenerationId, &Arc<OwnedFd>, bool)> {
        self.members.iter().map(|member| (member.owner, &member.socket, member.leaving))
    }

    /// Who gets new connections, with the weights that were given.
    #[must_use]
    pub fn weights(&self) -> &[(GenerationId, u32)] {
        &self.weights
    }

    /// The indexes of a generation's sockets.
    #[must_use]
    pub fn of(&self, generation: GenerationId) -> Vec<u16> {
        self.slots(|member| member.owner == generation)
    }

    /// The inodes of a generation's sockets.
    #[must_use]
    pub fn inodes_of(&self, generation: GenerationId) -> Vec<u64> {
        let own = self.members.iter().filter(|member| member.owner == generation);
        own.filter_map(|member| inode(&member.socket)).collect()
    }

    /// A socket has come to listen, and is the last one now. Gives its index; the one that it has if it is there already.
    ///
    /// What is steered to its owner is shared with it. For anybody else's, [`Group::pin`] was called before.
    pub fn join(&mut self, owner: GenerationId, socket: &Arc<OwnedFd>) -> Result<u16, SteerError> {
        let index = self.join_from(owner, socket, None)?;
        if self.is_target(owner) {
            self.attach()?;
        }
        self.settle()?;
        Ok(self.index(socket).unwrap_or(index))
    }

    /// The same, but it gets nothing before that, and then only if [`Group::refresh`] finds it open to all.
    pub fn join_from(
        &mut self,
        owner: GenerationId,
        socket: &Arc<OwnedFd>,
        from: Option<Instant>,
    ) -> Result<u16, SteerError> {
        if let Some(index) = self.index(socket) {
            return Ok(index);
        }
        let full = || SteerError::Full { key: self.key.clone() };
        let index = u16::try_from(self.members.len()).ok().filter(|index| *index < u16::MAX).ok_or_else(full)?;
        self.members.push(Member { owner, socket: Arc::clone(socket), leaving: false, from });
        Ok(index)
    }

    /// UDP sockets that were connected to one client meanwhile are not for others, and are let go. The rest takes part when
    /// its time has come. Gives whether it has not yet come for some.
    ///
    /// On Linux 6.18 connect(2) takes a socket out of its group, but the next one to bind would form a new group with it,
    /// beside this one, if it still shared its address by `SO_REUSEPORT`. By `SO_REUSEADDR` it shares it as well.
    pub fn refresh(&mut self, now: Instant) -> Result<bool, SteerError> {
        let connected = |socket: &OwnedFd| SockRef::from(socket).peer_addr().is_ok();
        while let Some(index) = self.members.iter().position(|member| connected(&member.socket)) {
            let member = self.members.swap_remove(index);
            let socket = SockRef::from(&*member.socket);
            let set = socket.set_reuse_address(true).and_then(|()| socket.set_reuse_port(false));
            set.map_err(|source| self.system("letting a client's socket go", source))?;
        }
        for member in &mut self.members {
            member.from = member.from.filter(|from| *from > now);
        }
        self.attach()?;
        self.settle()?;
        Ok(self.members.iter().any(|member| member.from.is_some()))
    }

    /// Everything new goes on to those who get it now: one that joins gets nothing. To be called before it listens.
    pub fn pin(&mut self) -> Result<(), SteerError> {
        if self.weights.is_empty() {
            // As much as each gets by the kernel's hash.
            let mut weights: Vec<(GenerationId, u32)> = Vec::new();
            for member in self.members.iter().filter(|member| !member.leaving) {
                match weights.iter_mut().find(|(owner, _)| *owner == member.owner) {
                    Some((_, sockets)) => *sockets += 1,
                    None => weights.push((member.owner, 1)),
                }
            }
            self.weights = weights;
        }
        self.attach()
    }

    /// Everything new goes to a generation.
    pub fn steer_to(&mut self, generation: GenerationId) -> Result<(), SteerError> {
        self.steer_weighted(&[(generation, 1)])
    }

    /// Each gets its part of everything new: 5 beside 95 is 5 %. The part of one that has no socket here is the others'.
    pub fn steer_weighted(&mut self, weights: &[(GenerationId, u32)]) -> Result<(), SteerError> {
        if !weights.iter().any(|&(generation, weight)| weight > 0 && !self.of(generation).is_empty()) {
            return Err(SteerError::Nobody { key: self.key.clone() });
        }
        let before = std::mem::replace(&mut self.weights, weights.to_vec());
        if let Err(error) = self.attach() {
            self.weights = before;
            return Err(error);
        }
        self.settle()
    }

    /// What comes from there goes to this generation, whoever is steered to. For what was diverted from there before, too.
    pub fn divert(&mut self, from: Origin, to: GenerationId) -> Result<(), SteerError> {
        if self.of(to).is_empty() {
            return Err(SteerError::Nobody { key: self.key.clone() });
        }
        let before = self.diverted.clone();
        self.diverted.retain(|(origin, _)| *origin != from);
        self.diverted.push((from, to));
        self.attach().inspect_err(|_| self.diverted = before)
    }

    /// What comes from there is as everything else again.
    pub fn end_divert(&mut self, from: Origin) -> Result<(), SteerError> {
        self.diverted.retain(|(origin, _)| *origin != from);
        self.attach()?;
        self.settle()
    }

    /// A socket gets nothing more, and is closed for all who have it once that does no harm: now, or when another one joins
    /// or is steered to. While nobody else is steered to, what is new still waits in its queue.
    ///
    /// What its queue has is reset, and so it is to be empty (`drain::retired`). Gives whether it is closed.
    pub fn leave(&mut self, socket: &OwnedFd) -> Result<bool, SteerError> {
        inode(socket).map_or(Ok(true), |inode| self.leave_inode(inode))
    }

    /// The same by its inode. A UDP socket leaves the kernel's group when its last copy is closed, and that is to be the one
    /// here: it must not be anybody else's any more.
    pub fn leave_inode(&mut self, inode: u64) -> Result<bool, SteerError> {
        let Some(index) = self.index_of(inode) else { return Ok(true) };
        self.members[usize::from(index)].leaving = true;
        if self.weights.is_empty() {
            self.pin()?;
        } else {
            self.attach()?;
        }
        self.settle()?;
        Ok(self.index_of(inode).is_none())
    }

    /// Whether a socket would be closed at once if it left now.
    pub fn may_leave(&mut self, socket: &OwnedFd) -> bool {
        let Some(index) = self.index(socket).map(usize::from) else { return true };
        let was = std::mem::replace(&mut self.members[index].leaving, true);
        let may = !matches!(self.meanwhile(index), Meanwhile::Harm);
        self.members[index].leaving = was;
        may
    }

    /// A socket of one that is gone is another generation's from now on, with what waits in its queue.
    pub fn hand_over(&mut self, socket: &OwnedFd, to: GenerationId) -> Result<(), SteerError> {
        let Some(index) = self.index(socket) else { return Ok(()) };
        let member = &mut self.members[usize::from(index)];
        member.owner = to;
        member.leaving = false;
        self.attach()
    }

    /// Finds out whether the service itself took sockets out, with shutdown(2). Gives whose they were.
    pub fn survey(&mut self) -> Result<Vec<GenerationId>, SteerError> {
        if self.key.protocol() == Protocol::Udp {
            return Ok(Vec::new());
        }
        let mut gone = Vec::new();
        for (index, member) in self.members.iter().enumerate() {
            let listens = SockRef::from(&*member.socket).is_listener();
            if !listens.map_err(|source| self.system("asking whether a socket listens", source))? {
                gone.push(index);
            }
        }
        // One went, or one is left, or those at the end went: whatever the order was, it is known who is where.
        let left = self.members.len() - gone.len();
        if gone.len() > 1 && left > 1 && gone.iter().any(|&index| index < left) {
            return Err(SteerError::Disorder { key: self.key.clone() });
        }
        let owners = gone.iter().rev().map(|&index| self.members.swap_remove(index).owner).collect::<Vec<_>>();
        if !owners.is_empty() {
            self.attach()?;
            self.settle()?;
        }
        Ok(owners)
    }

    fn index(&self, socket: &OwnedFd) -> Option<u16> {
        self.index_of(inode(socket)?)
    }

    fn index_of(&self, wanted: u64) -> Option<u16> {
        let index = self.members.iter().position(|member| inode(&member.socket) == Some(wanted))?;
        u16::try_from(index).ok()
    }

    /// Those that are not about to leave, and of which the time has come.
    fn slots(&self, wanted: impl Fn(&Member) -> bool) -> Vec<u16> {
        (0..)
            .zip(&self.members)
            .filter(|(_, member)| !member.leaving && member.from.is_none() && wanted(member))
            .map(|(index, _)| index)
            .collect()
    }

    fn is_target(&self, owner: GenerationId) -> bool {
        self.weights.iter().any(|(generation, _)| *generation == owner)
            || self.diverted.iter().any(|(_, generation)| *generation == owner)
    }

    fn choice(&self) -> Choice {
        let rule = |&(from, to): &(Origin, GenerationId)| Rule { from, slots: self.of(to) };
        let part = |&(generation, weight): &(GenerationId, u32)| Part { weight, slots: self.of(generation) };
        let mut rules: Vec<_> = self.diverted.iter().map(rule).collect();
        let mut parts: Vec<_> = self.weights.iter().map(part).collect();
        rules.retain(|rule| !rule.slots.is_empty());
        parts.retain(|part| part.weight > 0 && !part.slots.is_empty());
        Choice { family: self.key.family(), draw: self.key.draw(), rules, parts }
    }

    /// Gives the group the program for what is wanted now. Nobody there to steer to: it keeps the one that it has.
    fn attach(&self) -> Result<(), SteerError> {
        let choice = self.choice();
        if choice.parts.is_empty() && (choice.rules.is_empty() || !self.weights.is_empty()) {
            return Ok(());
        }
        self.attach_program(&choice)
    }

    fn attach_program(&self, choice: &Choice) -> Result<(), SteerError> {
        let program = choice.program().map_err(|source| SteerError::TooLong { key: self.key.clone(), source })?;
        // Any socket of the group does, but one of Multipath TCP does not take it.
        for member in &self.members {
            match attach(&*member.socket, &program) {
                Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {}
                other => return other.map_err(|source| self.system("attaching the program", source)),
            }
        }
        Err(SteerError::Multipath { key: self.key.clone() })
    }

    fn system(&self, step: &'static str, source: io::Error) -> SteerError {
        SteerError::System { key: self.key.clone(), step, source }
    }

    /// Closes those that are about to leave and do no harm by it.
    fn settle(&mut self) -> Result<(), SteerError> {
        loop {
            // From the end: the last moves nobody.
            let mut leaving = (0..self.members.len()).rev().filter(|&index| self.members[index].leaving);
            let harmless = leaving.find_map(|index| match self.meanwhile(index) {
                Meanwhile::Harm => None,
                Meanwhile::AsBefore => Some((index, None)),
                Meanwhile::Without(choice) => Some((index, Some(choice))),
            });
            let Some((index, choice)) = harmless else { return Ok(()) };
            if let Some(choice) = choice {
                self.attach_program(&choice)?;
            }
            self.remove(index);
            self.attach()?;
        }
    }

    fn meanwhile(&self, index: usize) -> Meanwhile {
        let choice = self.choice();
        let others = self.members.iter().any(|member| !member.leaving);
        if others && choice.parts.is_empty() && !self.weights.is_empty() {
            return Meanwhile::Harm;
        }
        let last = self.members.len() - 1;
        let mover = u16::try_from(last).unwrap_or(u16::MAX);
        if index == last || last == 1 || !choice.slots().any(|slots| slots.contains(&mover)) {
            return Meanwhile::AsBefore;
        }
        let without = choice.without(mover);
        if without.slots().any(Vec::is_empty) {
            return Meanwhile::Harm;
        }
        Meanwhile::Without(without)
    }

    fn remove(&mut self, index: usize) {
        let member = self.members.swap_remove(index);
        if self.key.protocol() == Protocol::Tcp {
            // Closing would not do, as others may have it: one that was forked and forgotten.
            let _it_listened = SockRef::from(&member.socket.as_fd()).shutdown(Shutdown::Read);
        }
    }
}

fn inode(socket: &OwnedFd) -> Option<u64> {
    fstat(socket).map(|found| found.st_ino).ok()
}

#[cfg(test)]
#[path = "group_tests.rs"]
mod tests;
