//! The calls that were caught: who makes them, at which address, and what becomes of them.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, OFlag};
use socket2::{SockRef, Type};

use super::driver::{Driver, Input};
use crate::core::GenerationId;
use crate::drain::connections::has_socket;
use crate::handoff::adopt::remote::{Address, Caller, LookError};
use crate::listener::steering::{Group, Key, Protocol};
use crate::process::spawn::Trap;
use crate::sys::seccomp::{Call, Notification, Notifier};

/// What becomes of a call.
pub(super) enum Verdict {
    /// As if it had not been caught.
    GoesOn,
    /// It was done in the service's place, with this result.
    Done(nix::Result<()>),
    /// A socket whose queue has connections already takes the place of the service's own.
    Replaced { by: Arc<OwnedFd>, close_on_exec: bool },
}

impl Driver {
    /// Takes a generation's calls from now on.
    pub(super) fn watch_calls(&mut self, id: GenerationId, trap: Trap) {
        let Some(running) = self.running.get_mut(&id) else { return };
        if trap.no_new_privs {
            tracing::info!(generation = %id, "cannot gain privileges: setuid programs and file capabilities do nothing for it");
        }
        running.notifier = Some(Arc::new(trap.notifier));
        self.take_calls(id);
        self.guard_files();
    }

    /// Takes them as they come.
    pub(super) fn take_calls(&mut self, id: GenerationId) {
        let Some(running) = self.running.get_mut(&id) else { return };
        let Some(notifier) = running.notifier.clone() else { return };
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
        let asked = address;
        let place = self.listeners.iter().position(|at| at.is_steered() && at.is_meant_by(&own, asked));
        // Whoever serves already and does not care for the port binds it for a connection of its own: thousands a second.
        let serves = self.running.get(&id).is_some_and(|running| running.ready);
        if asked.port() == 0 && place.is_none() && serves {
            return Ok(Verdict::GoesOn);
        }
        let before = self.port_of_before(id, asked);
        let address = before.unwrap_or(asked);
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
            let verdict = self.replaced(id, caller, (fd, &socket), held)?;
            self.has_listened(id);
            return Ok(verdict);
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
        self.has_listened(id);
        if others && self.machine.serving().is_none() {
            if let Some(held) = self.take_what_comes(id, &key, &socket) {
                return self.replaced(id, caller, (fd, &socket), held);
            }
        }
        Ok(Verdict::Done(Ok(())))
    }
}

fn fd_of(notification: &Notification) -> RawFd {
    match notification.call {
        Call::Bind { fd, .. } | Call::Listen { fd, .. } => fd,
    }
}
