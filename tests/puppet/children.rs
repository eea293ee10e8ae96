//! Processes that a puppet leaves behind.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use super::flags::Grandchild;
use super::give_up;

/// Set for the process that goes on as a daemon.
pub const DAEMON: &str = "PUPPET_DAEMON";

/// The first process of a daemon: starts the second, waits until it serves, and is gone.
#[allow(clippy::zombie_processes)] // The child is to outlive this process.
pub fn go_on_as_child() {
    let program = std::env::current_exe().expect("its own path");
    let mut command = Command::new(program);
    command.args(std::env::args_os().skip(1)).env(DAEMON, "1").stdout(Stdio::piped());
    let mut child = command.spawn().expect("a child");
    let mut line = String::new();
    let said = child.stdout.take().map(|stdout| BufReader::new(stdout).read_line(&mut line));
    if !matches!(said, Some(Ok(1..))) {
        let _its_status = child.wait();
        give_up(68, "the daemon did not start");
    }
}

/// A process that outlives its parent, in a session of its own; it keeps all descriptors, as careless ones do.
pub fn spawn_grandchild(kind: Grandchild) -> u32 {
    let program = std::env::current_exe().expect("its own path");
    let sleep =
        if kind == Grandchild::Stubborn { "trap '' TERM; sleep 3600 & wait; sleep 3600" } else { "exec sleep 3600" };
    let output = Command::new(program).args(["--be-middle", sleep]).stderr(Stdio::inherit()).output().expect("a child");
    let pid = String::from_utf8_lossy(&output.stdout).trim().parse().expect("a pid");
    eprintln!("puppet: grandchild {pid}");
    pid
}

/// The process between: it leads a session, starts the grandchild, says its pid and is gone.
pub fn be_middle(script: Option<&str>) {
    nix::unistd::setsid().expect("a child leads no group");
    let mut command = Command::new("sh");
    command.args(["-c", script.unwrap_or_default()]).stdin(Stdio::null()).stdout(Stdio::null());
    println!("{}", command.spawn().expect("sh").id());
}
