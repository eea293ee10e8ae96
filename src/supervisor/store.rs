//! What generations leave with the supervisor: stored fds (FDSTORE in `sd_notify(3)`), and what is kept for the next
//! generation on the handoff socket.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};

use crate::core::GenerationId;
use crate::proto::handoff::{MAX_KEEPS, MAX_KEPT_BYTES};
use crate::state::fds;

/// A stored fd. It stays until it is removed, and every later generation gets a copy.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Stored {
    /// Its FDNAME.
    pub name: String,
    /// The open file.
    #[serde(with = "fds::shared")]
    pub fd: Arc<OwnedFd>,
    polled: bool,
}

/// A change that a generation asked for.
#[derive(Debug, Serialize, Deserialize)]
pub enum Change {
    /// FDSTORE=1.
    Add {
        /// FDNAME.
        name: String,
        /// What it sent.
        #[serde(with = "fds::owned_list")]
        fds: Vec<OwnedFd>,
        /// FDPOLL: dropped when the other end hangs up.
        polled: bool,
    },
    /// FDSTOREREMOVE=1.
    Remove {
        /// FDNAME.
        name: String,
    },
}

/// The fd store of a service. Changes of a candidate count from the switch on, so that a failed upgrade changes nothing.
#[derive(Debug, Serialize, Deserialize)]
pub struct Store {
    most: usize,
    stored: Vec<Stored>,
    staged: BTreeMap<GenerationId, Vec<Change>>,
}

impl Store {
    /// An empty one for up to `most` fds.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Store { most, stored: Vec::new(), staged: BTreeMap::new() }
    }

    /// The same for up to `most` fds.
    #[must_use]
    pub fn within(self, most: usize) -> Self {
        Store { most, ..self }
    }

    /// Takes a change at once, or at the generation's switch if it is not `ready` yet. Gives how many fds were refused
    /// because the store is full.
    pub fn change(&mut self, generation: GenerationId, ready: bool, change: Change) -> usize {
        if ready {
            return self.apply(change);
        }
        let staged = self.staged.entry(generation).or_default();
        let waiting: usize = staged.iter().map(Change::fds).sum();
        if self.stored.len() + waiting + change.fds() > self.most {
            return change.fds();
        }
        staged.push(change);
        0
    }

    /// The generation serves from now on.
    pub fn commit(&mut self, generation: GenerationId) {
        for change in self.staged.remove(&generation).unwrap_or_default() {
            self.apply(change);
        }
    }

    /// The generation never served.
    pub fn discard(&mut self, generation: GenerationId) {
        self.staged.remove(&generation);
    }

    /// What the next generation gets: without what the other end has closed.
    pub fn for_next(&mut self) -> Vec<Stored> {
        self.stored.retain(|stored| !stored.polled || !hung_up(&stored.fd));
        self.stored.clone()
    }

    /// How many are stored.
    #[must_use]
    pub fn len(&self) -> usize {
        self.stored.len()
    }

    /// Whether nothing is stored.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.stored.is_empty()
    }

    fn apply(&mut self, change: Change) -> usize {
        match change {
            Change::Add { name, fds, polled } => {
                let mut refused = 0;
                for fd in fds {
                    if self.stored.iter().any(|stored| same_file(&stored.fd, &fd)) {
                        continue;
                    }
                    if self.stored.len() >= self.most {
                        refused += 1;
                        continue;
                    }
                    self.stored.push(Stored { name: name.clone(), fd: Arc::new(fd), polled });
                }
                refused
            }
            Change::Remove { name } => {
                self.stored.retain(|stored| stored.name != name);
                0
            }
        }
    }
}

/// Something that a generation passes on to the one that serves after it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kept {
    /// By which its arrival is acknowledged.
    pub id: u64,
    /// What it is called.
    pub name: String,
    /// Bytes that go with it.
    #[serde(with = "crate::proto::handoff::state")]
    pub state: Vec<u8>,
    /// Open files that go with it.
    #[serde(with = "fds::shared_list")]
    pub fds: Vec<Arc<OwnedFd>>,
    /// Who passed it on.
    pub from: GenerationId,
    sent_to: Option<GenerationId>,
    /// How many could have taken it and did not.
    passed_over: usize,
}

/// Whatever so many generations did not take is for nobody.
const MOST_PASSED_OVER: usize = 3;

