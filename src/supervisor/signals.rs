//! The one signal path: a signalfd(2), so that the sender is known and no handler or disposition has to be undone.

use std::io;

use nix::errno::Errno;
use nix::fcntl::{open, OFlag};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{siginfo, SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use nix::unistd::{getpid, getsid, Pid};
use std::os::fd::{AsFd, OwnedFd};
use tokio::io::Interest;

use crate::sys::readiness::Awaited;

/// Passed on to the incumbent when a process (not a terminal) sent them.
const FORWARDED: [Signal; 4] = [Signal::SIGWINCH, Signal::SIGTTIN, Signal::SIGTTOU, Signal::SIGALRM];

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// HUP.
    Upgrade,
    /// TERM, INT, or the terminal was closed.
    Stop,
    /// QUIT.
    Quit,
    /// USR1.
    PrintStatus,
    /// USR2.
    SelfUpgrade,
    /// CHLD.
    Reap,
    /// One that the incumbent may know what to do with.
    Forward(Signal),
}

/// Blocks every signal that zddsup takes. To be called before the first thread is made, so that all inherit it.
pub fn block() -> nix::Result<()> {
    mask().thread_block()
}

fn mask() -> SigSet {
    let mut mask = SigSet::empty();
    let own = [
        Signal::SIGHUP,
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGCHLD,
    ];
    for signal in own.into_iter().chain(FORWARDED) {
        mask.add(signal);
    }
    mask
}

/// Signals as they come.
#[derive(Debug)]
pub struct Signals {
    fd: Awaited<SignalFd>,
    terminal: Option<OwnedFd>,
    hangup_ignored: bool,
}

impl Signals {
    /// Listens from now on. Within a runtime only; [`block`] was called before.
    pub fn new() -> io::Result<Self> {
        let fd = SignalFd::with_flags(&mask(), SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let flags = OFlag::O_RDONLY | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        Ok(Signals {
            fd: Awaited::new(fd, Interest::READABLE)?,
            terminal: open("/dev/tty", flags, Mode::empty()).ok(),
            hangup_ignored: inherited_ignored(Signal::SIGHUP),
        })
    }

    /// The next wish.
    pub async fn next(&self) -> io::Result<Wish> {
        loop {
            let mut ready = self.fd.readable().await?;
            match self.fd.get_ref().read_signal() {
                Ok(Some(info)) => {
                    if let Some(wish) = self.wish(&info) {
                        return Ok(wish);
                    }
                }
                Ok(None) => ready.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn wish(&self, info: &siginfo) -> Option<Wish> {
        let signal = Signal::try_from(i32::try_from(info.ssi_signo).ok()?).ok()?;
        let from_process = info.ssi_code <= 0;
        Some(match signal {
            Signal::SIGHUP if self.is_hangup(info) => {
                tracing::info!(ignored = self.hangup_ignored, "the terminal was closed");
                return (!self.hangup_ignored).then_some(Wish::Stop);
            }
            Signal::SIGHUP => Wish::Upgrade,
            Signal::SIGTERM | Signal::SIGINT => Wish::Stop,
            Signal::SIGQUIT => Wish::Quit,
            Signal::SIGUSR1 => Wish::PrintStatus,
            Signal::SIGUSR2 => Wish::SelfUpgrade,
            Signal::SIGCHLD => Wish::Reap,
            other if from_process && FORWARDED.contains(&other) => Wish::Forward(other),
            _ => return None,
        })
    }

    /// A closed terminal is no deploy. The kernel says so itself, or the shell that led the session passes it on.
    fn is_hangup(&self, info: &siginfo) -> bool {
        let Some(terminal) = &self.terminal else {
            return false;
        };
        let from_kernel = info.ssi_code > 0;
        let leader = getsid(None).ok().map(Pid::as_raw);
        let from_leader = i32::try_from(info.ssi_pid).ok() == leader && leader != Some(getpid().as_raw());
        from_kernel || (from_leader && hung_up(terminal))
    }
}

fn hung_up(terminal: &OwnedFd) -> bool {
    let mut asked = [PollFd::new(terminal.as_fd(), PollFlags::POLLIN)];
    let hup = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
    poll(&mut asked, PollTimeout::ZERO).is_ok() && asked[0].revents().is_some_and(|events| events.intersects(hup))
}

/// Whether a signal was ignored when zddsup was started, as `nohup` does with HUP (`SigIgn` in proc(5)).
fn inherited_ignored(signal: Signal) -> bool {
    let Ok(status) = procfs::process::Process::myself().and_then(|process| process.status()) else {
        return false;
    };
    status.sigign & (1 << (signal as i32 - 1)) != 0
}

/// What a signal number is called, for people.
#[must_use]
pub fn name(number: i32) -> String {
    Signal::try_from(number).map_or_else(|_| format!("signal {number}"), |signal| signal.as_str().to_owned())
}
