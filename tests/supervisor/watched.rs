//! What zddsup itself has open and uses, seen from outside.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use procfs::process::{all_processes, FDTarget, Process};

use crate::common::{wait_for, Supervisor, PATIENCE};

/// Its open files: how many of each kind. Numbers and inodes are other ones after an upgrade, the kinds are not.
pub fn fds_of(pid: i32) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for fd in Process::new(pid).unwrap().fd().unwrap().flatten() {
        let kind = match fd.target {
            // The table of processes is read now and then, beside the loop.
            FDTarget::Path(path) if path.starts_with("/proc") => continue,
            FDTarget::Path(path) => path.display().to_string(),
            FDTarget::Socket(_) => "socket".to_owned(),
            FDTarget::Pipe(_) => "pipe".to_owned(),
            FDTarget::AnonInode(name) => name,
            other => format!("{other:?}"),
        };
        *kinds.entry(kind).or_default() += 1;
    }
    kinds
}

/// A supervisor that has what it will have, and nothing under way.
pub struct Rest {
    pid: i32,
    fds: BTreeMap<String, usize>,
    memory: u64,
}

impl Rest {
    /// After two upgrades, as it holds the program before, too.
    pub fn of(supervisor: &Supervisor) -> Rest {
        for _ in 0..2 {
            supervisor.upgrade();
        }
        supervisor.wait_settled();
        supervisor.wait_until("its program was read for the digest", |status| {
            status.generations.iter().any(|one| one.pid.is_some() && one.program.sha256.is_some())
        });
        let pid = supervisor.pid();
        // A connection that was just closed may still be open at zddsup's end.
        let mut fds = fds_of(pid);
        for _ in 0..40 {
            std::thread::sleep(Duration::from_millis(5));
            let now = fds_of(pid);
            fds.retain(|kind, _| now.contains_key(kind));
            fds.iter_mut().for_each(|(kind, count)| *count = (*count).min(now[kind]));
        }
        Rest { pid, fds, memory: rss_of(pid) }
    }

    /// Waits until it has open what it had, and no more, and sees how much memory it uses.
    #[track_caller]
    pub fn is_back(&self) {
        let deadline = Instant::now() + PATIENCE;
        let mut now = fds_of(self.pid);
        while now.iter().any(|(kind, count)| self.fds.get(kind).is_none_or(|before| count > before)) {
            assert!(Instant::now() < deadline, "it had {:?} and has {now:?}", self.fds);
            std::thread::sleep(Duration::from_millis(5));
            now = fds_of(self.pid);
        }
        wait_for("its children are reaped", || zombies_of(self.pid).is_empty());
        let memory = rss_of(self.pid);
        println!("{} KiB before, {memory} KiB after", self.memory);
        self.assert_memory(memory);
    }

    /// Less than this is no leak, but what an allocator keeps.
    #[track_caller]
    pub fn assert_memory(&self, now: u64) {
        assert!(now < self.memory + 32 * 1024, "{} KiB before, {now} KiB now", self.memory);
    }
}

/// Its resident memory in KiB.
pub fn rss_of(pid: i32) -> u64 {
    Process::new(pid).unwrap().status().unwrap().vmrss.unwrap()
}

/// Its children that were not reaped.
pub fn zombies_of(pid: i32) -> Vec<i32> {
    let stats = all_processes().unwrap().flatten().filter_map(|process| process.stat().ok());
    stats.filter(|stat| stat.ppid == pid && stat.state == 'Z').map(|stat| stat.pid).collect()
}

/// Whether a process runs.
pub fn lives(pid: i32) -> bool {
    Process::new(pid).and_then(|process| process.stat()).is_ok_and(|stat| stat.state != 'Z')
}