/// What is on its way from one generation to the next. A copy is held until the receiver says that it has it, so that
/// nothing is lost with a receiver that dies.
#[derive(Debug, Serialize, Deserialize)]
pub struct Keeping {
    most_fds: usize,
    next: u64,
    /// By their ids, so in their order.
    items: BTreeMap<u64, Kept>,
    /// Of all of them.
    bytes: usize,
    fds: usize,
    /// More bytes than are worth a look at the allocator, since nothing was there.
    was_large: bool,
}

/// From how many bytes on memory is given back.
const LARGE: usize = 1024 * 1024;

impl Keeping {
    /// For up to `most_fds` at a time.
    #[must_use]
    pub fn new(most_fds: usize) -> Self {
        Keeping { most_fds, next: 0, items: BTreeMap::new(), bytes: 0, fds: 0, was_large: false }
    }

    /// The same for up to `most_fds`.
    #[must_use]
    pub fn within(self, most_fds: usize) -> Self {
        Keeping { most_fds, ..self }
    }

    /// How many fds it takes.
    #[must_use]
    pub fn most_fds(&self) -> usize {
        self.most_fds
    }

    /// A generation passes something on. False when that is too much together with what others did; then it is closed.
    pub fn keep(&mut self, from: GenerationId, name: String, state: Vec<u8>, fds: Vec<Arc<OwnedFd>>) -> bool {
        let (all_bytes, all_fds) = (self.bytes + state.len(), self.fds + fds.len());
        if self.items.len() >= MAX_KEEPS || all_bytes > MAX_KEPT_BYTES || all_fds > self.most_fds {
            return false;
        }
        (self.bytes, self.fds) = (all_bytes, all_fds);
        self.was_large |= all_bytes >= LARGE;
        self.next += 1;
        let id = self.next;
        self.items.insert(id, Kept { id, name, state, fds, from, sent_to: None, passed_over: 0 });
        true
    }

    /// What `to` has to be sent now: all that others passed on and nobody was sent.
    pub fn send_to(&mut self, to: GenerationId) -> Vec<Kept> {
        let mut sent = Vec::new();
        for item in self.items.values_mut() {
            if item.from != to && item.sent_to.is_none() {
                item.sent_to = Some(to);
                sent.push(item.clone());
            }
        }
        sent
    }

    /// The receiver has it: the copy is dropped.
    pub fn taken(&mut self, by: GenerationId, id: u64) {
        if self.items.get(&id).is_some_and(|item| item.sent_to == Some(by)) {
            self.remove(id);
        }
    }

    /// A generation is gone: what it did not acknowledge is sent to the next one. One that `served` without ever asking
    /// for anything did not want it either. Gives how many things nobody wants.
    pub fn lost(&mut self, receiver: GenerationId, served: bool) -> usize {
        for item in self.items.values_mut() {
            let unsent = served && item.sent_to.is_none() && item.from < receiver;
            if unsent || item.sent_to == Some(receiver) {
                item.sent_to = None;
                item.passed_over += 1;
            }
        }
        let unwanted = self.items.values().filter(|item| item.passed_over >= MOST_PASSED_OVER);
        let unwanted: Vec<_> = unwanted.map(|item| item.id).collect();
        unwanted.iter().for_each(|&id| self.remove(id));
        unwanted.len()
    }

    /// Whether much was kept, and nothing is any more. True once.
    pub fn shrunk(&mut self) -> bool {
        self.items.is_empty() && std::mem::take(&mut self.was_large)
    }

    fn remove(&mut self, id: u64) {
        if let Some(item) = self.items.remove(&id) {
            self.bytes -= item.state.len();
            self.fds -= item.fds.len();
        }
    }
}

impl Change {
    fn fds(&self) -> usize {
        match self {
            Change::Add { fds, .. } => fds.len(),
            Change::Remove { .. } => 0,
        }
    }
}

