//! Programs that bind for themselves and go on as a daemon: their first process starts another one and is gone.

use nix::sys::stat::fstat;
use nix::unistd::{getpid, Pid};
use procfs::process::Process;

use super::driver::Driver;
use crate::core::{End, GenerationId};
use crate::drain::connections::has_socket;
use crate::process::group::Member;
use crate::process::orphans;

/// More processes than a program forks one after the other to get to the background.
const MOST_STEPS: usize = 8;

impl Driver {
    /// A generation's main process ended, and zddsup is the parent of its orphans now.
    pub(super) fn claim_orphans(&self, id: GenerationId) {
        let Some(group) = self.running.get(&id).and_then(|running| running.group.as_ref()) else { return };
        if !self.adopts() || self.cannot_trap {
            return;
        }
        // Before the orphans without marker: one that has it still may write over it at any time.
        let _those_with_marker_are_known_from_now_on = group.pids();
        let groups = || self.running.values().filter_map(|running| running.group.as_ref());
        let is_known = |pid| groups().any(|group| group.contains(Pid::from_raw(pid)).unwrap_or(true));
        let orphans = orphans::without_marker().unwrap_or_else(|error| {
            tracing::error!(generation = %id, "cannot look for its orphans: {error}");
            Vec::new()
        });
        orphans.into_iter().filter(|orphan| !is_known(orphan.pid)).for_each(|orphan| group.admit(orphan));
    }

    /// A generation's main process ended. Whether another one is it from now on.
    pub(super) fn goes_on_as_daemon(&mut self, id: GenerationId, end: End) -> bool {
        let leaves = self.machine.generations().any(|(other, generation)| other == id && generation.is_leaving());
        if end != End::Exited(0) || leaves || !self.adopts() || self.cannot_trap {
            return false;
        }
        // One that is gone meanwhile was a step on the way to the daemon.
        for _ in 0..MOST_STEPS {
            let Some(pid) = self.lives_on(id) else { break };
            let found = Member::of(Pid::from_raw(pid)).and_then(|member| Ok((member, member.open()?)));
            if let Ok((member, pidfd)) = found {
                tracing::info!(generation = %id, pid, "its first process exited with status 0: this one is its main process now");
                self.watch_main(id, member, pidfd, None);
                self.record();
                return true;
            }
        }
        false
    }

    /// Its one process that lost its parent and listens; before it is ready, the one that lost its parent.
    fn lives_on(&self, id: GenerationId) -> Option<i32> {
        let running = self.running.get(&id)?;
        let sockets = self.adopted.sockets().filter(|(_, owner, _)| *owner == id);
        let inodes: Vec<_> =
            sockets.filter_map(|(_, _, socket)| u32::try_from(fstat(socket).ok()?.st_ino).ok()).collect();
        let pids = running.group.as_ref()?.pids().ok()?;
        // zddsup is the subreaper.
        let orphans: Vec<_> = pids.into_iter().filter(|&pid| parent(pid) == Some(getpid().as_raw())).collect();
        let listens = |pid: &&i32| inodes.iter().any(|&inode| has_socket(&[**pid], inode));
        match (&orphans.iter().filter(listens).collect::<Vec<_>>()[..], &orphans[..]) {
            ([listener], _) => Some(**listener),
            ([], [only]) if !running.ready => Some(*only),
            _ => None,
        }
    }
}

fn parent(pid: i32) -> Option<i32> {
    Some(Process::new(pid).ok()?.stat().ok()?.ppid)
}
