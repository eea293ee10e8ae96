//! Going on after a supervisor that was killed: who runs with which sockets is written down, and the next supervisor of
//! that name takes the sockets out of the living processes (`pidfd_getfd(2)`). No connection is refused in between: the
//! generation that serves never stopped listening. Where systemd holds the sockets (`stored_above`), that is so although no
//! process of it lives any more: they are nobody's then, and the first generation gets them with what waits in them.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use nix::sys::stat::fstat;
use nix::unistd::{geteuid, Pid};
use procfs::process::{FDTarget, Process};
use socket2::{Domain, SockRef, Type};

use super::driver::Driver;
use super::recorded::{Recorded, RecordedFile, RecordedGeneration, RecordedListener, Role};
use super::running::{Running, Said, Tasks, Watchdog};
use super::spawning::Recipe;
use super::steered::NOBODY;
use super::stored_above::{Own, Returned};
use crate::config::environment;
use crate::core::{GenerationId, Machine, Phase, Source};
use crate::handoff::adopt::file::SocketFile;
use crate::listener::{self, ListenerSpec};
use crate::process::cgroup::Cgroup;
use crate::process::group::{Group, Member};
use crate::process::output::Capture;
use crate::process::program::Program;
use crate::process::spawn::Trap;
use crate::ready::notify::NotifySocket;
use crate::sys::pidfd::PidFd;
use crate::sys::seccomp::Notifier;
use crate::sys::socket::queue_length;
use crate::sys::view::View;

/// What a killed supervisor left behind. Empty where there was none.
#[derive(Debug, Default)]
pub struct Orphans {
    generations: Vec<Orphan>,
    sockets: BTreeMap<String, OwnedFd>,
    /// Names of those of which no process is left: only systemd has them.
    lifeless: BTreeSet<String>,
    adopted: Vec<Adoptee>,
    returned: Returned,
}

/// A socket that a generation made itself.
#[derive(Debug)]
struct Adoptee {
    owner: GenerationId,
    socket: OwnedFd,
    /// Of which process it was taken.
    pid: i32,
    any_port: bool,
    file: Option<RecordedFile>,
}

/// A generation that outlived its supervisor.
#[derive(Debug)]
struct Orphan {
    recorded: RecordedGeneration,
    main: Option<(Member, PidFd)>,
    group: Group,
}

impl Orphans {
    /// Reads what was written down and looks who of it still lives.
    #[must_use]
    pub fn find(state_file: &Path, mut returned: Returned) -> Orphans {
        let recorded = returned.recorded.take().or_else(|| Recorded::read(state_file));
        let Some(recorded) = recorded else { return Orphans { returned, ..Orphans::default() } };
        let generations: Vec<_> = recorded.generations.into_iter().filter_map(Orphan::find).collect();
        let (mut sockets, mut lifeless) = (BTreeMap::new(), BTreeSet::new());
        let mut groups: BTreeMap<String, Vec<Option<Adoptee>>> = BTreeMap::new();
        let serves =
            |id| generations.iter().any(|orphan| orphan.recorded.number == id && orphan.recorded.role == Role::Serving);
        for listener in recorded.listeners {
            let living = generations.iter().find_map(|orphan| orphan.socket(listener.inode));
            let lives = living.is_some();
            let found = living.or_else(|| Some((own_pid(), returned.socket(listener.inode)?)));
            match (listener.adopted_from, found) {
                (Some(owner), found) => {
                    let found = found.filter(|(_, socket)| lives || !has_left(socket));
                    if let (None, Some(file)) = (&found, &listener.file) {
                        remove_stale(file);
                    }
                    let owner =
                        if generations.iter().any(|orphan| orphan.recorded.number == owner) { owner } else { NOBODY };
                    // One of several: that of the generation that serves, if it has one.
                    let wanted = !listener.name.is_empty() && (serves(owner) || !sockets.contains_key(&listener.name));
                    if let Some(copy) = found.as_ref().filter(|_| wanted).and_then(|(_, fd)| fd.try_clone().ok()) {
                        sockets.insert(listener.name, copy);
                    }
                    let (any_port, file) = (listener.any_port, listener.file);
                    let adoptee = found.map(|(pid, socket)| Adoptee { owner, socket, pid, any_port, file });
                    groups.entry(listener.group).or_default().push(adoptee);
                }
                (None, Some((_, fd))) => {
                    if !lives {
                        lifeless.insert(listener.name.clone());
                    }
                    sockets.insert(listener.name, fd);
                }
                (None, None) => {
                    tracing::warn!(listener = listener.name, "no living generation holds its socket any more");
                }
            }
        }
        let adopted = groups.into_values().flat_map(in_order).collect();
        // Copies, and what nobody knows of: in the way of those that are bound.
        returned.close_sockets();
        Orphans { generations, sockets, lifeless, adopted, returned }
    }

