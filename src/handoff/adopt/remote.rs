//! A look at the process behind a caught call: whose it is, its socket, the address in its memory.
//!
//! A thread's number may be used again once the thread is gone. So each look is followed by the question whether the call
//! still waits: while it does, its thread is there, and the number was its own.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::unistd::Pid;

use crate::sys::peek;
use crate::sys::pidfd::PidFd;
use crate::sys::seccomp::{Notification, Notifier};
use crate::sys::view::View;

/// The kernel takes no longer address (`sockaddr_storage`).
const LONGEST: usize = 128;

/// `CAP_NET_BIND_SERVICE` is number 10.
const NET_BIND_SERVICE: u64 = 1 << 10;

/// An address as bind(2) is given it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// IPv4 or IPv6. Port 0: the kernel chooses one.
    Inet(SocketAddr),
    /// On this machine.
    Unix(UnixName),
    /// Of another family (netlink, packet, …), or nothing that the kernel would take: not ours to look at.
    Other,
}

/// Name of a Unix socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UnixName {
    /// In the file system; relative to the process' working directory.
    Path(PathBuf),
    /// In the network namespace, without a file.
    Abstract(Vec<u8>),
    /// The kernel chooses an abstract one.
    Unnamed,
}

/// Why a look was of no use.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// There is nothing left to answer.
    #[error("the call is over: its thread was killed or interrupted by a signal")]
    Gone,
    /// The kernel does not name it.
    #[error("the calling thread is in another pid namespace: run zddsup and the service in the same one")]
    Elsewhere,
    /// Its number in /proc, its pidfd.
    #[error("cannot look at thread {tid}: {source}; is /proc mounted, and may zddsup see all of it (hidepid)?")]
    Thread {
        /// Which.
        tid: i32,
        /// Why not.
        source: io::Error,
    },
    /// `pidfd_getfd(2)`.
    #[error(
        "cannot copy open file {fd} of process {pid}: {source}; run zddsup as root, or as the service's user with a \
         service that may be traced (ptrace(2)); in a container, add CAP_SYS_PTRACE"
    )]
    Copy {
        /// Which.
        fd: RawFd,
        /// Of whom.
        pid: i32,
        /// Why not.
        source: io::Error,
    },
    /// `process_vm_readv(2)` and `/proc/PID/mem`.
    #[error(
        "cannot read the memory of process {pid}: {source}; run zddsup as root, or as the service's user with a \
         service that may be traced (ptrace(2)); in a container, add CAP_SYS_PTRACE"
    )]
    Memory {
        /// Of whom.
        pid: i32,
        /// Why not.
        source: Errno,
    },
}

/// The thread that made a call, and waits in it.
#[derive(Debug)]
pub struct Caller<'a> {
    notifier: &'a Notifier,
    id: u64,
    tid: i32,
    pid: i32,
    held: PidFd,
}

