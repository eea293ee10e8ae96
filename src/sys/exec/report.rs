//! What the child says before its program runs: a message each, over a socket pair. Its end of file is success.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{socketpair, AddressFamily, SockFlag, SockType};

use crate::sys::scm;
use crate::sys::seccomp::Installed;

/// What the child does, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Step {
    /// setpgid(2): a process group of its own.
    Group,
    /// Writing to `cgroup.procs`.
    Cgroup,
    /// fcntl(2): every fd to where no target is.
    Duplicate,
    /// dup3(2): every fd to its target.
    Place,
    /// setpriority(2).
    Nice,
    /// Writing to `/proc/self/oom_score_adj`.
    OomScore,
    /// seccomp(2).
    Trap,
    /// setrlimit(2).
    Limit,
    /// setgroups(2).
    Groups,
    /// setresgid(2).
    Gid,
    /// setresuid(2).
    Uid,
    /// chdir(2).
    Directory,
    /// `pthread_sigmask(3)`: no signal blocked.
    Signals,
    /// execve(2), execveat(2).
    Execute,
}

const STEPS: [Step; 14] = [
    Step::Group,
    Step::Cgroup,
    Step::Duplicate,
    Step::Place,
    Step::Nice,
    Step::OomScore,
    Step::Trap,
    Step::Limit,
    Step::Groups,
    Step::Gid,
    Step::Uid,
    Step::Directory,
    Step::Signals,
    Step::Execute,
];

/// What went wrong in the child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failed {
    /// The system call.
    pub step: Step,
    /// Its errno.
    pub errno: Errno,
    /// Which fd or limit it was about, counted from 0.
    pub index: usize,
}

/// What became of a child.
#[derive(Debug)]
pub enum Report {
    /// Its calls are caught from now on. More is to come.
    Trapped(Installed),
    /// Its program never runs.
    Failed(Failed),
    /// Its program runs; or it was killed before.
    Executed,
}

/// Three words: step, errno, index. No errno, and a step that is [`Step::Trap`]: the filter is in force, its listener comes
/// with the message, and the index says whether privileges can be gained no more.
type Message = [i32; 3];

const LEN: usize = mem::size_of::<Message>();

/// The parent's end and the child's. Both close at execve(2).
pub(super) fn channel() -> nix::Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
}

/// Receives the next report without blocking: `WouldBlock` when there is none yet.
pub fn receive(report: BorrowedFd<'_>) -> io::Result<Report> {
    let mut bytes = [0; LEN];
    let Some(mut received) = scm::receive(report, &mut bytes)? else {
        return Err(io::ErrorKind::WouldBlock.into());
    };
    if received.len == 0 {
        return Ok(Report::Executed);
    }
    if received.truncated {
        // The listener was lost: there are as many open files as there may be.
        return Err(Errno::EMFILE.into());
    }
    let nonsense = || io::Error::from(io::ErrorKind::InvalidData);
    let mut words = bytes.chunks_exact(4).filter_map(|word| Some(i32::from_ne_bytes(word.try_into().ok()?)));
    let words = words.next().zip(words.next()).zip(words.next());
    let ((step, errno), index) = words.filter(|_| received.len == LEN).ok_or_else(nonsense)?;
    let step = STEPS.into_iter().find(|known| *known as i32 == step).ok_or_else(nonsense)?;
    match (step, errno, received.fds.pop()) {
        (Step::Trap, 0, Some(listener)) => Ok(Report::Trapped(Installed { listener, no_new_privs: index != 0 })),
        (_, 0, _) => Err(nonsense()),
        _ => {
            let index = usize::try_from(index).map_err(|_| nonsense())?;
            Ok(Report::Failed(Failed { step, errno: Errno::from_raw(errno), index }))
        }
    }
}

/// The child's end. All of it is async-signal-safe: nothing is allocated.
#[derive(Clone, Copy)]
pub(super) struct Reporter(RawFd);

impl Reporter {
    /// The child's end is open at this number by now.
    pub(super) fn at(fd: RawFd) -> Self {
        Reporter(fd)
    }

