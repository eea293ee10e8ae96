//! Memory of another process, to read.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::uio::{process_vm_readv, RemoteIoVec};
use nix::unistd::Pid;

/// Reads from a process' or thread's memory, and gives how much there was. EFAULT: nothing is there.
///
/// By `process_vm_readv(2)`; where a seccomp profile refuses that, as Podman's does, by `/proc/PID/mem`. Both ask for the same
/// right (`PTRACE_MODE_ATTACH` in ptrace(2)).
pub fn read(pid: Pid, at: usize, into: &mut [u8]) -> nix::Result<usize> {
    let remote = RemoteIoVec { base: at, len: into.len() };
    match process_vm_readv(pid, &mut [IoSliceMut::new(into)], &[remote]) {
        Err(refused @ (Errno::EPERM | Errno::ENOSYS)) => by_file(pid, at, into, refused),
        result => result,
    }
}

fn by_file(pid: Pid, at: usize, into: &mut [u8], refused: Errno) -> nix::Result<usize> {
    let file = File::open(format!("/proc/{pid}/mem")).map_err(|_| refused)?;
    let at = u64::try_from(at).map_err(|_| Errno::EFAULT)?;
    file.read_at(into, at).map_err(|error| match error.raw_os_error() {
        // `mem_rw` in fs/proc/base.c; an address beyond what a file's offset can be.
        Some(libc::EIO | libc::EINVAL) | None => Errno::EFAULT,
        Some(number) => Errno::from_raw(number),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_read_the_same() {
        let there = *b"what is there";
        let at = there.as_ptr() as usize;
        let (mut by_call, mut by_name) = ([0; 13], [0; 13]);
        assert_eq!(read(Pid::this(), at, &mut by_call), Ok(13));
        assert_eq!(by_file(Pid::this(), at, &mut by_name, Errno::EPERM), Ok(13));
        assert_eq!((by_call, by_name), (there, there));
    }

    #[test]
    fn nothing_and_nobody_are_told_apart() {
        for nowhere in [1, usize::MAX - 64] {
            assert_eq!(read(Pid::this(), nowhere, &mut [0]), Err(Errno::EFAULT));
            assert_eq!(by_file(Pid::this(), nowhere, &mut [0], Errno::EPERM), Err(Errno::EFAULT));
        }
        assert_eq!(by_file(Pid::from_raw(-1), 1, &mut [0], Errno::EPERM), Err(Errno::EPERM));
    }
}
