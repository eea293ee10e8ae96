//! fork(2) and execve(2) of a generation.
//!
//! zddsup has threads, so the child may only do what is async-signal-safe (signal-safety(7)): everything is prepared
//! before the fork, and the child is a list of system calls. The first one that fails is reported over a socket, which a
//! successful execve(2) closes.

mod report;

pub use self::report::{receive, Failed, Report, Step};

use self::report::{step, Reporter};

use std::ffi::{c_char, c_int, CStr, CString};
use std::io;
use std::iter::once;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;

use nix::errno::Errno;
use nix::libc;
use nix::sys::resource::{getrlimit, rlim_t, setrlimit, Resource};
use nix::sys::signal::{SigSet, SigmaskHow};
use nix::sys::stat::{umask, Mode};
use nix::unistd::{fork, getpid, setpgid, write, ForkResult, Gid, Pid, Uid};

use super::seccomp::Filter;

/// What is executed.
#[derive(Debug, Clone, Copy)]
pub enum Image<'a> {
    /// What has this path then.
    Path(&'a CStr),
    /// This open file, whether it still has a path or not.
    Held(BorrowedFd<'a>),
}

/// Who the child becomes.
#[derive(Debug, Clone, Copy)]
pub struct Credentials<'a> {
    /// User.
    pub uid: Uid,
    /// Primary group.
    pub gid: Gid,
    /// Supplementary groups.
    pub groups: &'a [Gid],
}

/// Everything about the child.
#[derive(Debug, Clone, Copy)]
pub struct Plan<'a> {
    /// The program.
    pub image: Image<'a>,
    /// argv.
    pub args: &'a [CString],
    /// `NAME=value`.
    pub env: &'a [CString],
    /// `cgroup.procs` of the cgroup that it is put into before anything else. None: zddsup's own.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// Whether it also gets `LISTEN_PID`, its own pid.
    pub listen_pid: bool,
    /// All that it has open: placed at 0, 1, 2, … in order.
    pub fds: &'a [BorrowedFd<'a>],
    /// Resource, soft and hard limit.
    pub limits: &'a [(Resource, rlim_t, rlim_t)],
    /// Nice value (setpriority(2)).
    pub nice: Option<i32>,
    /// `/proc/self/oom_score_adj`.
    pub oom_score_adj: Option<i32>,
    /// File mode creation mask.
    pub umask: Option<Mode>,
    /// None: zddsup's own.
    pub credentials: Option<Credentials<'a>>,
    /// Working directory, entered as the child's user.
    pub directory: &'a CStr,
    /// Which of its calls are caught.
    pub trap: Option<&'a Filter>,
}

/// A child on its way to execve(2).
#[derive(Debug)]
pub struct Forked {
    /// Its pid. It was not reaped yet.
    pub pid: Pid,
    /// What becomes of it: to be received until [`Report::Executed`] or [`Report::Failed`].
    pub report: OwnedFd,
}

/// Forks a child that follows the plan. It leads a process group of its own, whoever looks first.
pub fn spawn(plan: &Plan<'_>) -> io::Result<Forked> {
    let (report, child_end) = report::channel()?;
    let mut child = Child::prepare(plan, child_end.as_fd())?;
    // No handler may run in the child, and no signal may end it, before its dispositions are the default ones.
    let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    // SAFETY: the child calls nothing but `Child::run`, which is async-signal-safe, and _exit.
    let forked = unsafe { fork() };
    if let Ok(ForkResult::Child) = forked {
        let failed = child.run();
        child.report.failed(failed);
        // SAFETY: ends the process without running what belongs to the parent (atexit(3), destructors).
        unsafe { libc::_exit(127) };
    }
    mask.thread_set_mask()?;
    match forked? {
        ForkResult::Parent { child: pid } => {
            // Here and in the child, so that the group is there for whoever comes first. It may have run on already.
            let _done_by_the_child = setpgid(pid, pid);
            Ok(Forked { pid, report })
        }
        ForkResult::Child => unreachable!("the child has exited"),
    }
}

/// The plan as the child needs it: nothing is allocated any more.
struct Child<'a> {
    plan: &'a Plan<'a>,
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
    listen_pid: Option<Box<[u8; 32]>>,
    oom_score_adj: Option<String>,
    /// Where each fd is at the moment.
    at: Vec<RawFd>,
    report: Reporter,
    held: Option<RawFd>,
    /// The first number that is no target.
    free: RawFd,
    /// No open fd is above.
    highest: RawFd,
}

const LISTEN_PID: &[u8] = b"LISTEN_PID=";

