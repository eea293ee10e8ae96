//! Processes held by an fd, so that no pid that is used again is ever meant: `pidfd_open(2)`,
//! `pidfd_send_signal(2)`, `pidfd_getfd(2)`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::io::Interest;

use super::readiness::Awaited;

/// A process, whether it lives or not.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Holds the process that has this pid now. A child that was not reaped is always the one that is meant.
    pub fn open(pid: Pid) -> io::Result<PidFd> {
        // SAFETY: pidfd_open(2) takes two integers and touches no memory.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
        owned(fd).map(PidFd)
    }

    /// Holds a thread: its own fds are taken then, and its process' first thread may be gone. Before Linux 6.9 EINVAL.
    pub fn open_thread(tid: Pid) -> io::Result<PidFd> {
        // PIDFD_THREAD has the value of O_EXCL.
        // SAFETY: pidfd_open(2) takes two integers and touches no memory.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, tid.as_raw(), libc::O_EXCL) };
        owned(fd).map(PidFd)
    }

    /// Another one for the same process.
    pub fn try_clone(&self) -> io::Result<PidFd> {
        self.0.try_clone().map(PidFd)
    }

    /// Sends a signal. ESRCH when the process is gone.
    pub fn signal(&self, signal: Signal) -> nix::Result<()> {
        let (fd, signal) = (self.0.as_raw_fd(), signal as i32);
        // SAFETY: pidfd_send_signal(2) on an open fd; a null siginfo makes the kernel fill it in as kill(2) does.
        let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, ptr::null::<libc::siginfo_t>(), 0) };
        Errno::result(sent).map(drop)
    }

    /// Waits until the process has ended. Whoever is its parent still has to reap it. Within a runtime only.
    pub async fn exited(&self) -> io::Result<()> {
        // One more fd, so that this can be awaited more than once at a time.
        let fd = Awaited::new(self.0.try_clone()?, Interest::READABLE)?;
        fd.readable().await?.retain_ready();
        Ok(())
    }

    /// A copy of an fd of that process. Needs the right to trace it (ptrace(2)).
    pub fn take_fd(&self, fd: RawFd) -> io::Result<OwnedFd> {
        // SAFETY: pidfd_getfd(2) takes integers and touches no memory.
        let taken = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.0.as_raw_fd(), fd, 0) };
        owned(taken)
    }
}

impl From<OwnedFd> for PidFd {
    /// One that was left open over execve(2).
    fn from(fd: OwnedFd) -> Self {
        PidFd(fd)
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The result of a system call that makes an fd. Both calls here set close-on-exec by themselves.
fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(Errno::result(result)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this fd for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{pipe, Read, Write};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    fn pid(id: u32) -> Pid {
        Pid::from_raw(i32::try_from(id).unwrap())
    }

    #[tokio::test]
    async fn signals_a_process_and_sees_its_end() {
        let mut child = Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let held = PidFd::open(pid(child.id())).unwrap();
        held.try_clone().unwrap().signal(Signal::SIGTERM).unwrap();
        held.exited().await.unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGTERM));
        assert_eq!(held.signal(Signal::SIGTERM), Err(Errno::ESRCH));
        held.exited().await.unwrap();
    }

    #[test]
    fn takes_a_copy_of_an_fd() {
        let (mut read, mut write) = pipe().unwrap();
        let mut child =
            Command::new("/bin/sleep").arg("60").stdin(Stdio::from(read.try_clone().unwrap())).spawn().unwrap();
        let taken = PidFd::open(pid(child.id())).unwrap().take_fd(0).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let flags = nix::fcntl::fcntl(&taken, nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        write.write_all(b"x").unwrap();
        let mut byte = [0];
        std::fs::File::from(taken).read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
        drop(write);
        assert_eq!(read.read(&mut byte).unwrap(), 0);
    }
}
