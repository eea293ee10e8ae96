//! What a process costs, from `/proc`.

use std::fs;
use std::time::Duration;

/// Memory of a process, in KiB.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// All pages that it has in memory, those of files too.
    pub resident: u64,
    /// Shared ones counted in part.
    pub proportional: u64,
    /// What would be free without it.
    pub private: u64,
    /// No file's: heap, stacks, changed data.
    pub anonymous: u64,
}

impl Memory {
    #[must_use]
    pub fn of(pid: i32) -> Memory {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("smaps_rollup");
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("a field");
            line.split_whitespace().next().and_then(|number| number.parse::<u64>().ok()).expect("a number")
        };
        Memory {
            resident: field("Rss:"),
            proportional: field("Pss:"),
            private: field("Private_Clean:") + field("Private_Dirty:"),
            anonymous: field("Anonymous:"),
        }
    }
}

/// Open fds of a process.
#[must_use]
pub fn fds(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).expect("its fds").count()
}

/// Threads of a process, by name.
#[must_use]
pub fn threads(pid: i32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads").flatten();
    let mut names: Vec<_> = tasks
        .filter_map(|task| fs::read_to_string(task.path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .collect();
    names.sort();
    names
}

/// What all threads of a process have done since they began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Activity {
    /// Time on a CPU as the scheduler counts it, exact to the nanosecond.
    pub cpu_ns: u64,
    /// utime and stime of `/proc/PID/stat`, in ticks of 10 ms.
    pub ticks: u64,
    /// Times that a thread went to sleep: one for each wake-up.
    pub voluntary: u64,
    /// Times that a thread had to make room for another one.
    pub involuntary: u64,
}

impl Activity {
    /// Looking does not wake it.
    #[must_use]
    pub fn of(pid: i32) -> Activity {
        let mut sum = Activity::default();
        for task in fs::read_dir(format!("/proc/{pid}/task")).expect("its threads").flatten() {
            let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let number = |text: Option<&str>| text.and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0);
            sum.cpu_ns += number(read("schedstat").split(' ').next());
            let (status, stat) = (read("status"), read("stat"));
            let field = |name: &str| number(status.lines().find_map(|line| line.strip_prefix(name)));
            sum.voluntary += field("voluntary_ctxt_switches:");
            sum.involuntary += field("nonvoluntary_ctxt_switches:");
            // The name may have spaces: fields are counted from its end. utime is the 14th of all, stime the 15th.
            let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
            sum.ticks += fields.split(' ').skip(11).take(2).map(|ticks| number(Some(ticks))).sum::<u64>();
        }
        sum
    }

    /// What was done since then.
    #[must_use]
    pub fn since(&self, before: Activity) -> Activity {
        Activity {
            cpu_ns: self.cpu_ns.saturating_sub(before.cpu_ns),
            ticks: self.ticks.saturating_sub(before.ticks),
            voluntary: self.voluntary.saturating_sub(before.voluntary),
            involuntary: self.involuntary.saturating_sub(before.involuntary),
        }
    }
}

/// CPU time of all processes of a group, with what their threads that have ended used. Exact to ticks of 10 ms.
#[must_use]
pub fn group_cpu(group: i32) -> Duration {
    let all = procfs::process::all_processes().expect("/proc").flatten();
    let stats = all.filter_map(|process| process.stat().ok()).filter(|stat| stat.pgrp == group);
    Duration::from_millis(10 * stats.map(|stat| stat.utime + stat.stime).sum::<u64>())
}
