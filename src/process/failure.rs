//! Why a process could not be started, in words.

use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::Uid;

use super::interpreter;
use super::spawn::Launch;
use crate::sys::exec::{Failed, Step};

/// Why a process could not be started. None is left of it.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The kernel would cut it there.
    #[error("{what} {text:?} has a NUL byte in it: take it out")]
    Nul {
        /// An argument, a variable, …
        what: &'static str,
        /// Which.
        text: String,
    },
    /// More fds than may be open.
    #[error("{wanted} open files are to be handed over, but the limit is {limit}: raise zddsup's own (ulimit -n)")]
    TooManyFds {
        /// How many numbers are needed.
        wanted: usize,
        /// `RLIMIT_NOFILE`.
        limit: u64,
    },
    /// For stdin.
    #[error("cannot open /dev/null: {0}; without it a service cannot be started")]
    DevNull(#[source] io::Error),
    /// A recorded script whose file is no longer there.
    #[error(
        "{0:?} is another file by now, and a script cannot be run without its file: keep each version in a directory of \
         its own and swap a symbolic link"
    )]
    ScriptGone(PathBuf),
    /// fork(2).
    #[error("cannot fork: {0}; check the limit of processes (ulimit -u, pids.max of the cgroup) and free memory")]
    Fork(#[source] io::Error),
    /// The child cannot be watched.
    #[error("cannot watch the new process: {0}; it was killed again. Check zddsup's limit of open files (ulimit -n)")]
    Watch(#[source] io::Error),
    /// The child's process group.
    #[error("cannot make a process group: {0}; is a seccomp filter in the way?")]
    Group(Errno),
    /// Its cgroup.
    #[error("cannot enter the cgroup that was made for it: {0}; who else manages it? --cgroup off does without")]
    Cgroup(Errno),
    /// The fds cannot be moved to their numbers.
    #[error("cannot hand over open file {index}: {errno}; check zddsup's limit of open files (ulimit -n)")]
    Fds {
        /// Its number in the child.
        index: usize,
        /// Why not.
        errno: Errno,
    },
    /// seccomp(2).
    #[error("cannot catch bind(2) and listen(2) of the new process: {errno}; {remedy}")]
    Trap {
        /// Why not.
        errno: Errno,
        /// What to do.
        remedy: &'static str,
    },
    /// `pidfd_getfd(2)` or `process_vm_readv(2)`.
    #[error(
        "cannot look into the new process with {call}: {errno}; run zddsup as root, or as the service's user with a program \
         that may be traced (ptrace(2)); in a container, add CAP_SYS_PTRACE; or use --listen with --handoff fds or socket"
    )]
    Look {
        /// By which call.
        call: &'static str,
        /// Why not.
        errno: Errno,
    },
    /// No filter is known for it.
    #[error(
        "bind(2) and listen(2) can be caught on x86-64 and aarch64 only: use --handoff fds or --handoff socket on this \
         machine"
    )]
    TrapUnknown,
    /// setrlimit(2).
    #[error("cannot set the limit {limit}: {errno}; only root may raise a hard limit: start zddsup with a higher one")]
    Limit {
        /// Which.
        limit: String,
        /// Why not.
        errno: Errno,
    },
    /// setpriority(2).
    #[error("cannot set the nice value {nice}: {errno}; only root may lower it (or raise RLIMIT_NICE)")]
    Nice {
        /// Which.
        nice: i32,
        /// Why not.
        errno: Errno,
    },
    /// `/proc/self/oom_score_adj`.
    #[error("cannot set the OOM score {score}: {errno}; it goes from -1000 to 1000, and only root may lower it")]
    OomScore {
        /// Which.
        score: i32,
        /// Why not.
        errno: Errno,
    },
    /// setgroups(2), setresgid(2), setresuid(2).
    #[error("cannot become user {user}: {errno}; start zddsup as root (or with CAP_SETUID and CAP_SETGID)")]
    User {
        /// Whom.
        user: String,
        /// Why not.
        errno: Errno,
    },
    /// chdir(2).
    #[error("cannot enter directory {path:?} as user {user}: {errno}; check that it is there and may be entered")]
    Directory {
        /// Which.
        path: PathBuf,
        /// As whom.
        user: String,
        /// Why not.
        errno: Errno,
    },
    /// ENOENT for the program itself.
    #[error("there is no program {0:?} any more: check that the new version is in place")]
    NotFound(PathBuf),
    /// ENOENT for what executes it.
    #[error("{path:?} needs {interpreter:?}, which is not there: {remedy}")]
    NoInterpreter {
        /// The program.
        path: PathBuf,
        /// What it names.
        interpreter: PathBuf,
        /// What to do.
        remedy: &'static str,
    },
    /// EACCES.
    #[error(
        "user {user} may not execute {path:?}: check its x bit, its interpreter's, that the directories above may be \
         entered, and that the file system is not mounted noexec"
    )]
    Denied {
        /// The program.
        path: PathBuf,
        /// Who.
        user: String,
    },
    /// ETXTBSY.
    #[error("{0:?} is open for writing: write the new version beside it and rename it into place")]
    Busy(PathBuf),
    /// ENOEXEC.
    #[error("{0:?} is no program that this machine can run: a script needs a #! line, a binary this architecture")]
    Format(PathBuf),
    /// E2BIG.
    #[error("the arguments and the environment of {0:?} are too long together: make them shorter (see execve(2))")]
    TooLong(PathBuf),
    /// Anything else.
    #[error("cannot execute {path:?}: {errno}; see execve(2)")]
    Execute {
        /// The program.
        path: PathBuf,
        /// Why not.
        errno: Errno,
    },
}