    /// Closes listeners that nobody has and that are asked for no more, before others are bound: they may be in the way. Gives
    /// their inodes. Where a service bound for itself, and zddsup is to listen now, that one's socket is the listener.
    pub fn close_unasked(&mut self, specs: &[ListenerSpec]) -> Vec<u64> {
        for (place, adoptee) in self.adopted.iter().enumerate().filter(|(_, adoptee)| adoptee.owner == NOBODY) {
            let Ok(copy) = adoptee.socket.try_clone() else { continue };
            let mut one = BTreeMap::from([(format!("adopted-{place}"), copy)]);
            listener::take_unasked(&mut one, specs);
            self.sockets.append(&mut one);
        }
        let (mut lifeless, living): (BTreeMap<_, _>, BTreeMap<_, _>) =
            std::mem::take(&mut self.sockets).into_iter().partition(|(name, _)| self.lifeless.contains(name));
        let unasked = listener::take_unasked(&mut lifeless, specs);
        self.sockets = living;
        self.sockets.append(&mut lifeless);
        let close = |(name, fd): (String, OwnedFd)| {
            let waiting = queue_length(&fd).ok().flatten().unwrap_or(0);
            if waiting > 0 {
                tracing::error!(
                    listener = name,
                    "is asked for no more, and {waiting} connections wait in its queue: reset"
                );
            } else {
                tracing::info!(
                    listener = name,
                    "was a listener of the supervisor before and is asked for no more: closed"
                );
            }
            // systemd has a copy for another moment.
            let _only_of_those_that_listen = SockRef::from(&fd).shutdown(std::net::Shutdown::Read);
            fstat(&fd).map_or(0, |found| found.st_ino)
        };
        unasked.into_iter().map(close).collect()
    }

    /// Takes out the sockets, by the names that they had.
    pub fn sockets(&mut self) -> BTreeMap<String, OwnedFd> {
        std::mem::take(&mut self.sockets)
    }
}

impl Orphan {
    fn find(mut recorded: RecordedGeneration) -> Option<Orphan> {
        let member = Member { pid: recorded.main_pid, start_ticks: recorded.main_start_ticks };
        let main = member.open().ok().map(|pidfd| (member, pidfd));
        let leader = Member { pid: recorded.pid, start_ticks: recorded.start_ticks };
        let cgroup = recorded.cgroup.take().and_then(Cgroup::recorded);
        let group = Group::new(leader, &recorded.marker).within(cgroup);
        if let Some((member, _)) = &main {
            group.admit(*member);
        }
        let lives = main.is_some() || !group.is_empty().unwrap_or(true);
        lives.then_some(Orphan { recorded, main, group })
    }

    /// A copy of a socket, and of which process: its main one, if that has it; else a worker.
    fn socket(&self, inode: u64) -> Option<(i32, OwnedFd)> {
        let of = |member: Member, pidfd: &PidFd| Some((member.pid, socket_of(member, pidfd, inode)?));
        let of_main = self.main.as_ref().and_then(|(member, pidfd)| of(*member, pidfd));
        of_main.or_else(|| {
            let members = self.group.pids().unwrap_or_default().into_iter().map(Pid::from_raw);
            members.filter_map(|pid| Member::of(pid).ok()).find_map(|member| of(member, &member.open().ok()?))
        })
    }
}

fn own_pid() -> i32 {
    Pid::this().as_raw()
}

/// Whether a socket that nobody has was taken out of its address before: one that does not listen.
fn has_left(socket: &OwnedFd) -> bool {
    let socket = SockRef::from(socket);
    socket.r#type().is_ok_and(|kind| kind != Type::DGRAM) && !socket.is_listener().unwrap_or(false)
}