impl<'a> Child<'a> {
    fn prepare(plan: &'a Plan<'a>, report: BorrowedFd<'a>) -> io::Result<Self> {
        let mut listen_pid = plan.listen_pid.then(|| Box::new([0; 32]));
        let listen_pid_entry = listen_pid.as_mut().map(|buffer| {
            buffer[..LISTEN_PID.len()].copy_from_slice(LISTEN_PID);
            buffer.as_ptr().cast::<c_char>()
        });
        let pointers = |strings: &[CString]| strings.iter().map(|string| string.as_ptr()).collect::<Vec<_>>();
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        Ok(Child {
            plan,
            argv: pointers(plan.args).into_iter().chain(once(ptr::null())).collect(),
            envp: pointers(plan.env).into_iter().chain(listen_pid_entry).chain(once(ptr::null())).collect(),
            listen_pid,
            oom_score_adj: plan.oom_score_adj.map(|score| score.to_string()),
            at: plan.fds.iter().map(AsRawFd::as_raw_fd).collect(),
            report: Reporter::at(report.as_raw_fd()),
            held: match plan.image {
                Image::Path(_) => None,
                Image::Held(fd) => Some(fd.as_raw_fd()),
            },
            free: RawFd::try_from(plan.fds.len()).map_err(io::Error::other)?,
            highest: RawFd::try_from(soft).unwrap_or(1 << 20).min(1 << 20),
        })
    }

    /// Every step. Comes back only with what went wrong.
    fn run(&mut self) -> Failed {
        match self.steps() {
            Ok(()) => Failed { step: Step::Execute, errno: Errno::last(), index: 0 },
            Err(failed) => failed,
        }
    }

    fn steps(&mut self) -> Result<(), Failed> {
        step(Step::Group, setpgid(Pid::from_raw(0), Pid::from_raw(0)))?;
        if let Some(entrance) = self.plan.cgroup {
            // 0: who writes (cgroup_procs_write_start in kernel/cgroup/cgroup.c).
            step(Step::Cgroup, write(entrance, b"0"))?;
        }
        self.place_fds()?;
        self.close_others();
        self.priorities()?;
        // As whoever zddsup is: its privilege makes it unnecessary that the program may gain none.
        self.trap()?;
        // After the last fd is made: a limit below their numbers does not close them.
        for (index, &(resource, soft, hard)) in self.plan.limits.iter().enumerate() {
            step(Step::Limit, setrlimit(resource, soft, hard)).map_err(|failed| Failed { index, ..failed })?;
        }
        if let Some(mode) = self.plan.umask {
            umask(mode);
        }
        if let Some(credentials) = self.plan.credentials {
            become_user(&credentials)?;
        }
        // SAFETY: chdir(2) on a string that ends with NUL.
        step(Step::Directory, Errno::result(unsafe { libc::chdir(self.plan.directory.as_ptr()) }))?;
        default_dispositions();
        step(Step::Signals, SigSet::empty().thread_set_mask())?;
        self.write_pid();
        self.execute();
        Ok(())
    }

    /// Puts every fd at its number. A source may have the number of another one's target, so all of them are moved out of
    /// the way first, the report's and the program's own too.
    fn place_fds(&mut self) -> Result<(), Failed> {
        let above = self.free + 2;
        self.report = Reporter::at(duplicate(self.report.fd(), above, 0)?);
        if let Some(held) = &mut self.held {
            *held = duplicate(*held, above, 0)?;
        }
        for (index, at) in self.at.iter_mut().enumerate() {
            *at = duplicate(*at, above, index)?;
        }
        for (index, (&at, target)) in self.at.iter().zip(0..).enumerate() {
            place(at, target, 0, index)?;
        }
        self.report = Reporter::at(place(self.report.fd(), self.free, libc::O_CLOEXEC, 0)?);
        if let Some(held) = self.held {
            self.held = Some(place(held, self.free + 1, libc::O_CLOEXEC, 0)?);
        }
        Ok(())
    }

    /// Closes everything else, now and not at execve(2), which may take a while: another child's report must not wait for
    /// this one.
    fn close_others(&self) {
        let first = self.free + if self.held.is_some() { 2 } else { 1 };
        // SAFETY: close_range(2) takes integers; no fd from there on is used again.
        let closed = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
        if closed != 0 {
            // Before Linux 5.9, or forbidden by a seccomp filter that does not know it.
            for fd in first..self.highest {
                // SAFETY: as above.
                unsafe { libc::close(fd) };
            }
        }
    }