impl SpawnError {
    /// Whether it is about bind(2) and listen(2), which cannot be caught here.
    #[must_use]
    pub fn is_trap(&self) -> bool {
        matches!(self, SpawnError::Trap { .. } | SpawnError::Look { .. } | SpawnError::TrapUnknown)
    }

    pub(super) fn trap(errno: Errno) -> SpawnError {
        let remedy = match errno {
            Errno::EBUSY => {
                "zddsup runs under such a filter already (another zddsup, WSL 2, a container's runtime), and the kernel \
                 allows one: use --handoff fds or --handoff socket here"
            }
            Errno::EINVAL | Errno::ENOSYS => {
                "it takes Linux 5.9 with seccomp filters, and no sandbox that hides them: use --handoff fds or --handoff \
                 socket here"
            }
            Errno::EACCES | Errno::EPERM => {
                "a sandbox or the container's seccomp profile forbids seccomp(2): allow it, or use --handoff fds or \
                 --handoff socket"
            }
            Errno::EMFILE | Errno::ENFILE => "raise zddsup's limit of open files (ulimit -n)",
            _ => "see seccomp(2)",
        };
        SpawnError::Trap { errno, remedy }
    }
}

/// Puts a child's report into words.
pub(super) fn explain(failed: Failed, launch: &Launch, held: bool) -> SpawnError {
    let Failed { step, errno, index } = failed;
    let user = || match &launch.identity {
        Some(identity) => identity.name.clone(),
        None => Uid::effective().to_string(),
    };
    match step {
        Step::Group | Step::Signals => SpawnError::Group(errno),
        Step::Cgroup => SpawnError::Cgroup(errno),
        Step::Duplicate | Step::Place => SpawnError::Fds { index, errno },
        Step::Trap => SpawnError::trap(errno),
        Step::Limit => {
            SpawnError::Limit { limit: launch.limits.get(index).map(ToString::to_string).unwrap_or_default(), errno }
        }
        Step::Nice => SpawnError::Nice { nice: launch.nice.unwrap_or_default(), errno },
        Step::OomScore => SpawnError::OomScore { score: launch.oom_score_adj.unwrap_or_default(), errno },
        Step::Groups | Step::Gid | Step::Uid => SpawnError::User { user: user(), errno },
        Step::Directory => SpawnError::Directory { path: launch.directory.clone(), user: user(), errno },
        Step::Execute => not_executed(errno, launch, held, user()),
    }
}

fn not_executed(errno: Errno, launch: &Launch, held: bool, user: String) -> SpawnError {
    let path = launch.program.found().to_owned();
    match errno {
        // A script on an fd that closes at execve(2): its interpreter could not open it.
        Errno::ENOENT if held => SpawnError::ScriptGone(path),
        Errno::ENOENT | Errno::ENOTDIR => not_found(path, launch),
        Errno::EACCES => SpawnError::Denied { path, user },
        Errno::ETXTBSY => SpawnError::Busy(path),
        Errno::ENOEXEC => SpawnError::Format(path),
        Errno::E2BIG => SpawnError::TooLong(path),
        // The limit of processes counts from setuid(2) on (RLIMIT_NPROC in getrlimit(2)).
        Errno::EAGAIN => SpawnError::Fork(errno.into()),
        errno => SpawnError::Execute { path, errno },
    }
}

fn not_found(path: PathBuf, launch: &Launch) -> SpawnError {
    let interpreter = interpreter::of(&launch.program.head()).filter(|interpreter| !interpreter.exists());
    match interpreter {
        Some(interpreter) if path.exists() => {
            SpawnError::NoInterpreter { remedy: remedy(&interpreter), path, interpreter }
        }
        _ => SpawnError::NotFound(path),
    }
}

fn remedy(interpreter: &Path) -> &'static str {
    let name = interpreter.as_os_str().as_encoded_bytes();
    if name.ends_with(b"\r") {
        "its lines end with a carriage return (CRLF): convert them to LF"
    } else if name.contains(&b'/') && interpreter.is_absolute() {
        "install it, or correct the program's first line; a binary that was built for another C library needs its loader"
    } else {
        "its first line must name the interpreter with its whole path"
    }
}
