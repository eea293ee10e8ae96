//! Open files that outlive execve(2), known by their numbers.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Takes fds that whoever executed this process left open for it, and closes them on the next execve(2).
///
/// # Errors
/// EBADF: one of them is not open. Nothing was taken then.
///
/// # Panics
/// Where one of the standard streams is named, which somebody else owns.
pub fn take(numbers: impl Iterator<Item = RawFd> + Clone) -> io::Result<Vec<OwnedFd>> {
    for number in numbers.clone() {
        assert!(number > libc::STDERR_FILENO, "a standard stream is named");
        set_flags(number, libc::FD_CLOEXEC)?;
    }
    // SAFETY: all are open, as was just seen, and nobody else owns them: whoever executed this process left them open for it,
    // by a protocol that says their numbers once, before anything else is opened.
    Ok(numbers.map(|number| unsafe { OwnedFd::from_raw_fd(number) }).collect())
}

/// Leaves them open over execve(2), or not any more.
///
/// # Errors
/// EBADF: one of them is not open.
pub fn keep_over_exec(numbers: &[RawFd], keep: bool) -> io::Result<()> {
    numbers.iter().try_for_each(|&number| set_flags(number, if keep { 0 } else { libc::FD_CLOEXEC }))
}

fn set_flags(number: RawFd, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: F_SETFD touches no memory; on a number that is no open fd it fails.
    if unsafe { libc::fcntl(number, libc::F_SETFD, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{fcntl, FcntlArg};
    use std::os::fd::{AsRawFd, IntoRawFd};

    #[test]
    fn are_kept_and_taken() {
        let (read, write) = nix::unistd::pipe().unwrap();
        let flags = |fd: &OwnedFd| fcntl(fd, FcntlArg::F_GETFD).unwrap();
        keep_over_exec(&[read.as_raw_fd()], false).unwrap();
        assert_eq!(flags(&read), libc::FD_CLOEXEC);
        keep_over_exec(&[read.as_raw_fd()], true).unwrap();
        assert_eq!(flags(&read), 0);
        let taken = take([read.into_raw_fd()].into_iter()).unwrap();
        assert_eq!(flags(&taken[0]), libc::FD_CLOEXEC);
        drop(write);
        assert!(take([1_000_000].into_iter()).is_err());
    }
}
