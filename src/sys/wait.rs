//! Ends of children: waitid(2). nix's own fails on a child that a real-time signal killed, when it is reaped already.

use std::io;
use std::mem;

use nix::errno::Errno;
use nix::sys::signal::{signal, SigHandler, Signal};
use nix::unistd::Pid;

/// A child that was reaped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reaped {
    /// Its pid, which may be used again from now on.
    pub pid: Pid,
    /// How it ended.
    pub status: Status,
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It called exit with this code.
    Exited(i32),
    /// This signal killed it.
    Killed {
        /// Number of the signal.
        signal: i32,
        /// Whether a core was dumped.
        core: bool,
    },
}

/// Reaps one child that has ended, without waiting. None when there is none, or no child at all.
pub fn reap_any() -> io::Result<Option<Reaped>> {
    loop {
        // SAFETY: siginfo_t is plain data, for which zeroes are a valid value.
        let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
        // SAFETY: waitid(2) writes to the siginfo_t that it is given, and to nothing else.
        let result = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, libc::WEXITED | libc::WNOHANG) };
        match Errno::result(result) {
            Ok(_) => {}
            Err(Errno::ECHILD) => return Ok(None),
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        // SAFETY: after waitid(2) these are the fields that are set; si_pid is 0 when no child has ended.
        let (pid, value) = unsafe { (info.si_pid(), info.si_status()) };
        let status = match info.si_code {
            libc::CLD_EXITED => Status::Exited(value),
            code => Status::Killed { signal: value, core: code == libc::CLD_DUMPED },
        };
        return Ok((pid != 0).then_some(Reaped { pid: Pid::from_raw(pid), status }));
    }
}

/// Undoes an inherited "SIGCHLD is ignored", under which the kernel reaps children by itself and their ends are lost.
pub fn keep_ends() -> nix::Result<()> {
    // SAFETY: the default disposition runs no code of ours.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }.map(drop)
}