/// The file of a Unix socket that was left for a supervisor after that one, while the socket is gone by now.
fn remove_stale(file: &RecordedFile) {
    let found = View::of(own_pid()).and_then(|view| SocketFile::found(view, &file.directory, &file.name, &file.hidden));
    if let Err(error) = found.and_then(|found| found.remove(true)) {
        tracing::debug!("the file of a socket that is gone is left alone: {error}");
    }
}

/// The sockets of an address as the kernel has them now: into the place of one that nobody holds any more, the last moved
/// (`reuseport_detach_sock`).
fn in_order<T>(mut recorded: Vec<Option<T>>) -> Vec<T> {
    while let Some(gone) = recorded.iter().position(Option::is_none) {
        recorded.swap_remove(gone);
    }
    recorded.into_iter().flatten().collect()
}

/// A copy of a process' socket with that inode.
pub(super) fn socket_of(member: Member, pidfd: &PidFd, inode: u64) -> Option<OwnedFd> {
    let fds = Process::new(member.pid).ok()?.fd().ok()?;
    let fd = fds.flatten().find(|fd| matches!(fd.target, FDTarget::Socket(other) if other == inode))?.fd;
    pidfd.take_fd(fd).inspect_err(|error| tracing::warn!(pid = member.pid, "cannot take its socket: {error}")).ok()
}

/// What a process that this supervisor did not spawn runs, so that a rollback can run it again.
fn recipe_of(pid: i32) -> Option<Recipe> {
    let process = Process::new(pid).ok()?;
    let env = process.environ().ok()?.into_iter().filter(|(name, _)| !environment::is_for_zddsup(name)).collect();
    Some(Recipe {
        program: Arc::new(Program::of_process(Pid::from_raw(pid)).ok()?),
        args: process.cmdline().ok()?.into_iter().map(OsString::from).collect(),
        env,
        directory: process.cwd().ok()?,
    })
}

impl Driver {
    /// Makes what a killed supervisor left its own. Whether one of it serves.
    pub(super) fn take_over(&mut self, mut orphans: Orphans) -> bool {
        let nobody_lives = orphans.generations.is_empty();
        if nobody_lives && orphans.adopted.is_empty() {
            return false;
        }
        let is_shared = |socket: &OwnedFd| {
            let local = SockRef::from(socket).local_addr().ok().and_then(|local| local.as_socket());
            self.listeners.iter().any(|listener| !listener.is_steered() && listener.local() == local)
        };
        let (shared, steered): (Vec<_>, Vec<_>) =
            orphans.adopted.into_iter().partition(|adoptee| is_shared(&adoptee.socket));
        drop(shared);
        for Adoptee { owner, socket, pid, any_port, file } in steered {
            if any_port {
                self.adopted.ports.bound(owner, &socket);
            }
            if SockRef::from(&socket).domain().is_ok_and(|domain| domain == Domain::UNIX) {
                self.adopted.locals.found(owner, socket, pid, file.as_ref());
            } else {
                self.adopted.found(owner, socket);
            }
        }
        self.hold_declared();
        if nobody_lives {
            self.adopted.ports.left_by(NOBODY);
            return false;
        }
        // Who served; else who is ready.
        let living = |role| {
            let mut all = orphans.generations.iter();
            all.find(|orphan| orphan.recorded.role == role && orphan.main.is_some())
                .map(|orphan| orphan.recorded.number)
        };
        let incumbent = living(Role::Serving).or_else(|| living(Role::Canary));
        let mut leaving = Vec::new();
        for Orphan { recorded, main, group } in orphans.generations {
            let id = recorded.number;
            if incumbent != Some(id) {
                leaving.push(id);
            }
            tracing::warn!(
                generation = %id,
                pid = recorded.main_pid,
                "found alive, its supervisor was killed: {}",
                if incumbent == Some(id) { "it serves on until this command is ready" } else { "it is drained" }
            );
            let recipe = main.as_ref().and_then(|(member, _)| recipe_of(member.pid));
            let stored = orphans.returned.take(Own::Stderr, &recorded.marker);
            let stderr = stored.or_else(|| main.as_ref().and_then(|(_, pidfd)| pidfd.take_fd(2).ok()));
            let notify = orphans.returned.take(Own::Notify, &recorded.marker);
            let calls = orphans.returned.take(Own::Calls, &recorded.marker);
            let running = Running {
                id,
                source: Source::Recorded(id),
                program: recipe.as_ref().map(|recipe| Arc::clone(&recipe.program)),
                marker: recorded.marker,
                uid: geteuid(),
                since: Instant::now(),
                executed: None,
                main: None,
                cgroup: None,
                group: Some(Arc::new(group)),
                notify: notify.and_then(|fd| NotifySocket::found(fd).ok()).map(Arc::new),
                notifier: None,
                listens: 0,
                has_listened: false,
                probed: false,
                drained: None,
                seen: None,
                channel: None,
                capture: stderr.and_then(|pipe| Capture::adopt(&pipe, &self.output).ok()),
                told_to_drain: None,
                said: Said::default(),
                ready: recorded.role != Role::Starting,
                connections: None,
                why_not: None,
                spawn_error: None,
                end: None,
                flags_before: self.flags(),
                watchdog: Watchdog::default(),
                tasks: Tasks::default(),
            };
            self.running.insert(id, running);
            if let Some(recipe) = recipe {
                self.recipes.insert(id, recipe);
            }
            match main {
                Some((member, pidfd)) => self.watch_main(id, member, pidfd, None),
                None => self.main_is_gone(id),
            }
            self.listen_to(id);
            if let Some(notifier) = calls.and_then(|fd| Notifier::new(fd).ok()) {
                self.watch_calls(id, Trap { notifier, no_new_privs: false });
            }
        }
        let policy = self.machine.policy().clone();
        self.machine = Machine::resume(policy, incumbent, &leaving, self.now());
        if let Some(incumbent) = incumbent {
            // A canary that it was may still get its share.
            self.steer_to(incumbent, None);
        }
        incumbent.is_some()
    }

