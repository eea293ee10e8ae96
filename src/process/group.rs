//! All processes of a generation: its first process, what that started, and what tried to get away.
//!
//! A process belongs to it when one of these holds:
//! - it is in a process group or session that a member leads (the first process leads a group of its own),
//! - it is in the generation's cgroup, or in one below, where generations have one ([`Cgroup`]): nothing gets out of that,
//! - it has the generation's marker in its environment (a daemon that called fork and setsid twice still has),
//! - it is a descendant of one of these,
//! - it was one before, or was admitted.
//!
//! Nothing that is older than the first process belongs to it, so that most of `/proc` is passed over cheaply. Each
//! signal goes to a pidfd that was checked after it was opened: a pid that is used again is never hit.
//!
//! One that forks and exits while `/proc` is read may not be seen, and what it forked not either. But it is an orphan,
//! and so our child, and stays there, dead, until we reap it: where there is a dead one that was not there before, the
//! look was no good.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::mem;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::cgroup::Cgroup;
use super::table::{self, Marked, Stat};
use crate::sys::pidfd::PidFd;

/// The variable that marks a generation's processes.
pub const MARKER_VAR: &str = "ZDDSUP_MARKER";

/// SIGKILL is sent until nothing new appears, but not for ever: the caller asks again.
const LONGEST_CHASE: Duration = Duration::from_secs(1);

/// A process in the middle of execve(2), whose environment is not there yet, is waited for so long. On a loaded machine
/// it takes tens of milliseconds.
const LONGEST_EXECVE: Duration = Duration::from_secs(5);

/// How often it is looked whether none is left before the answer is no.
const MOST_LOOKS: usize = 4;

/// How long it is looked for what a signal has to reach, on a fast machine: nothing else is done meanwhile.
const LONGEST_SEARCH: Duration = Duration::from_millis(50);

/// How long execve(2) is given until the next look.
const A_MOMENT: Duration = Duration::from_millis(1);

/// A process, by what no other one has: a pid and when it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Member {
    /// Its pid.
    pub pid: i32,
    /// When it was started, in clock ticks since boot.
    pub start_ticks: u64,
}

impl Member {
    /// The process that has this pid now.
    pub fn of(pid: Pid) -> io::Result<Member> {
        Ok(Stat::read(pid.as_raw())?.member)
    }

    /// Holds it. ESRCH when it is gone, even if another one has its pid.
    pub fn open(&self) -> io::Result<PidFd> {
        let pidfd = PidFd::open(Pid::from_raw(self.pid))?;
        // Looked at after the pidfd was made: if it is the same one still, the pidfd is its.
        if Member::of(Pid::from_raw(self.pid))? == *self {
            Ok(pidfd)
        } else {
            Err(Errno::ESRCH.into())
        }
    }
}

/// The processes of a generation.
#[derive(Debug, Serialize, Deserialize)]
pub struct Group {
    leader: Member,
    marker: Vec<u8>,
    #[serde(with = "super::cgroup::recorded", default)]
    cgroup: Option<Cgroup>,
    known: Mutex<Known>,
}

/// What was found before.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Known {
    /// Members that lived then: they stay members, whatever they do to get away.
    members: BTreeSet<Member>,
    /// Our children that were dead.
    dead: BTreeSet<Member>,
    /// Those that lived then and are none: they do not become any.
    strangers: BTreeSet<Member>,
    /// Of what nothing can be said yet, and since when.
    #[serde(skip)]
    doubts: BTreeMap<Member, Instant>,
    /// Nobody is left in the group and the session of the leader's number, so that it may be given to others.
    number_is_free: bool,
}

/// What there is now.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    living: Vec<Member>,
    /// Whether there may be more, which the next look will show.
    in_doubt: bool,
}

impl Group {
    /// Those of the generation with this first process, and this value of [`MARKER_VAR`].
    #[must_use]
    pub fn new(leader: Member, marker: &str) -> Self {
        let known = Mutex::new(Known { members: BTreeSet::from([leader]), ..Known::default() });
        Group { leader, marker: format!("{MARKER_VAR}={marker}").into_bytes(), cgroup: None, known }
    }

    /// Which are in this cgroup besides. It is theirs: with the group it is removed.
    #[must_use]
    pub fn within(self, cgroup: Option<Cgroup>) -> Self {
        Group { cgroup, ..self }
    }

    /// Their cgroup.
    #[must_use]
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// Its first process, dead or alive.
    #[must_use]
    pub fn leader(&self) -> Member {
        self.leader
    }

