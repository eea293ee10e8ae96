//! What systemd holds for the supervisor after this one (`FDSTORE=1` in `sd_notify(3)`): sockets stay open and their queues
//! fill while no zddsup is there, in `systemctl restart`, after a crash, after SIGKILL. Kept in step with what is recorded:
//!
//! ```text
//! zddsup/socket/INODE     listeners, and what generations listen on
//! zddsup/state            what is recorded (`slots`), without which nobody knows whose each socket is
//! zddsup/stderr/MARKER    a generation's own: it goes on writing; its
//! zddsup/calls/MARKER     calls of bind(2) and listen(2) wait for the next zddsup instead of failing;
//! zddsup/notify/MARKER    what it says waits too
//! ```
//!
//! Each start gets all of it back among its `LISTEN_FDS`. Not stored: sockets of a unit, which systemd has anyway; and UDP
//! sockets that a service bound for itself, as the last copy of one has to be zddsup's own: only so its place in the kernel's
//! order is known when it leaves.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::stat::{fstat, SFlag};
use nix::unistd::pipe2;
use serde::{Deserialize, Serialize};

use super::above::{connect, is_local, PATIENCE};
use super::driver::Driver;
use super::recorded::Recorded;
use super::slots::Slots;
use crate::listener::inherit::STORED;
use crate::listener::steering::Protocol;
use crate::sys::scm;

/// How many are stored where systemd does not say how many it takes (before 254): as many as our units allow.
const USUAL: usize = 512;

/// What was stored by now.
#[derive(Debug, Default)]
pub struct StoredAbove {
    /// `NOTIFY_SOCKET` of one that stores.
    place: Option<OsString>,
    most: usize,
    names: BTreeSet<String>,
    state: Option<Slots>,
}

/// What another program needs of it that goes on.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Carried {
    names: BTreeSet<String>,
    state: Option<Slots>,
}

/// What came back at the start.
#[derive(Debug, Default)]
pub struct Returned {
    /// As the supervisor before recorded it last.
    pub recorded: Option<Recorded>,
    sockets: BTreeMap<u64, OwnedFd>,
    others: BTreeMap<String, OwnedFd>,
}

/// A generation's own.
#[derive(Debug, Clone, Copy)]
pub enum Own {
    /// The read end of its stderr.
    Stderr,
    /// Its calls that are caught.
    Calls,
    /// Its `NOTIFY_SOCKET`.
    Notify,
}

/// Something that is to be stored.
struct Wanted<'a> {
    name: String,
    fd: BorrowedFd<'a>,
    /// Dropped by systemd once its other end is gone.
    polled: bool,
}

impl Own {
    fn name(self, marker: &str) -> String {
        let what = match self {
            Own::Stderr => "stderr",
            Own::Calls => "calls",
            Own::Notify => "notify",
        };
        format!("{STORED}{what}/{marker}")
    }
}

impl Returned {
    /// A copy of a socket that the service had.
    #[must_use]
    pub fn socket(&self, inode: u64) -> Option<OwnedFd> {
        self.sockets.get(&inode)?.try_clone().ok()
    }

    /// Those of which no copy was taken are open no more.
    pub fn close_sockets(&mut self) {
        self.sockets.clear();
    }

    /// What a generation had.
    pub fn take(&mut self, what: Own, marker: &str) -> Option<OwnedFd> {
        self.others.remove(&what.name(marker))
    }
}

impl StoredAbove {
    /// As the environment names the one above, with what it gave back. It is systemd, and zddsup its main process, if it says
    /// how much it stores (`FDSTORE`, from 254 on) or which process it started (`SYSTEMD_EXEC_PID`, from 248 on): another
    /// zddsup, say, would hand what is stored to a second one that is to run beside this one.
    #[must_use]
    pub fn from_environment(returned: Vec<(String, OwnedFd)>) -> (StoredAbove, Returned) {
        let is_systemds = std::env::var("SYSTEMD_EXEC_PID").is_ok_and(|pid| pid == std::process::id().to_string());
        let most = match std::env::var("FDSTORE") {
            Ok(most) => most.parse().unwrap_or(0),
            Err(_) if is_systemds => USUAL,
            Err(_) => 0,
        };
        StoredAbove::new(std::env::var_os("NOTIFY_SOCKET"), most, returned)
    }

    fn new(place: Option<OsString>, most: usize, returned: Vec<(String, OwnedFd)>) -> (StoredAbove, Returned) {
        let names = returned.iter().map(|(name, _)| name.clone()).collect();
        let mut stored =
            StoredAbove { place: place.filter(|place| most > 0 && is_local(place)), most, names, state: None };
        let mut back = Returned::default();
        for (name, fd) in returned {
            let (kind, rest) = name[STORED.len()..].split_once('/').unwrap_or((&name[STORED.len()..], ""));
            match kind {
                "state" => {
                    let found = Slots::found(fd);
                    back.recorded = found.as_ref().and_then(|(_, bytes)| Recorded::parse(bytes));
                    if back.recorded.is_none() {
                        tracing::warn!("the state that systemd holds cannot be read: left alone");
                    }
                    stored.state = found.map(|(slots, _)| slots);
                }
                "socket" => {
                    let found = fstat(&fd)
                        .ok()
                        .filter(|found| SFlag::from_bits_truncate(found.st_mode).contains(SFlag::S_IFSOCK));
                    match found {
                        Some(found) if rest == found.st_ino.to_string() => drop(back.sockets.insert(found.st_ino, fd)),
                        _ => tracing::warn!(name, "systemd holds something that is not what its name says: left alone"),
                    }
                }
                _ => drop(back.others.insert(name, fd)),
            }
        }
        (stored, back)
    }

