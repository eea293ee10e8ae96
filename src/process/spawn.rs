//! Starts a process: fork, everything that it is to be, execve.

use std::ffi::{CString, OsStr, OsString};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::resource::{getrlimit, Resource};
use nix::sys::signal::{kill, Signal};
use nix::sys::stat::{fstat, Mode, SFlag};
use nix::unistd::{fchown, Pid};
use tokio::io::Interest;
use tokio::sync::oneshot;

pub use super::failure::SpawnError;

use super::failure::explain;
use super::group::Member;
use super::identity::Identity;
use super::limits::Limit;
use super::program::Program;
use super::reaper::Reaper;
use crate::core::End;
use crate::sys::exec::{self, Credentials, Failed, Forked, Image, Plan, Report};
use crate::sys::peek;
use crate::sys::pidfd::PidFd;
use crate::sys::readiness::Awaited;
use crate::sys::seccomp::{Filter, Installed, Notifier};

/// All that a process is to be. What is not said here it does not have: no other fd, no ignored or blocked signal.
#[derive(Debug)]
pub struct Launch {
    /// What it runs.
    pub program: Arc<Program>,
    /// Whether that very file is to be run, even if its path is another one by now.
    pub recorded: bool,
    /// argv, with argv\[0\].
    pub args: Vec<OsString>,
    /// Its whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// Where it enters its cgroup ([`Cgroup::entrance`](super::cgroup::Cgroup::entrance)). None: it stays in zddsup's.
    pub cgroup: Option<OwnedFd>,
    /// Where it runs; entered as its own user.
    pub directory: PathBuf,
    /// Placed at 3, 4, … in order.
    pub fds: Vec<Arc<OwnedFd>>,
    /// None: zddsup's own.
    pub stdout: Option<OwnedFd>,
    /// None: zddsup's own.
    pub stderr: Option<OwnedFd>,
    /// None: who zddsup runs as.
    pub identity: Option<Identity>,
    /// None: zddsup's own.
    pub umask: Option<Mode>,
    /// Set in order.
    pub limits: Vec<Limit>,
    /// None: zddsup's own.
    pub nice: Option<i32>,
    /// None: zddsup's own.
    pub oom_score_adj: Option<i32>,
    /// Whether its own pid is added to its environment, as `LISTEN_PID`.
    pub listen_pid: bool,
    /// Whether bind(2) and listen(2), its own and those of all that it starts, wait for an answer from zddsup.
    pub trap: bool,
}

/// A process that runs its program. It leads a process group of its own, and outlives zddsup on purpose.
#[derive(Debug)]
pub struct Spawned {
    /// Which it is.
    pub member: Member,
    /// The process itself.
    pub pidfd: PidFd,
    /// How it ended, from the reaper.
    pub end: oneshot::Receiver<End>,
    /// Its calls, if they are caught.
    pub trap: Option<Trap>,
}

/// Calls that wait for an answer.
#[derive(Debug)]
pub struct Trap {
    /// Which they are.
    pub notifier: Notifier,
    /// Whether the process can gain no privileges by execve(2), since zddsup has none itself: setuid programs and file
    /// capabilities do nothing for it.
    pub no_new_privs: bool,
}

/// Starts a process, and waits until its program runs. Forks at the first poll; a future that is dropped after that kills
/// what it forked. stdin is `/dev/null`.
pub async fn spawn(launch: Launch, reaper: &Reaper) -> Result<Spawned, SpawnError> {
    let held = held(&launch)?;
    let (mut starting, report) = Starting::fork(&launch, held, reaper)?;
    let outcome = match starting.hold() {
        Ok(()) => read_reports(report).await,
        Err(error) => Err(error),
    };
    let error = match outcome {
        Ok(Outcome::Executed(None)) => return starting.finish(None),
        Ok(Outcome::Executed(Some(installed))) => match trap(installed) {
            Ok(trap) => match starting.can_be_looked_into() {
                Ok(()) => return starting.finish(Some(trap)),
                Err(error) => error,
            },
            Err(error) => error,
        },
        Ok(Outcome::Failed(failed)) => {
            starting.reaped(reaper).await;
            return Err(explain(failed, &launch, held));
        }
        Err(error) => SpawnError::Watch(error),
    };
    starting.kill();
    starting.reaped(reaper).await;
    Err(error)
}