impl<'a> Caller<'a> {
    /// Who made this call.
    pub fn of(notifier: &'a Notifier, notification: &Notification) -> Result<Caller<'a>, LookError> {
        let (id, tid) = (notification.id, notification.tid);
        if tid == 0 {
            return Err(LookError::Elsewhere);
        }
        let found = process_of(tid).and_then(|pid| Ok((pid, hold(tid, pid)?)));
        // Before the error is looked at: one of a number that is not its any more means nothing.
        if !notifier.still_waits(id) {
            return Err(LookError::Gone);
        }
        let (pid, held) = found.map_err(|source| LookError::Thread { tid, source })?;
        Ok(Caller { notifier, id, tid, pid, held })
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// A copy of one of its fds. Both are the same socket, status flags included.
    pub fn copy(&self, fd: RawFd) -> Result<OwnedFd, LookError> {
        let copied = self.held.take_fd(fd);
        self.still_waits()?;
        copied.map_err(|source| LookError::Copy { fd, pid: self.pid, source })
    }

    /// Whether one of its fds closes at execve(2), which a copy does not tell. False as well if it is not open.
    pub fn closes_on_exec(&self, fd: RawFd) -> Result<bool, LookError> {
        let info = fs::read_to_string(format!("/proc/{}/fdinfo/{fd}", self.tid));
        self.still_waits()?;
        match info {
            Ok(info) => Ok(flags(&info).is_some_and(|flags| flags & libc::O_CLOEXEC != 0)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(LookError::Thread { tid: self.tid, source }),
        }
    }

    /// Whether the kernel would let it bind this port, where that can be said: a low one takes a capability (ip(7)). What
    /// is bound in its place is to give it nothing that it could not have had.
    pub fn may_bind(&self, port: u16) -> Result<bool, LookError> {
        let first_free = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
        let first_free = first_free.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(1024);
        if port >= first_free {
            return Ok(true);
        }
        let status = fs::read_to_string(format!("/proc/{}/status", self.tid));
        let user_namespace = |who: &str| fs::read_link(format!("/proc/{who}/ns/user")).ok();
        let same = user_namespace(&self.tid.to_string()) == user_namespace("self");
        self.still_waits()?;
        let status = status.map_err(|source| LookError::Thread { tid: self.tid, source })?;
        let effective =
            status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
        Ok(same && effective.is_some_and(|effective| effective & NET_BIND_SERVICE != 0))
    }

    /// How it sees the file system.
    pub fn view(&self) -> Result<View, LookError> {
        let view = View::of(self.tid);
        self.still_waits()?;
        view.map_err(|source| LookError::Thread { tid: self.tid, source })
    }

    /// Reads an address in its memory.
    pub fn address(&self, at: u64, length: u32) -> Result<Address, LookError> {
        let (at, length) = match (usize::try_from(at), usize::try_from(length)) {
            (Ok(at), Ok(length)) if length <= LONGEST => (at, length),
            _ => return Ok(Address::Other),
        };
        let mut bytes = [0; LONGEST];
        let read = peek::read(Pid::from_raw(self.tid), at, &mut bytes[..length]);
        self.still_waits()?;
        match read {
            Ok(read) if read == length => Ok(parse(&bytes[..length])),
            // Not all of it is its memory: the kernel will say EFAULT.
            Ok(_) | Err(Errno::EFAULT) => Ok(Address::Other),
            Err(source) => Err(LookError::Memory { pid: self.pid, source }),
        }
    }

    fn still_waits(&self) -> Result<(), LookError> {
        if self.notifier.still_waits(self.id) {
            Ok(())
        } else {
            Err(LookError::Gone)
        }
    }
}

/// The process of a thread.
fn process_of(tid: i32) -> io::Result<i32> {
    let status = fs::read(format!("/proc/{tid}/status"))?;
    let mut lines = status.split(|&byte| byte == b'\n');
    let pid = lines.find_map(|line| std::str::from_utf8(line.strip_prefix(b"Tgid:")?).ok()?.trim().parse().ok());
    pid.ok_or_else(|| io::Error::other("no Tgid in its status"))
}

/// The thread itself, or, before Linux 6.9, its process, of which the first thread must be there then.
fn hold(tid: i32, pid: i32) -> io::Result<PidFd> {
    match PidFd::open_thread(Pid::from_raw(tid)) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => PidFd::open(Pid::from_raw(pid)),
        result => result,
    }
}

/// Of /proc/PID/fdinfo/FD, in octal.
fn flags(info: &str) -> Option<i32> {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
    i32::from_str_radix(flags.trim(), 8).ok()
}

/// Reads a sockaddr as the kernel does.
fn parse(bytes: &[u8]) -> Address {
    inet(bytes).map(Address::Inet).or_else(|| unix(bytes).map(Address::Unix)).unwrap_or(Address::Other)
}

fn inet(bytes: &[u8]) -> Option<SocketAddr> {
    let bytes_at = |from: usize, length: usize| bytes.get(from..from + length);
    let port = u16::from_be_bytes(bytes_at(2, 2)?.try_into().ok()?);
    match family(bytes)? {
        libc::AF_INET if bytes.len() >= 16 => {
            let ip: [u8; 4] = bytes_at(4, 4)?.try_into().ok()?;
            Some((Ipv4Addr::from(ip), port).into())
        }
        // From the times of old: every address of IPv4 (__inet_bind in net/ipv4/af_inet.c).
        libc::AF_UNSPEC if bytes.len() >= 16 && bytes_at(4, 4)? == [0; 4] => Some((Ipv4Addr::UNSPECIFIED, port).into()),
        libc::AF_INET6 => {
            let flow = u32::from_ne_bytes(bytes_at(4, 4)?.try_into().ok()?);
            let ip: [u8; 16] = bytes_at(8, 16)?.try_into().ok()?;
            // RFC 2133 had none.
            let scope = bytes_at(24, 4).map_or(Ok([0; 4]), TryInto::try_into).ok()?;
            Some(SocketAddrV6::new(Ipv6Addr::from(ip), port, flow, u32::from_ne_bytes(scope)).into())
        }
        _ => None,
    }
}

fn unix(bytes: &[u8]) -> Option<UnixName> {
    let name = bytes.get(2..).filter(|name| name.len() <= 108 && family(bytes) == Some(libc::AF_UNIX))?;
    match name {
        [] => Some(UnixName::Unnamed),
        [0, name @ ..] => Some(UnixName::Abstract(name.to_vec())),
        path => {
            let end = path.iter().position(|&byte| byte == 0).unwrap_or(path.len());
            Some(UnixName::Path(OsStr::from_bytes(&path[..end]).into()))
        }
    }
}

fn family(bytes: &[u8]) -> Option<i32> {
    Some(i32::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?)))
}

#[cfg(test)]
mod tests;