    /// A process that is known to be one of them by other means.
    pub fn admit(&self, member: Member) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.strangers.remove(&member);
        known.members.insert(member);
    }

    /// Whether none of them lives. One that is dead and was not reaped yet does not count.
    pub fn is_empty(&self) -> io::Result<bool> {
        for _ in 0..MOST_LOOKS {
            let found = self.look()?;
            if !found.living.is_empty() {
                break;
            }
            // What the kernel says of all at once: nobody goes from one cgroup to the next meanwhile.
            if !found.in_doubt && self.cgroup.as_ref().is_none_or(Cgroup::is_empty) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether a process is one of them. It is asked often by whoever floods a notify socket: most answers are known.
    pub fn contains(&self, pid: Pid) -> io::Result<bool> {
        let member = Member::of(pid)?;
        if member.start_ticks < self.leader.start_ticks {
            return Ok(false);
        }
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.members.contains(&member) || known.strangers.contains(&member) {
            return Ok(known.members.contains(&member));
        }
        drop(known);
        Ok(self.look()?.living.contains(&member))
    }

    /// The pids of those that live.
    pub fn pids(&self) -> io::Result<Vec<i32>> {
        Ok(self.look()?.living.into_iter().map(|member| member.pid).collect())
    }

    /// Sends a signal to each of them, and gives to how many. After SIGKILL it looks again for what was forked meanwhile.
    pub fn signal_all(&self, signal: Signal) -> io::Result<usize> {
        let mut told = Told { signal, seen: BTreeSet::new(), sent: 0, refused: None };
        if let Some(cgroup) = self.cgroup.as_ref().filter(|_| signal == Signal::SIGKILL) {
            let (living, inside) = (self.look()?.living, cgroup.pids());
            // Those too that take no signal from us. What follows is for those outside.
            if cgroup.kill().is_ok() {
                told.seen.extend(living.into_iter().filter(|member| inside.contains(&member.pid)));
                told.sent = told.seen.len();
            }
        }
        let begin = Instant::now();
        for round in 1.. {
            let found = self.look()?;
            let fresh = found.living.into_iter().filter(|member| told.tell(*member)).count();
            let again = match signal {
                Signal::SIGKILL => (found.in_doubt || fresh > 0) && begin.elapsed() < LONGEST_CHASE,
                // Any other is a request, and nothing waits for it for long.
                _ => found.in_doubt && (round < MOST_LOOKS || begin.elapsed() < LONGEST_SEARCH),
            };
            if !again {
                break;
            }
            if found.in_doubt {
                std::thread::sleep(A_MOMENT);
                self.chase(&mut told)?;
            }
        }
        told.refused.map_or(Ok(told.sent), Err)
    }

    /// Those that fork and exit are others by the time that all of `/proc` was read: each one with the marker is told as soon
    /// as it is seen. Pids go up, with the look as in time, so that it meets them.
    fn chase(&self, told: &mut Told) -> io::Result<()> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        self.each_young(|pid, stat| {
            if stat.lives && !known.strangers.contains(&stat.member) && !told.seen.contains(&stat.member) {
                if let Marked::Yes = table::is_marked(pid, &self.marker) {
                    told.tell(stat.member);
                }
            }
        })
    }

    /// One at a time: what died during the one is new to the next.
    fn look(&self) -> io::Result<Found> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut young = BTreeMap::new();
        self.each_young(|pid, stat| {
            young.insert(pid, stat);
        })?;
        if let Some(cgroup) = &self.cgroup {
            known.members.extend(inside(cgroup, &mut young));
        }
        Ok(known.sort_out(self.leader, young, |pid| table::is_marked(pid, &self.marker), Instant::now()))
    }

    /// Every process but zddsup that is no older than the first one, by pid.
    fn each_young(&self, mut each: impl FnMut(i32, Stat)) -> io::Result<()> {
        let own = own_pid();
        for entry in fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // Gone meanwhile, or hidden from us (hidepid in proc(5)) and so none that we started.
            let Ok(stat) = Stat::read(pid) else { continue };
            if pid != own && stat.member.start_ticks >= self.leader.start_ticks {
                each(pid, stat);
            }
        }
        Ok(())
    }
}

/// Those in a cgroup, whatever their age. Who has the pid now was looked at first, and is in it then: it is no other one.
fn inside(cgroup: &Cgroup, young: &mut BTreeMap<i32, Stat>) -> Vec<Member> {
    for pid in cgroup.pids().into_iter().filter(|&pid| pid != own_pid()) {
        if let (Entry::Vacant(place), Ok(stat)) = (young.entry(pid), Stat::read(pid)) {
            place.insert(stat);
        }
    }
    cgroup.pids().iter().filter_map(|pid| young.get(pid)).map(|stat| stat.member).collect()
}