/// Files without a type (eventfd, epoll, timerfd) share one inode, and so cannot be told apart.
fn same_file(one: &OwnedFd, other: &OwnedFd) -> bool {
    match (fstat(one), fstat(other)) {
        (Ok(one), Ok(other)) => {
            one.st_mode & libc::S_IFMT != 0 && (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
        }
        _ => false,
    }
}

fn hung_up(fd: &OwnedFd) -> bool {
    let mut asked = [PollFd::new(fd.as_fd(), PollFlags::empty())];
    poll(&mut asked, PollTimeout::ZERO).is_ok()
        && asked[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: GenerationId = GenerationId(1);

    fn pipe() -> (OwnedFd, OwnedFd) {
        nix::unistd::pipe().unwrap()
    }

    fn add(name: &str, fd: OwnedFd) -> Change {
        Change::Add { name: name.to_owned(), fds: vec![fd], polled: true }
    }

    #[test]
    fn a_candidates_changes_count_from_its_switch_on() {
        let mut store = Store::new(8);
        let (read, _write) = pipe();
        assert_eq!(store.change(ONE, false, add("cache", read)), 0);
        assert!(store.for_next().is_empty());
        store.commit(ONE);
        assert_eq!(store.for_next()[0].name, "cache");
        store.change(GenerationId(2), false, Change::Remove { name: "cache".to_owned() });
        store.discard(GenerationId(2));
        assert_eq!(store.len(), 1);
        store.change(ONE, true, Change::Remove { name: "cache".to_owned() });
        assert!(store.is_empty());
    }

    #[test]
    fn what_hung_up_is_dropped_and_what_is_too_much_refused() {
        let mut store = Store::new(2);
        let (read, write) = pipe();
        store.change(ONE, true, add("a", read));
        let (second, _keep) = pipe();
        store.change(ONE, true, add("b", second));
        let (third, _keep_too) = pipe();
        assert_eq!(store.change(ONE, true, add("c", third)), 1);
        drop(write);
        let names: Vec<_> = store.for_next().into_iter().map(|stored| stored.name).collect();
        assert_eq!(names, ["b"]);
    }

    #[test]
    fn what_is_kept_goes_to_another_and_again_if_that_one_dies() {
        let mut keeping = Keeping::new(0);
        assert!(keeping.keep(ONE, "connection".to_owned(), b"state".to_vec(), Vec::new()));
        assert!(keeping.send_to(ONE).is_empty());
        let sent = keeping.send_to(GenerationId(2));
        assert_eq!(sent.len(), 1);
        assert!(keeping.send_to(GenerationId(2)).is_empty());
        keeping.lost(GenerationId(2), true);
        assert_eq!(keeping.send_to(GenerationId(3))[0].id, sent[0].id);
        keeping.taken(GenerationId(2), sent[0].id);
        keeping.lost(GenerationId(3), true);
        assert_eq!(keeping.send_to(GenerationId(4)).len(), 1);
        keeping.taken(GenerationId(4), sent[0].id);
        keeping.lost(GenerationId(4), true);
        assert!(keeping.send_to(GenerationId(5)).is_empty());
    }

    #[test]
    fn what_nobody_takes_is_not_kept_for_ever() {
        let mut keeping = Keeping::new(0);
        keeping.keep(GenerationId(2), "connection".to_owned(), Vec::new(), Vec::new());
        // One that came before, one that never served, and who kept it: it was for none of them.
        assert_eq!(
            keeping.lost(ONE, true) + keeping.lost(GenerationId(3), false) + keeping.lost(GenerationId(2), true),
            0
        );
        assert_eq!(keeping.lost(GenerationId(4), true), 0);
        assert_eq!(keeping.send_to(GenerationId(5)).len(), 1);
        assert_eq!(keeping.lost(GenerationId(5), true), 0);
        assert_eq!(keeping.lost(GenerationId(6), true), 1);
        assert!(keeping.send_to(GenerationId(7)).is_empty());
    }

    #[test]
    fn no_more_is_kept_than_there_is_room_for() {
        let mut keeping = Keeping::new(2);
        let keep = |keeping: &mut Keeping, generation, state: usize, fds: usize| {
            let fds = std::iter::repeat_n(Arc::new(pipe().0), fds).collect::<Vec<_>>();
            keeping.keep(GenerationId(generation), "x".to_owned(), vec![0; state], fds)
        };
        assert!(keep(&mut keeping, 1, 1, 1) && keep(&mut keeping, 2, 0, 1));
        assert!(!keep(&mut keeping, 3, 0, 1), "fds");
        assert!(!keep(&mut keeping, 3, MAX_KEPT_BYTES, 0), "state");
        assert!(keep(&mut keeping, 3, MAX_KEPT_BYTES - 1, 0) && !keeping.shrunk());
        assert_eq!(keeping.send_to(GenerationId(4)).len(), 3);
        keeping.taken(GenerationId(4), 1);
        assert!(keep(&mut keeping, 1, 1, 1), "there is room again");
    }

    #[test]
    fn the_same_file_is_stored_once() {
        let mut store = Store::new(8);
        let (read, _write) = pipe();
        let copy = read.try_clone().unwrap();
        store.change(ONE, true, add("a", read));
        store.change(ONE, true, add("a", copy));
        assert_eq!(store.len(), 1);
    }
}