fn trap(installed: Installed) -> Result<Trap, SpawnError> {
    match Notifier::new(installed.listener) {
        Ok(notifier) => Ok(Trap { notifier, no_new_privs: installed.no_new_privs }),
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Err(SpawnError::trap(Errno::ENOSYS)),
        Err(error) => Err(SpawnError::Watch(error)),
    }
}

/// Whether the held file is run rather than a path.
fn held(launch: &Launch) -> Result<bool, SpawnError> {
    let program = &launch.program;
    if !launch.recorded {
        return Ok(false);
    }
    if program.was_overwritten() {
        tracing::warn!(
            "{} was changed in place: what runs is not what ran before; write new versions beside it and rename",
            program.found().display()
        );
    }
    match program.still_at() {
        Some(_) => Ok(false),
        None if program.is_script() => Err(SpawnError::ScriptGone(program.found().to_owned())),
        None => Ok(true),
    }
}

/// A child between fork and execve, killed if it is forgotten there.
struct Starting {
    pid: Pid,
    held: Option<(Member, PidFd)>,
    end: Option<oneshot::Receiver<End>>,
}

impl Starting {
    /// The fork and the watch are one step, so that no end is missed.
    fn fork(launch: &Launch, held: bool, reaper: &Reaper) -> Result<(Starting, OwnedFd), SpawnError> {
        let program = &launch.program;
        let path = match (launch.recorded, program.still_at()) {
            (true, Some(path)) => path,
            _ => program.found(),
        };
        let path = c_string("program", path.as_os_str())?;
        let args = launch.args.iter().map(|arg| c_string("argument", arg)).collect::<Result<Vec<_>, _>>()?;
        let env = environment(launch)?;
        let directory = c_string("directory", launch.directory.as_os_str())?;
        let null =
            OpenOptions::new().read(true).write(true).open(Path::new("/dev/null")).map_err(SpawnError::DevNull)?;
        let (own_stdout, own_stderr) = (io::stdout(), io::stderr());
        let stdout = launch.stdout.as_ref().map_or(own_stdout.as_fd(), AsFd::as_fd);
        let stderr = launch.stderr.as_ref().map_or(own_stderr.as_fd(), AsFd::as_fd);
        let fds: Vec<BorrowedFd<'_>> =
            [null.as_fd(), stdout, stderr].into_iter().chain(launch.fds.iter().map(AsFd::as_fd)).collect();
        check_room(fds.len())?;
        let trap = launch.trap.then(|| Filter::bind_and_listen().ok_or(SpawnError::TrapUnknown)).transpose()?;
        let limits: Vec<_> = launch.limits.iter().map(|limit| (limit.resource, limit.soft, limit.hard)).collect();
        let identity = launch.identity.as_ref().filter(|identity| !identity.is_own());
        if let Some(identity) = identity {
            give_pipes(launch, identity);
        }
        let plan = Plan {
            image: if held { Image::Held(program.held()) } else { Image::Path(&path) },
            args: &args,
            env: &env,
            cgroup: launch.cgroup.as_ref().map(AsFd::as_fd),
            listen_pid: launch.listen_pid,
            fds: &fds,
            limits: &limits,
            nice: launch.nice,
            oom_score_adj: launch.oom_score_adj,
            umask: launch.umask,
            credentials: identity.map(|identity| Credentials {
                uid: identity.uid,
                gid: identity.gid,
                groups: &identity.groups,
            }),
            directory: &directory,
            trap: trap.as_ref(),
        };
        let Forked { pid, report } = exec::spawn(&plan).map_err(SpawnError::Fork)?;
        let end = Some(reaper.watch(pid));
        Ok((Starting { pid, held: None, end }, report))
    }

    fn hold(&mut self) -> io::Result<()> {
        // Nobody has reaped it yet: it is there, if only as a zombie.
        self.held = Some((Member::of(self.pid)?, PidFd::open(self.pid)?));
        Ok(())
    }