    /// For the program that goes on with it.
    pub fn carry(&self) -> io::Result<Carried> {
        let state = self.state.as_ref().map(Slots::try_clone).transpose()?;
        Ok(Carried { names: self.names.clone(), state })
    }

    /// Goes on where another program was.
    pub fn resume(&mut self, carried: Carried) {
        (self.names, self.state) = (carried.names, carried.state);
    }

    /// Whether what is open here stays open when zddsup is gone.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.place.is_some()
    }

    /// Stores what is new, then what is recorded, and lets go of what is wanted no more: whenever zddsup is killed, what is
    /// recorded is there.
    fn keep(&mut self, wanted: &[Wanted<'_>], recorded: &Recorded) -> io::Result<()> {
        let socket = match &self.place {
            Some(place) => connect(place)?,
            None => return Ok(()),
        };
        let state = format!("{STORED}state");
        let slots = match &mut self.state {
            Some(slots) => slots,
            none => {
                // Of something else by this name.
                if self.names.remove(&state) {
                    send(&socket, &removal(&state), &[])?;
                }
                none.insert(Slots::new()?)
            }
        };
        // The first, so that it is there whatever there is room for.
        if !self.names.contains(&state) {
            send(&socket, &format!("FDSTORE=1\nFDNAME={state}\nFDPOLL=0"), &[slots.memory().as_fd()])?;
            self.names.insert(state.clone());
        }
        for Wanted { name, fd, polled } in wanted.iter().take(self.most.saturating_sub(1)) {
            if !self.names.contains(name) {
                let poll = if *polled { "" } else { "\nFDPOLL=0" };
                send(&socket, &format!("FDSTORE=1\nFDNAME={name}{poll}"), &[*fd])?;
                self.names.insert(name.clone());
            }
        }
        slots.write(&recorded.bytes()?)?;
        let unwanted = |name: &String| *name != state && !wanted.iter().any(|wanted| wanted.name == *name);
        for name in self.names.iter().filter(|name| unwanted(name)).cloned().collect::<Vec<_>>() {
            send(&socket, &removal(&name), &[])?;
            self.names.remove(&name);
        }
        Ok(())
    }

    /// Lets go of sockets, and waits until systemd has: their addresses are needed.
    pub fn let_go(&mut self, inodes: &[u64]) {
        let Some(place) = self.place.as_ref().filter(|_| !inodes.is_empty()) else { return };
        let names: Vec<_> = inodes.iter().map(|inode| socket_name(*inode)).collect();
        let gone = connect(place).and_then(|socket| {
            names.iter().try_for_each(|name| send(&socket, &removal(name), &[]))?;
            barrier(&socket)
        });
        match gone {
            Ok(()) => self.names.retain(|name| !names.contains(name)),
            Err(error) => tracing::warn!("systemd may still hold sockets that are asked for no more: {error}"),
        }
    }
}

fn socket_name(inode: u64) -> String {
    format!("{STORED}socket/{inode}")
}

fn removal(name: &str) -> String {
    format!("FDSTOREREMOVE=1\nFDNAME={name}")
}

/// Waits a moment where its queue is full.
fn send(socket: &impl AsFd, text: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    match scm::send(socket.as_fd(), text.as_bytes(), fds) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            await_event(socket.as_fd(), PollFlags::POLLOUT)?;
            scm::send(socket.as_fd(), text.as_bytes(), fds)
        }
        other => other,
    }
}

/// Waits until all that was sent before was acted on (`sd_notify_barrier(3)`): the one above closes its end of a pipe then.
fn barrier(socket: &impl AsFd) -> io::Result<()> {
    let (ours, theirs) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    send(socket, "BARRIER=1", &[theirs.as_fd()])?;
    drop(theirs);
    await_event(ours.as_fd(), PollFlags::POLLHUP)
}

fn await_event(fd: BorrowedFd<'_>, event: PollFlags) -> io::Result<()> {
    let limit = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::ZERO);
    match poll(&mut [PollFd::new(fd, event)], limit)? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

impl Driver {
    /// Keeps what systemd holds in step with what is recorded.
    pub(super) fn store_above(&mut self, recorded: &Recorded) {
        if !self.stored_above.is_on() {
            return;
        }
        let own = self.listeners.iter().filter(|listener| !listener.is_steered() && !listener.is_passed());
        let shared = own.map(crate::listener::Listener::fd);
        let adopted = self.adopted.sockets().filter(|(key, ..)| key.protocol() == Protocol::Tcp);
        let adopted = adopted.map(|(_, _, socket)| Arc::clone(socket));
        let sockets: Vec<_> = shared.chain(adopted).chain(self.adopted.locals.sockets()).collect();
        let named = sockets.iter().filter_map(|socket| Some((socket_name(fstat(socket).ok()?.st_ino), socket)));
        let mut wanted: Vec<_> =
            named.map(|(name, socket)| Wanted { name, fd: socket.as_fd(), polled: false }).collect();
        for running in self.running.values().filter(|running| running.end.is_none()) {
            let mut add = |what: Own, fd, polled| wanted.push(Wanted { name: what.name(&running.marker), fd, polled });
            if let Some(capture) = &running.capture {
                add(Own::Stderr, capture.pipe().as_fd(), true);
            }
            if let Some(notifier) = &running.notifier {
                add(Own::Calls, (**notifier).as_fd(), true);
            }
            if let Some(notify) = &running.notify {
                add(Own::Notify, (**notify).as_fd(), false);
            }
        }
        if let Err(error) = self.stored_above.keep(&wanted, recorded) {
            tracing::warn!("systemd could not be given all that is to outlive zddsup: {error}");
        }
    }
}

#[cfg(test)]
#[path = "stored_above_tests.rs"]
mod tests;
