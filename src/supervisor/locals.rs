//! Unix sockets that services make themselves. What is at the path gets what is new, so that the switch is a rename(2)
//! ([`crate::handoff::adopt::file`]); an abstract name cannot change hands, and so generations share the socket.
//!
//! ```text
//!  bind(2)   ─> nobody serves there: as the service would have done it, and a second name for the file
//!               a generation serves there: beside it, to the second name alone; a service that removed the file before has
//!               it put back at once
//!               a dead one is there: its socket, with what waits in its queue
//!  switch    ─> rename(2)
//!  release   ─> the second name goes, and the file too unless another one is there
//! ```

use std::ffi::OsStr;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};
use socket2::{SockAddr, SockRef, Type};

use super::caught::Verdict;
use super::driver::Driver;
use super::recorded::{RecordedFile, RecordedListener};
use super::steered::NOBODY;
use crate::core::GenerationId;
use crate::drain::connections;
use crate::handoff::adopt::file::{Location, SocketFile};
use crate::handoff::adopt::guard::Guard;
use crate::handoff::adopt::remote::{Caller, LookError, UnixName};
use crate::sys::socket::is_readable;
use crate::sys::view::View;

/// Unix sockets of generations.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Locals {
    all: Vec<Local>,
    /// Of files that others may remove: only while there is more than one generation, or none that serves.
    #[serde(skip)]
    guards: Vec<Guard>,
    named: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Local {
    owner: GenerationId,
    place: Place,
    #[serde(with = "kind")]
    kind: Type,
    #[serde(with = "crate::state::fds::shared")]
    socket: Arc<OwnedFd>,
    /// None for an abstract name.
    file: Option<Arc<SocketFile>>,
    /// Whether it can be used: one of datagrams from bind(2) on.
    listens: bool,
}

/// Where a socket is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Place {
    File(Location),
    Abstract(Vec<u8>),
}

impl Local {
    fn is(&self, place: &Place, kind: Type) -> bool {
        self.place == *place && self.kind == kind
    }

    fn has_waiting(&self) -> bool {
        is_readable(&*self.socket).unwrap_or(false)
    }

    fn is_in_place(&self) -> bool {
        self.file.as_ref().is_some_and(|file| matches!(file.is_in_place(), Ok(Some(true))))
    }

    /// Puts the file in its place.
    fn put_in_place(&self, before: Option<&SocketFile>) {
        let Some(file) = &self.file else { return };
        if let Err(error) = file.put_in_place(before) {
            tracing::error!(generation = %self.owner, "cannot put its socket at {file}: {error}");
        }
    }

    /// Puts the file back if somebody removed it.
    fn put_back(&self) {
        let Some(file) = &self.file else { return };
        match file.put_back() {
            Ok(true) => tracing::info!(generation = %self.owner, "{file} was removed by somebody: put back"),
            Ok(false) => {}
            Err(error) => tracing::error!(generation = %self.owner, "cannot put {file} back: {error}"),
        }
    }

    /// Removes its second name, and the file as well if it is there and nobody has it any more.
    fn remove(&self, is_gone: bool) {
        if let Some(Err(error)) = self.file.as_ref().map(|file| file.remove(is_gone)) {
            tracing::warn!(generation = %self.owner, "cannot remove the names of its socket: {error}");
        }
    }
}

impl std::fmt::Display for Local {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.place, &self.file) {
            (Place::Abstract(name), _) => write!(f, "unix:@{}", String::from_utf8_lossy(name)),
            (Place::File(_), Some(file)) => file.fmt(f),
            (Place::File(_), None) => f.write_str("unix:"),
        }
    }
}

impl Locals {
    fn of(&self, owner: GenerationId) -> impl Iterator<Item = &Local> {
        self.all.iter().filter(move |local| local.owner == owner)
    }

