//! What a process was started with, as far as it can see for itself.

use std::fmt::Write;
use std::fs;

/// Descriptors by number, with what they are and their status flags.
pub fn fds() -> String {
    let mut lines = String::new();
    let entries = fs::read_dir("/proc/self/fd").expect("/proc is mounted");
    let mut numbers: Vec<u32> = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    for number in numbers {
        // The directory that was just read is gone again.
        let Ok(what) = fs::read_link(format!("/proc/self/fd/{number}")) else { continue };
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or_default();
        let _infallible = writeln!(lines, "fd {number} {} flags={}", what.display(), flags.trim());
    }
    lines
}

/// One line a fact, `name value`. Rust's runtime has ignored SIGPIPE by now: that bit of `SigIgn` is its own.
pub fn all() -> String {
    let mut lines = fds();
    let status = fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    let wanted = ["Umask", "PPid", "Uid", "Gid", "Groups", "SigBlk", "SigIgn", "NoNewPrivs", "CapEff"];
    for line in status.lines() {
        if let Some((name, value)) = line.split_once(':').filter(|(name, _)| wanted.contains(name)) {
            let _infallible = writeln!(lines, "{name} {}", value.split_whitespace().collect::<Vec<_>>().join(" "));
        }
    }
    let limits = fs::read_to_string("/proc/self/limits").expect("/proc is mounted");
    for line in limits.lines().filter(|line| line.starts_with("Max ")) {
        let _infallible = writeln!(lines, "{}", line.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    let stat = fs::read_to_string("/proc/self/stat").expect("/proc is mounted");
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let oom = fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
    let facts = [
        ("pid", std::process::id().to_string()),
        ("pgrp", fields[2].to_owned()),
        ("session", fields[3].to_owned()),
        ("nice", fields[16].to_owned()),
        ("oom_score_adj", oom.trim().to_owned()),
        ("cwd", fs::read_link("/proc/self/cwd").map(|path| path.display().to_string()).unwrap_or_default()),
        ("exe", fs::read_link("/proc/self/exe").map(|path| path.display().to_string()).unwrap_or_default()),
        ("args", std::env::args().collect::<Vec<_>>().join(" ")),
    ];
    for (name, value) in facts {
        let _infallible = writeln!(lines, "{name} {value}");
    }
    lines
}