    fn priorities(&self) -> Result<(), Failed> {
        if let Some(nice) = self.plan.nice {
            // SAFETY: setpriority(2) takes integers.
            step(Step::Nice, Errno::result(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) }))?;
        }
        if let Some(score) = &self.oom_score_adj {
            // SAFETY: open(2) on a string that ends with NUL; write(2) from a buffer of that length; the fd is ours.
            let written = unsafe {
                let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                let fd = step(Step::OomScore, Errno::result(fd))?;
                let written = Errno::result(libc::write(fd, score.as_ptr().cast(), score.len()));
                libc::close(fd);
                written
            };
            step(Step::OomScore, written)?;
        }
        Ok(())
    }

    /// Nobody answers the calls until zddsup has the listener, and none of the steps to come is caught.
    fn trap(&self) -> Result<(), Failed> {
        let Some(filter) = self.plan.trap else { return Ok(()) };
        let installed = step(Step::Trap, filter.install())?;
        // Its copy is closed here: the program must not be able to answer itself.
        step(Step::Trap, self.report.trapped(&installed))
    }

    /// `LISTEN_PID` is the pid of the process that runs the program: nobody knows it before the fork.
    fn write_pid(&mut self) {
        let Some(buffer) = &mut self.listen_pid else { return };
        let mut digits = [0; 10];
        let mut rest = getpid().as_raw().unsigned_abs();
        let mut count = 0;
        for digit in &mut digits {
            *digit = b'0' + u8::try_from(rest % 10).unwrap_or(0);
            rest /= 10;
            count += 1;
            if rest == 0 {
                break;
            }
        }
        let place = buffer.iter_mut().skip(LISTEN_PID.len());
        for (byte, digit) in place.zip(digits.iter().take(count).rev()) {
            *byte = *digit;
        }
    }

    fn execute(&self) {
        let (argv, envp) = (self.argv.as_ptr(), self.envp.as_ptr());
        match (self.plan.image, self.held) {
            (Image::Path(path), _) => {
                // SAFETY: path, and the strings of both lists, end with NUL, and both lists with a null pointer.
                unsafe { libc::execve(path.as_ptr(), argv, envp) };
            }
            (Image::Held(_), held) => {
                let (held, empty) = (held.unwrap_or(-1), c"".as_ptr());
                // SAFETY: as above; with AT_EMPTY_PATH execveat(2) means the fd itself.
                unsafe { libc::syscall(libc::SYS_execveat, held, empty, argv, envp, libc::AT_EMPTY_PATH) };
            }
        }
    }
}

fn duplicate(fd: RawFd, above: RawFd, index: usize) -> Result<RawFd, Failed> {
    // SAFETY: fcntl(2) with integers; what it makes closes at execve(2).
    let copy = Errno::result(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, above) });
    copy.map_err(|errno| Failed { step: Step::Duplicate, errno, index })
}

fn place(fd: RawFd, target: RawFd, flags: c_int, index: usize) -> Result<RawFd, Failed> {
    // SAFETY: dup3(2) with integers. What was open at the target has been copied, or is not the child's to keep.
    let placed = Errno::result(unsafe { libc::dup3(fd, target, flags) });
    placed.map_err(|errno| Failed { step: Step::Place, errno, index })
}

/// The system calls themselves: the C library's functions would make all threads of the parent's take part.
fn become_user(credentials: &Credentials<'_>) -> Result<(), Failed> {
    #[cfg(not(any(target_arch = "x86", target_arch = "arm")))]
    use libc::{SYS_setgroups as SETGROUPS, SYS_setresgid as SETRESGID, SYS_setresuid as SETRESUID};
    // Without the 32, ids have 16 bits there.
    #[cfg(any(target_arch = "x86", target_arch = "arm"))]
    use libc::{SYS_setgroups32 as SETGROUPS, SYS_setresgid32 as SETRESGID, SYS_setresuid32 as SETRESUID};

    let (uid, gid, groups) = (credentials.uid.as_raw(), credentials.gid.as_raw(), credentials.groups);
    // SAFETY: setgroups(2) reads that many gids; Gid is a transparent gid_t.
    step(Step::Groups, Errno::result(unsafe { libc::syscall(SETGROUPS, groups.len(), groups.as_ptr()) }))?;
    // SAFETY: setresgid(2) takes integers.
    step(Step::Gid, Errno::result(unsafe { libc::syscall(SETRESGID, gid, gid, gid) }))?;
    // SAFETY: setresuid(2) takes integers.
    step(Step::Uid, Errno::result(unsafe { libc::syscall(SETRESUID, uid, uid, uid) }))?;
    Ok(())
}

/// What was ignored stays ignored over execve(2): Rust ignores SIGPIPE, `nohup` SIGHUP. The system call itself, because the
/// C library's function keeps its own two signals (32, 33) to itself, which some launchers leave ignored.
fn default_dispositions() {
    // The kernel's sigaction, whatever its order: SIG_DFL is 0, with no flags and an empty mask of 64 signals.
    let default = [0_u64; 8];
    for signal in 1..=64 {
        let (action, before) = (default.as_ptr(), ptr::null_mut::<u64>());
        // SAFETY: reads one sigaction, which is shorter than the array. EINVAL for SIGKILL and SIGSTOP.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, action, before, 8) };
    }
}
