//! What generations say: notify messages (`sd_notify(3)`) and handoff messages (docs/handoff.md).
//!
//! Nothing here trusts the sender: who it is, is checked against the generation's processes, and what it says is a
//! fact about itself only.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::{getpgid, Pid};

use super::driver::Driver;
use super::store::Change;
use crate::core::{Event, GenerationId};
use crate::handoff::channel::Incoming;
use crate::process::group::Member;
use crate::proto::handoff::FromGeneration;
use crate::proto::notify::Field;
use crate::ready::notify::Datagram;
use crate::sys::scm::Credentials;

/// What a message asks for besides its fields that stand alone.
#[derive(Default)]
struct Fds {
    store: bool,
    remove: bool,
    name: Option<String>,
    unpolled: bool,
}

impl Driver {
    /// A datagram on a generation's notify socket.
    pub(super) fn notified(&mut self, id: GenerationId, datagram: Datagram) {
        let sender = datagram.sender.pid;
        if !self.is_of(id, sender) && !self.was_of(id, datagram.sender) {
            tracing::warn!(generation = %id, pid = sender, "notify message from a process that is not of this generation: ignored");
            return;
        }
        let fields = match datagram.fields {
            Ok(fields) => fields,
            Err(error) => {
                tracing::warn!(generation = %id, pid = sender, "notify message ignored: {error}");
                return;
            }
        };
        if let Some(running) = self.running.get_mut(&id) {
            running.said.anything = true;
        }
        let mut fds = Fds::default();
        for field in fields {
            self.said(id, field, &mut fds);
        }
        self.store_fds(id, fds, datagram.fds);
    }

    fn said(&mut self, id: GenerationId, field: Field, fds: &mut Fds) {
        let Some(running) = self.running.get_mut(&id) else { return };
        match field {
            Field::Ready => self.says_ready(id),
            Field::Status(text) => {
                running.said.status = Some(text);
                self.news_of(id);
            }
            Field::Errno(errno) => running.said.errno = Some(errno),
            Field::BusError(error) => running.said.bus_error = Some(error),
            Field::Stopping => running.said.stopping = true,
            Field::MainPid(pid) => self.main_pid(id, pid),
            Field::Watchdog => running.watchdog.fed_if_due(Instant::now()),
            Field::WatchdogTrigger => {
                tracing::error!(generation = %id, "asked for its watchdog to be triggered");
                self.happened(Event::WatchdogExpired(id));
            }
            Field::WatchdogUsec(usec) => {
                running.watchdog.every = (usec > 0).then(|| Duration::from_micros(usec));
                if running.ready {
                    running.watchdog.fed(Instant::now());
                }
            }
            Field::ExtendTimeoutUsec(usec) => {
                let until = self.now() + Duration::from_micros(usec);
                self.happened(Event::Extended(id, until));
            }
            Field::FdStore => fds.store = true,
            Field::FdStoreRemove => fds.remove = true,
            Field::FdName(name) => fds.name = Some(name),
            Field::FdPoll(polled) => fds.unpolled = !polled,
            // BARRIER=1: its fd is closed with the datagram, after all that came before was taken.
            Field::Barrier | Field::Reloading | Field::MonotonicUsec(_) => {}
            Field::Unknown(name) => tracing::debug!(generation = %id, "unknown notify field {name}"),
        }
    }

    fn store_fds(&mut self, id: GenerationId, wish: Fds, fds: Vec<OwnedFd>) {
        let ready = self.running.get(&id).is_some_and(|running| running.ready);
        let name = wish.name.unwrap_or_else(|| "stored".to_owned());
        if wish.remove {
            self.store.change(id, ready, Change::Remove { name });
        } else if wish.store {
            let polled = !wish.unpolled;
            let refused = self.store.change(id, ready, Change::Add { name, fds, polled });
            if refused > 0 {
                tracing::warn!(generation = %id, refused, "the fd store is full: raise --fdstore-max");
            }
        }
    }

    /// Whether a process is one of the generation's. Asked the cheap way first.
    fn is_of(&self, id: GenerationId, pid: i32) -> bool {
        let Some(running) = self.running.get(&id) else { return false };
        if running.pid() == Some(pid) {
            return true;
        }
        let Some(group) = &running.group else { return false };
        let leader = group.leader().pid;
        pid == leader
            || getpgid(Some(Pid::from_raw(pid))).is_ok_and(|pgid| pgid.as_raw() == leader)
            || group.contains(Pid::from_raw(pid)).unwrap_or(false)
    }

    /// Whether a process that has ended may have been one of the generation's: `systemd-notify --ready` and its like are gone
    /// before anybody can look. The kernel says which user it was: another one's word does not
    /// count.
    fn was_of(&self, id: GenerationId, sender: Credentials) -> bool {
        let has_ended = sender.pid > 0 && kill(Pid::from_raw(sender.pid), None) == Err(Errno::ESRCH);
        has_ended && self.running.get(&id).is_some_and(|running| running.uid.as_raw() == sender.uid)
    }

    /// MAINPID=: from now on that process' end is the generation's.
    fn main_pid(&mut self, id: GenerationId, pid: i32) {
        if self.running.get(&id).is_none_or(|running| running.pid() == Some(pid)) {
            return;
        }
        if !self.is_of(id, pid) {
            tracing::warn!(generation = %id, pid, "MAINPID names a process that is not of this generation: ignored");
            return;
        }
        match Member::of(Pid::from_raw(pid)).and_then(|member| Ok((member, member.open()?))) {
            Ok((member, pidfd)) => {
                tracing::info!(generation = %id, pid, "has a new main process");
                self.watch_main(id, member, pidfd, None);
                self.record();
            }
            Err(error) => tracing::warn!(generation = %id, pid, "MAINPID ignored: {error}"),
        }
    }

    /// A message on a generation's handoff socket.
    pub(super) fn heard(&mut self, id: GenerationId, incoming: Incoming) {
        let Some(running) = self.running.get_mut(&id) else { return };
        let (message, fds) = match incoming {
            Incoming::Message { message, fds } => (message, fds),
            Incoming::Malformed(error) => {
                tracing::warn!(generation = %id, "handoff socket closed: {error}");
                running.channel = None;
                return;
            }
            Incoming::Closed => {
                running.channel = None;
                return;
            }
        };
        match message {
            // A switch by probe may have come before: what is kept for it could not be told until now.
            FromGeneration::Hello { .. } => self.pass_on_kept(),
            FromGeneration::Ready => self.says_ready(id),
            FromGeneration::Status { text } => {
                running.said.status = Some(text);
                self.news_of(id);
            }
            FromGeneration::Keep { name, state } => {
                if !self.kept.keep(id, name, state, fds.into_iter().map(Arc::new).collect()) {
                    tracing::warn!(generation = %id, "handoff socket closed: more is kept than the limits allow");
                    running.channel = None;
                }
                self.pass_on_kept();
            }
            FromGeneration::Taken { id: kept } => self.kept.taken(id, kept),
            FromGeneration::Drained => self.has_drained(id),
        }
    }
}