    /// To be kept for the supervisor after this one.
    pub fn sockets(&self) -> impl Iterator<Item = Arc<OwnedFd>> + '_ {
        self.all.iter().map(|local| Arc::clone(&local.socket))
    }

    /// Where each is, for the status: a place once.
    pub fn addresses(&self) -> Vec<String> {
        let mut addresses: Vec<_> = self.all.iter().map(ToString::to_string).collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses
    }

    /// The names that they were bound to, which their connections have too.
    pub fn names(&self) -> Vec<Vec<u8>> {
        self.all.iter().filter_map(|local| name_of(&local.socket)).collect()
    }

    /// For the supervisor after this one.
    pub fn recorded(&self) -> impl Iterator<Item = RecordedListener> + '_ {
        self.all.iter().filter_map(|local| {
            let file = match &local.file {
                Some(file) => {
                    let (directory, name, hidden) = file.names()?;
                    Some(RecordedFile { directory: directory.into(), name, hidden })
                }
                None => None,
            };
            let inode = fstat(&*local.socket).ok()?.st_ino;
            Some(RecordedListener {
                name: String::new(),
                inode,
                adopted_from: Some(local.owner),
                file,
                group: String::new(),
                any_port: false,
            })
        })
    }

    /// Takes a socket as it is found: of this process.
    pub fn found(&mut self, owner: GenerationId, socket: OwnedFd, pid: i32, file: Option<&RecordedFile>) {
        let Ok(kind) = SockRef::from(&socket).r#type() else { return };
        let file = file
            .map(|recorded| SocketFile::found(View::of(pid)?, &recorded.directory, &recorded.name, &recorded.hidden));
        let (place, file) = match (file, name_of(&socket)) {
            (Some(Ok(file)), _) => (Place::File(file.location().clone()), Some(Arc::new(file))),
            (Some(Err(error)), _) => {
                return tracing::warn!(generation = %owner, "the file of its socket is left alone: {error}");
            }
            (None, Some(name)) => (Place::Abstract(name[1..].to_vec()), None),
            (None, None) => return,
        };
        let local = Local { owner, place, kind, socket: Arc::new(socket), file, listens: true };
        if owner == NOBODY {
            local.put_back();
        }
        self.all.push(local);
    }

    /// Nobody is left.
    pub fn remove_all(&mut self) {
        self.guards.clear();
        for local in std::mem::take(&mut self.all) {
            local.remove(true);
        }
    }
}

/// With a zero at its begin if it is abstract.
fn name_of(socket: &OwnedFd) -> Option<Vec<u8>> {
    let address = SockRef::from(socket).local_addr().ok()?;
    let path = address.as_pathname().map(|path| path.as_os_str().as_bytes().to_vec());
    path.or_else(|| Some([b"\0", address.as_abstract_namespace()?].concat()))
}

impl Driver {
    pub(super) fn binds_local(
        &mut self,
        id: GenerationId,
        caller: &Caller<'_>,
        fd: RawFd,
        name: UnixName,
    ) -> Result<Verdict, LookError> {
        let own = caller.copy(fd)?;
        let Ok(kind) = SockRef::from(&own).r#type() else { return Ok(Verdict::GoesOn) };
        let ready = self.running.get(&id).is_some_and(|running| running.ready);
        if kind == Type::DGRAM && ready {
            // A client's: who wants answers to its datagrams has to have a name.
            return Ok(Verdict::GoesOn);
        }
        match name {
            UnixName::Path(path) => self.binds_path(id, caller, (fd, own), kind, &path),
            UnixName::Abstract(name) => self.binds_abstract(id, caller, (fd, own), kind, name),
            UnixName::Unnamed => Ok(Verdict::GoesOn),
        }
    }

    fn binds_path(
        &mut self,
        id: GenerationId,
        caller: &Caller<'_>,
        (fd, own): (RawFd, OwnedFd),
        kind: Type,
        path: &Path,
    ) -> Result<Verdict, LookError> {
        let (here, view) = (caller.view()?, caller.view()?);
        self.adopted.locals.named += 1;
        let hidden = format!(".zddsup-{}-{id}-{}", std::process::id(), self.adopted.locals.named);
        let Ok(mut file) = SocketFile::locate(view, path, &hidden) else { return Ok(Verdict::GoesOn) };
        let place = Place::File(file.location().clone());
        let serving = self.machine.serving();
        let of = |local: &&Local| local.is(&place, kind) && local.owner != id;
        let whose = |local: &&Local| match serving {
            Some(serving) => local.owner == serving,
            None => self.running.get(&local.owner).is_none_or(|running| running.end.is_some()),
        };
        let before = self.adopted.locals.all.iter().filter(of).find(whose);
        before.inspect(|before| before.put_back());
        let before = before.filter(|before| before.is_in_place());
        if let (Some(dead), None) = (&before, serving) {
            let socket = Arc::clone(&dead.socket);
            return self.replaces_local(id, caller, (fd, &own), &socket);
        }
        let bound = if before.is_some() { file.bind_beside(&own, &here, path) } else { file.bind(&own, &here, path) };
        match bound {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => {
                return Ok(Verdict::Done(Err(Errno::EADDRINUSE)));
            }
            // The kernel tells it itself.
            Err(_) => return Ok(Verdict::GoesOn),
        }
        // What it had there before it has no more.
        self.adopted.locals.all.retain(|local| {
            let stays = local.owner != id || !local.is(&place, kind);
            if !stays {
                local.remove(true);
            }
            stays
        });
        self.has_bound_local(
            id,
            Local { owner: id, place, kind, socket: Arc::new(own), file: Some(Arc::new(file)), listens: false },
        );
        Ok(Verdict::Done(Ok(())))
    }