    /// Writes down who runs with which sockets, for the supervisor after this one.
    pub(super) fn record(&mut self) {
        let generations =
            self.machine.generations().filter_map(|(id, generation)| self.recorded(id, generation.phase)).collect();
        let listeners = self
            .listeners
            .iter()
            .filter(|listener| !listener.is_steered())
            .map(|listener| RecordedListener {
                name: listener.name().to_owned(),
                inode: listener.inode(),
                adopted_from: None,
                group: String::new(),
                any_port: false,
                file: None,
            })
            .chain(self.adopted.sockets().map(|(key, owner, socket)| {
                let name = self.adopted.declared.get(key).map(|at| self.listeners[*at].name().to_owned());
                let inode = fstat(socket).map_or(0, |found| found.st_ino);
                RecordedListener {
                    name: name.unwrap_or_default(),
                    inode,
                    adopted_from: Some(owner),
                    group: key.to_string(),
                    any_port: self.adopted.ports.chose(owner, inode),
                    file: None,
                }
            }))
            .chain(self.adopted.locals.recorded())
            .collect();
        let recorded = Recorded::new(generations, listeners);
        if let Err(error) = recorded.write(&self.state_file) {
            let path = self.state_file.display();
            tracing::warn!("cannot write {path}: {error}; a supervisor after this one could not take over");
        }
        self.store_above(&recorded);
    }

    fn recorded(&self, id: GenerationId, phase: Phase) -> Option<RecordedGeneration> {
        let running = self.running.get(&id)?;
        let leader = running.group.as_ref()?.leader();
        let main = running.main.as_ref().map_or(leader, |main| main.member);
        Some(RecordedGeneration {
            number: id,
            pid: leader.pid,
            start_ticks: leader.start_ticks,
            main_pid: main.pid,
            main_start_ticks: main.start_ticks,
            marker: running.marker.clone(),
            cgroup: running.group.as_ref()?.cgroup().map(Cgroup::record),
            role: match phase {
                Phase::Canary { .. } => Role::Canary,
                Phase::Serving { .. } => Role::Serving,
                Phase::Spawning { .. } | Phase::Starting { .. } | Phase::Aborting => Role::Starting,
                Phase::Standby { .. }
                | Phase::Draining { .. }
                | Phase::Stopping { .. }
                | Phase::Killing { .. }
                | Phase::Sweeping { .. }
                | Phase::Clearing { .. } => Role::Leaving,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_last_one_moves_into_a_hole() {
        assert_eq!(super::in_order(vec![None, Some(2), Some(3), Some(4)]), [4, 2, 3]);
        assert_eq!(super::in_order(vec![Some(1), None, None]), [1]);
        assert!(super::in_order(vec![None::<u8>]).is_empty());
    }
}
