//! A process that binds and listens, and what `run` would do with its calls.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::{Findings, Verdict};
use crate::handoff::adopt::remote::{Address, Caller, LookError};
use crate::process::program::Program;
use crate::process::reaper::Reaper;
use crate::process::spawn::{spawn, Launch, Trap};
use crate::sys::seccomp::{Call, Notification, Notifier};

/// More than a machine takes that is not stuck.
const PATIENCE: Duration = Duration::from_secs(20);

const CATCHES: &str = "catch bind and listen";
const LOOKS: &str = "look at the caller";
const PLACES: &str = "give it a socket";
const INSTEAD: &str = "without it, use --listen with --handoff fds or --handoff socket";

/// What the process does that [`adoption`] starts: binds, listens, and waits for its end.
pub fn be_tried() -> io::Result<()> {
    let listener = TcpListener::bind(loopback())?;
    std::thread::sleep(PATIENCE * 2);
    drop(listener);
    Ok(())
}

fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

pub(super) async fn adoption(findings: &mut Findings, program: &Path, args: &[&str]) {
    let reaper = Reaper::new();
    let started = async {
        let program = Program::resolve(program.as_os_str(), None, Path::new("/")).map_err(|error| error.to_string())?;
        spawn(launch(program, args), &reaper).await.map_err(|error| error.to_string())
    };
    let Some(mut spawned) = findings.tried(CATCHES, "seccomp(2), pidfd_open(2)", "", started.await) else { return };
    if let Some(trap) = spawned.trap.take() {
        calls(findings, trap).await;
    }
    // Killed in any case, and reaped.
    let _gone_already = spawned.pidfd.signal(Signal::SIGKILL);
    let _it_is_gone = spawned.pidfd.exited().await;
    reaper.reap();
}

async fn calls(findings: &mut Findings, trap: Trap) {
    if trap.no_new_privs {
        let words =
            "zddsup has no CAP_SYS_ADMIN: setuid programs and file capabilities do nothing for an adopted service";
        findings.add("privileges", Verdict::Note, words);
    }
    let bind = next(&trap.notifier).await.and_then(|bind| {
        look(&trap.notifier, &bind).map_err(|error| error.to_string())?;
        Ok(bind)
    });
    let words = "process_vm_readv(2), pidfd_getfd(2), /proc";
    let Some(bind) = findings.tried(LOOKS, words, INSTEAD, bind) else { return };
    let instead = "without it, what waits for a generation that crashed is lost; use --listen";
    let placed = place(&trap.notifier, &bind).await;
    let _was_told = findings.tried(PLACES, "SECCOMP_IOCTL_NOTIF_ADDFD", instead, placed);
}

async fn next(notifier: &Notifier) -> Result<Notification, String> {
    let call = tokio::time::timeout(PATIENCE, notifier.next()).await;
    call.map_err(|_| "no call arrived".to_owned())?.map_err(|error| format!("no call arrived: {error}"))
}

fn look(notifier: &Notifier, notification: &Notification) -> Result<(), LookError> {
    let caller = Caller::of(notifier, notification)?;
    let Call::Bind { fd, address, length } = notification.call else { return Err(LookError::Gone) };
    let _its_socket = caller.copy(fd)?;
    match caller.address(address, length)? {
        Address::Inet(found) if found == loopback() => Ok(()),
        Address::Inet(_) | Address::Unix(_) | Address::Other => Err(LookError::Gone),
    }
}

/// In the place of its own, which makes its listen(2) one on this.
async fn place(notifier: &Notifier, bind: &Notification) -> Result<(), String> {
    let held = TcpListener::bind(loopback()).map_err(|error| error.to_string())?;
    let Call::Bind { fd, .. } = bind.call else { return Err("it did not call bind(2)".to_owned()) };
    let placed = notifier.put_in_place(bind.id, held.as_fd(), fd, true).map_err(|error| error.to_string())?;
    let answered = notifier.answer(bind.id, Ok(())).map_err(|error| error.to_string())?;
    let listen = next(notifier).await?;
    let is_its_own = {
        let Call::Listen { fd, .. } = listen.call else { return Err("it did not call listen(2)".to_owned()) };
        let copy =
            Caller::of(notifier, &listen).and_then(|caller| caller.copy(fd)).map_err(|error| error.to_string())?;
        TcpListener::from(copy).local_addr().ok() == held.local_addr().ok()
    };
    let went_on = notifier.go_on(listen.id).map_err(|error| error.to_string())?;
    let all = placed && answered && is_its_own && went_on;
    all.then_some(()).ok_or_else(|| "the process went on with another socket".to_owned())
}

fn launch(program: Program, args: &[&str]) -> Launch {
    Launch {
        args: std::iter::once("zddsup").chain(args.iter().copied()).map(Into::into).collect(),
        program: Arc::new(program),
        recorded: false,
        env: Vec::new(),
        cgroup: None,
        directory: "/".into(),
        fds: Vec::new(),
        stdout: None,
        stderr: None,
        identity: None,
        umask: None,
        limits: Vec::new(),
        nice: None,
        oom_score_adj: None,
        listen_pid: false,
        trap: true,
    }
}