    /// Whoever has an abstract name has it until the last copy of the socket is closed.
    fn binds_abstract(
        &mut self,
        id: GenerationId,
        caller: &Caller<'_>,
        (fd, own): (RawFd, OwnedFd),
        kind: Type,
        name: Vec<u8>,
    ) -> Result<Verdict, LookError> {
        let address = [b"\0", name.as_slice()].concat();
        let place = Place::Abstract(name);
        let there = self.adopted.locals.all.iter().find(|local| local.is(&place, kind) && local.owner != id);
        if let Some(socket) = there.map(|local| Arc::clone(&local.socket)) {
            return self.replaces_local(id, caller, (fd, &own), &socket);
        }
        let bound = SockAddr::unix(OsStr::from_bytes(&address));
        if let Err(error) = bound.and_then(|address| SockRef::from(&own).bind(&address)) {
            return Ok(Verdict::Done(Err(error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw))));
        }
        self.has_bound_local(id, Local { owner: id, place, kind, socket: Arc::new(own), file: None, listens: false });
        Ok(Verdict::Done(Ok(())))
    }

    fn has_bound_local(&mut self, id: GenerationId, mut local: Local) {
        local.listens = local.kind == Type::DGRAM;
        tracing::info!(generation = %id, "binds {local}");
        let listens = local.listens;
        self.adopted.locals.all.push(local);
        self.guard_files();
        if listens {
            self.has_listened(id);
        }
    }

    /// A socket that is there already takes the place of this one's own.
    fn replaces_local(
        &mut self,
        id: GenerationId,
        caller: &Caller<'_>,
        (fd, own): (RawFd, &OwnedFd),
        socket: &Arc<OwnedFd>,
    ) -> Result<Verdict, LookError> {
        let close_on_exec = caller.closes_on_exec(fd)?;
        let lives = |owner| self.running.get(&owner).is_some_and(|running| running.end.is_none());
        let Some(there) = self.adopted.locals.all.iter_mut().find(|local| Arc::ptr_eq(&local.socket, socket)) else {
            return Ok(Verdict::GoesOn);
        };
        if lives(there.owner) {
            tracing::warn!(
                generation = %id,
                "{there} is an abstract name, which only one socket can have: it shares that of generation {}, and may get \
                 what is new before it is ready",
                there.owner
            );
            let (place, kind) = (there.place.clone(), there.kind);
            let socket = Arc::clone(socket);
            self.adopted.locals.all.push(Local { owner: id, place, kind, socket, file: None, listens: true });
        } else {
            tracing::info!(generation = %id, "gets the socket of {there} that is left, with what waits in its queue");
            there.owner = id;
            there.listens = true;
            // Status flags are the socket's; of one in use they stay as they are.
            let flags = fcntl(own, FcntlArg::F_GETFL).map_or(OFlag::empty(), OFlag::from_bits_truncate);
            let _cannot_fail_on_an_open_fd = fcntl(&**socket, FcntlArg::F_SETFL(flags));
        }
        self.has_listened(id);
        Ok(Verdict::Replaced { by: Arc::clone(socket), close_on_exec })
    }

    /// listen(2) on one of them. The call goes on: whom `SO_PEERCRED` names is who made it.
    pub(super) fn listens_local(&mut self, id: GenerationId, socket: &OwnedFd) -> bool {
        let Ok(inode) = fstat(socket).map(|found| found.st_ino) else { return false };
        let same = |local: &&mut Local| fstat(&*local.socket).is_ok_and(|found| found.st_ino == inode);
        let Some(local) = self.adopted.locals.all.iter_mut().find(|local| local.owner == id && same(local)) else {
            return false;
        };
        local.listens = true;
        tracing::info!(generation = %id, "listens on {local}");
        self.has_listened(id);
        true
    }

    /// Where a candidate has to be and is not.
    pub(super) fn missing_locals(&self, id: GenerationId) -> Vec<String> {
        let locals = &self.adopted.locals;
        let is_there = |place: &Place| locals.of(id).any(|own| own.place == *place && own.listens);
        let serving = self.machine.serving().into_iter().flat_map(|serving| locals.of(serving));
        serving.filter(|local| local.listens && !is_there(&local.place)).map(ToString::to_string).collect()
    }

    /// What the generation that serves has closed is not waited for.
    pub(super) fn forget_closed_locals(&mut self) {
        let Some(serving) = self.machine.serving().filter(|serving| self.adopted.locals.of(*serving).next().is_some())
        else {
            return;
        };
        let group = self.running.get(&serving).and_then(|running| running.group.clone());
        let Some(Ok(pids)) = group.map(|group| group.pids()) else { return };
        let open = connections::sockets(&pids);
        let is_open = |local: &Local| {
            let inode = fstat(&*local.socket).ok().and_then(|found| u32::try_from(found.st_ino).ok());
            inode.is_none_or(|inode| open.contains(&inode))
        };
        self.adopted.locals.all.retain(|local| {
            let stays = local.owner != serving || is_open(local);
            if !stays {
                local.remove(false);
            }
            stays
        });
    }

    /// Whether the generation that serves has any.
    pub(super) fn serves_locals(&self) -> bool {
        self.machine.serving().is_some_and(|serving| self.adopted.locals.of(serving).next().is_some())
    }

    /// What waits for a generation at one of its own.
    pub(super) fn has_waiting_local(&self, id: GenerationId) -> bool {
        self.adopted.locals.of(id).any(Local::has_waiting)
    }

    /// Whether a generation gets datagrams there.
    pub(super) fn gets_local_datagrams(&self, id: GenerationId) -> bool {
        self.adopted.locals.of(id).any(|local| local.kind == Type::DGRAM)
    }

    /// Whether another generation has one of its sockets too: nothing new can be kept from it then.
    pub(super) fn shares_locals(&self, id: GenerationId) -> bool {
        let others = || self.adopted.locals.all.iter().filter(|local| local.owner != id);
        self.adopted.locals.of(id).any(|own| others().any(|other| Arc::ptr_eq(&own.socket, &other.socket)))
    }

    /// What is new goes to this generation.
    pub(super) fn switch_locals(&mut self, to: GenerationId) {
        self.adopted.locals.guards.clear();
        let (mut own, mut others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.adopted.locals.all).into_iter().partition(|local| local.owner == to);
        for local in &own {
            let before = others.iter().find(|other| other.place == local.place && other.is_in_place());
            local.put_in_place(before.and_then(|before| before.file.as_deref()));
        }
        // Of dead ones, what the new one did not take.
        others.retain(|local| {
            let stays = self.running.contains_key(&local.owner);
            if !stays {
                if local.has_waiting() {
                    tracing::error!("what waited at {local} for a generation that is gone is lost");
                }
                local.remove(true);
            }
            stays
        });
        own.append(&mut others);
        self.adopted.locals.all = own;
        self.guard_files();
    }

    /// A generation is gone. With nobody to serve, its sockets wait for the next one; when zddsup ends, for that of the next
    /// start, where systemd holds them: if what is at the path is this one's.
    pub(super) fn leave_locals(&mut self, id: GenerationId) {
        let stays = self.machine.serving().is_none() && !self.is_being_stopped();
        let stored = self.machine.serving().is_none() && self.stored_above.is_on();
        if !stays {
            let shared = self.shares_locals(id);
            self.adopted.locals.all.retain(|local| {
                if local.owner == id && stored {
                    local.put_back();
                    if local.file.is_none() || local.is_in_place() {
                        return true;
                    }
                }
                if local.owner == id {
                    if local.has_waiting() && !shared {
                        tracing::error!("what waited at {local} for a generation that is gone is lost");
                    }
                    local.remove(true);
                }
                local.owner != id
            });
        }
        self.guard_files();
    }

    /// Guards what others may remove: what is at its path, and is to stay there.
    pub(super) fn guard_files(&mut self) {
        let serving = self.machine.serving();
        let others = self.running.len() > 1 || serving.is_none();
        let wanted = |local: &&Local| match serving {
            _ if !others || self.is_being_stopped() => false,
            Some(serving) => local.owner == serving,
            None => !self.running.contains_key(&local.owner),
        };
        let files = self.adopted.locals.all.iter().filter(wanted).filter_map(|local| local.file.clone());
        let files: Vec<_> = files.collect();
        let guards = &mut self.adopted.locals.guards;
        guards.retain(|guard| files.iter().any(|file| guard.is_for(file)));
        for file in files {
            if !guards.iter().any(|guard| guard.is_for(&file)) {
                match Guard::new(&file) {
                    Ok(guard) => guards.push(guard),
                    Err(error) => tracing::warn!("{file} is not put back if somebody removes it: {error}"),
                }
            }
        }
    }
}

mod kind {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use socket2::Type;

    #[allow(clippy::trivially_copy_pass_by_ref)] // As serde calls it.
    pub fn serialize<S: Serializer>(kind: &Type, to: S) -> Result<S::Ok, S::Error> {
        i32::from(*kind).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Type, D::Error> {
        i32::deserialize(from).map(Type::from)
    }
}