    pub(super) fn fd(self) -> RawFd {
        self.0
    }

    pub(super) fn failed(self, failed: Failed) {
        let index = i32::try_from(failed.index).unwrap_or(0);
        // Its exit would be all that is left to say.
        let _parent_is_gone = self.send([failed.step as i32, failed.errno as i32, index], None);
    }

    pub(super) fn trapped(self, installed: &Installed) -> nix::Result<()> {
        let message = [Step::Trap as i32, 0, i32::from(installed.no_new_privs)];
        self.send(message, Some(installed.listener.as_raw_fd()))
    }

    /// nix's own sendmsg allocates.
    fn send(self, mut message: Message, file: Option<RawFd>) -> nix::Result<()> {
        let mut control = Control([0; CONTROL]);
        let mut part = libc::iovec { iov_base: message.as_mut_ptr().cast(), iov_len: LEN };
        // SAFETY: msghdr is plain data (with private padding on some targets); all zeroes is an empty one.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        if let Some(file) = file {
            header.msg_control = (&raw mut control).cast();
            header.msg_controllen = CONTROL as _;
            // SAFETY: the control area is aligned and has room for one header with one fd (cmsg(3)).
            unsafe {
                let rights = libc::CMSG_FIRSTHDR(&raw const header);
                (*rights).cmsg_level = libc::SOL_SOCKET;
                (*rights).cmsg_type = libc::SCM_RIGHTS;
                (*rights).cmsg_len = libc::CMSG_LEN(FD) as _;
                libc::CMSG_DATA(rights).cast::<RawFd>().write_unaligned(file);
            }
        }
        // SAFETY: sendmsg(2) reads the header and what it points to, all of which lives longer than the call. All signals
        // are blocked, and so is SIGPIPE; so few bytes are sent as a whole.
        Errno::result(unsafe { libc::sendmsg(self.0, &raw const header, libc::MSG_NOSIGNAL) }).map(drop)
    }
}

#[allow(clippy::cast_possible_truncation)] // 4
const FD: u32 = mem::size_of::<RawFd>() as u32;

// SAFETY: CMSG_SPACE(3) only computes.
const CONTROL: usize = unsafe { libc::CMSG_SPACE(FD) as usize };

#[repr(C, align(8))]
struct Control([u8; CONTROL]);

pub(super) fn step<T>(step: Step, result: nix::Result<T>) -> Result<T, Failed> {
    result.map_err(|errno| Failed { step, errno, index: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn each_report_arrives_as_it_was_sent() {
        let (parent, child) = channel().unwrap();
        assert_eq!(receive(parent.as_fd()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let reporter = Reporter::at(child.as_raw_fd());
        for no_new_privs in [false, true] {
            let listener = std::fs::File::open("/dev/null").unwrap().into();
            reporter.trapped(&Installed { listener, no_new_privs }).unwrap();
            let report = receive(parent.as_fd()).unwrap();
            assert!(matches!(report, Report::Trapped(installed) if installed.no_new_privs == no_new_privs));
        }
        for step in STEPS {
            let failed = Failed { step, errno: Errno::EACCES, index: 7 };
            reporter.failed(failed);
            assert!(matches!(receive(parent.as_fd()).unwrap(), Report::Failed(found) if found == failed));
        }
        drop(child);
        assert!(matches!(receive(parent.as_fd()).unwrap(), Report::Executed));
    }

    #[test]
    fn nonsense_is_an_error() {
        let (parent, child) = channel().unwrap();
        for words in [[99, 1, 0], [-1, 1, 0], [5, 0, 0], [0, 0, 0], [0, 1, -1]] {
            Reporter::at(child.as_raw_fd()).send(words, None).unwrap();
            assert_eq!(receive(parent.as_fd()).unwrap_err().kind(), io::ErrorKind::InvalidData, "{words:?}");
        }
        scm::send(child.as_fd(), &[1], &[]).unwrap();
        assert_eq!(receive(parent.as_fd()).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