    /// Whether its caught calls can be understood: else it must not run into the first one.
    fn can_be_looked_into(&self) -> Result<(), SpawnError> {
        let Some((_, pidfd)) = &self.held else { return Ok(()) };
        let copied = pidfd.take_fd(0).map(drop).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)));
        // Nothing is ever there: EFAULT is permission enough.
        let read = peek::read(self.pid, 1, &mut [0]).map(drop);
        for (call, result) in [("pidfd_getfd(2)", copied), ("process_vm_readv(2)", read)] {
            if let Err(errno @ (Errno::EPERM | Errno::EACCES | Errno::ENOSYS)) = result {
                return Err(SpawnError::Look { call, errno });
            }
        }
        Ok(())
    }

    /// Its program runs.
    fn finish(&mut self, trap: Option<Trap>) -> Result<Spawned, SpawnError> {
        let gone = || SpawnError::Watch(Errno::ESRCH.into());
        let ((member, pidfd), end) = self.held.take().zip(self.end.take()).ok_or_else(gone)?;
        Ok(Spawned { member, pidfd, end, trap })
    }

    /// Waits until nothing is left of it.
    async fn reaped(&mut self, reaper: &Reaper) {
        if let Some((_, pidfd)) = &self.held {
            if pidfd.exited().await.is_ok() {
                reaper.reap();
            }
        }
        if let Some(end) = &mut self.end {
            let _how_does_not_matter = end.await;
        }
        self.end = None;
    }

    fn kill(&self) {
        match &self.held {
            Some((_, pidfd)) => {
                let _gone_already = pidfd.signal(Signal::SIGKILL);
            }
            // Not reaped yet, or its end would be known: the pid is still its own.
            None => {
                let _gone_already = kill(self.pid, Signal::SIGKILL);
            }
        }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        let lives = self.end.as_mut().is_some_and(|end| end.try_recv().is_err());
        if lives {
            self.kill();
        }
    }
}

/// What became of a child.
enum Outcome {
    /// Its program runs.
    Executed(Option<Installed>),
    Failed(Failed),
}

async fn read_reports(reports: OwnedFd) -> io::Result<Outcome> {
    let reports = Awaited::new(reports, Interest::READABLE)?;
    let mut installed = None;
    loop {
        let mut ready = reports.readable().await?;
        match ready.try_io(|fd| exec::receive(fd.get_ref().as_fd())) {
            Ok(Ok(Report::Trapped(found))) => installed = Some(found),
            Ok(Ok(Report::Executed)) => return Ok(Outcome::Executed(installed)),
            Ok(Ok(Report::Failed(failed))) => return Ok(Outcome::Failed(failed)),
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

fn environment(launch: &Launch) -> Result<Vec<CString>, SpawnError> {
    let wanted = launch.env.iter().filter(|(name, _)| !(launch.listen_pid && name == "LISTEN_PID"));
    let pair = |(name, value): &(OsString, OsString)| {
        let mut pair = name.clone();
        pair.push("=");
        pair.push(value);
        CString::new(pair.into_vec()).map_err(|_| nul("environment variable", name))
    };
    wanted.map(pair).collect()
}

fn c_string(what: &'static str, text: &OsStr) -> Result<CString, SpawnError> {
    CString::new(text.as_bytes()).map_err(|_| nul(what, text))
}

fn nul(what: &'static str, text: &OsStr) -> SpawnError {
    SpawnError::Nul { what, text: text.to_string_lossy().into_owned() }
}

/// Each fd is open twice while they are moved, and the report's and the program's with them. The filter's
/// listener comes when that is over.
fn check_room(fds: usize) -> Result<(), SpawnError> {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).map_err(|errno| SpawnError::Fork(errno.into()))?;
    let wanted = fds.saturating_mul(2).saturating_add(4);
    if u64::try_from(wanted).is_ok_and(|wanted| wanted <= limit) {
        Ok(())
    } else {
        Err(SpawnError::TooManyFds { wanted, limit })
    }
}

/// A program that opens `/dev/stderr` by its name needs the pipe to be its user's.
fn give_pipes(launch: &Launch, identity: &Identity) {
    for fd in launch.stdout.iter().chain(&launch.stderr) {
        let is_pipe =
            fstat(fd).is_ok_and(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFIFO);
        if is_pipe {
            let _works_without = fchown(fd, Some(identity.uid), None);
        }
    }
}
