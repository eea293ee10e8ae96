//! What zddsup itself has open and uses, seen from outside.

use std::collections::BTreeMap;

use procfs::process::{all_processes, FDTarget, Process};

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
