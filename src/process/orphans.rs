//! Orphans of which nothing shows whose they were: daemons that wrote their title over their environment, as nginx does.

use std::fs;
use std::io;

use nix::unistd::Pid;

use super::group::{Member, MARKER_VAR};
use super::table::{has_environment, Stat};

/// Children of zddsup that it did not start, without any generation's marker: each has a seccomp filter more than zddsup,
/// and so was started by a program whose bind(2) and listen(2) are caught.
pub fn without_marker() -> io::Result<Vec<Member>> {
    let own = Pid::this().as_raw();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(stat) = Stat::read(pid) else { continue };
        if stat.lives && stat.parent == own && filters(&pid.to_string()) > filters("self") && !is_ours(pid) {
            found.push(stat.member);
        }
    }
    Ok(found)
}

/// Whether it is known where it comes from, or will be: it has a marker, or is on its way from fork(2) to execve(2).
fn is_ours(pid: i32) -> bool {
    let program = |pid: &str| fs::read_link(format!("/proc/{pid}/exe")).ok();
    let Ok(environ) = fs::read(format!("/proc/{pid}/environ")) else { return true };
    let marker = format!("{MARKER_VAR}=").into_bytes();
    (environ.is_empty() && !has_environment(pid))
        || environ.split(|&byte| byte == 0).any(|one| one.starts_with(&marker))
        || program(&pid.to_string()).is_none_or(|its| program("self") == Some(its))
}

/// How many filters are in force for a process (proc(5), since Linux 5.9).
fn filters(pid: &str) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:"))?.trim().parse().ok()
}