/// Who was sent a signal.
#[derive(Debug)]
struct Told {
    signal: Signal,
    seen: BTreeSet<Member>,
    sent: usize,
    refused: Option<io::Error>,
}

impl Told {
    /// Sends it, once. False if it was sent before.
    fn tell(&mut self, member: Member) -> bool {
        if !self.seen.insert(member) {
            return false;
        }
        match member.open().and_then(|pidfd| Ok(pidfd.signal(self.signal)?)) {
            Ok(()) => self.sent += 1,
            Err(error) if is_gone(&error) => {}
            Err(error) => self.refused = Some(error),
        }
        true
    }
}

impl Known {
    /// Picks the members, dead ones too while they lead to others.
    fn sort_out(
        &mut self,
        leader: Member,
        young: BTreeMap<i32, Stat>,
        is_marked: impl Fn(i32) -> Marked,
        now: Instant,
    ) -> Found {
        let leads = |stat: &Stat| stat.group == leader.pid || stat.session == leader.pid;
        let is_reused = young.get(&leader.pid).is_some_and(|stat| stat.member != leader);
        // A number is not used again while a group or session has it.
        self.number_is_free |= is_reused || !young.values().any(leads);

        let (mut members, mut others): (BTreeMap<_, _>, BTreeMap<_, _>) = young
            .into_iter()
            .partition(|(_, stat)| self.members.contains(&stat.member) || (!self.number_is_free && leads(stat)));
        adopt(&mut members, &mut others);
        let doubts = mem::take(&mut self.doubts);
        let dead = |stat: &&Stat| !stat.lives && stat.parent == own_pid();
        let dead: BTreeSet<_> = members.values().chain(others.values()).filter(dead).map(|stat| stat.member).collect();
        let died = !dead.is_subset(&self.dead);
        self.dead = dead;
        let candidates: Vec<_> = others.values().filter(|stat| stat.lives && !stat.of_kernel).copied().collect();
        let strangers = mem::take(&mut self.strangers);
        for stat in candidates {
            if strangers.contains(&stat.member) {
                self.strangers.insert(stat.member);
                continue;
            }
            match is_marked(stat.member.pid) {
                Marked::Yes => members.extend(others.remove_entry(&stat.member.pid)),
                Marked::No => drop(self.strangers.insert(stat.member)),
                Marked::Unknown => {
                    self.doubts.insert(stat.member, doubts.get(&stat.member).copied().unwrap_or(now));
                }
            }
        }
        adopt(&mut members, &mut others);
        self.strangers.retain(|stranger| !members.contains_key(&stranger.pid));
        let living: Vec<_> = members.into_values().filter(|stat| stat.lives).map(|stat| stat.member).collect();
        self.members = living.iter().copied().collect();
        self.doubts.retain(|member, _| !self.members.contains(member));
        let in_doubt = died || self.doubts.values().any(|&since| now - since < LONGEST_EXECVE);
        Found { living, in_doubt }
    }
}

/// Moves those that belong to a member over to the members.
fn adopt(members: &mut BTreeMap<i32, Stat>, others: &mut BTreeMap<i32, Stat>) {
    loop {
        let leads = |number: i32, of: fn(&Stat) -> i32| members.get(&number).is_some_and(|stat| of(stat) == number);
        let belongs = |stat: &Stat| {
            members.contains_key(&stat.parent)
                || leads(stat.group, |stat| stat.group)
                || leads(stat.session, |stat| stat.session)
        };
        let found: Vec<_> = others.values().filter(|stat| belongs(stat)).map(|stat| stat.member.pid).collect();
        if found.is_empty() {
            break;
        }
        members.extend(found.iter().filter_map(|pid| others.remove_entry(pid)));
    }
}

/// Sends a signal to a generation's main process, and wakes it if it is stopped: it would sleep through it.
pub fn signal_main(main: &PidFd, signal: Signal) -> nix::Result<()> {
    main.signal(signal)?;
    match signal {
        Signal::SIGTERM | Signal::SIGINT | Signal::SIGQUIT | Signal::SIGHUP | Signal::SIGABRT => {
            // Sent already: it may be gone by now.
            let _gone = main.signal(Signal::SIGCONT);
        }
        _ => {}
    }
    Ok(())
}

fn own_pid() -> i32 {
    Pid::this().as_raw()
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests;
