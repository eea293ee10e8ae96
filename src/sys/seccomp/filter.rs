//! What is caught, as a program for the kernel, and putting it in force.

use std::mem::offset_of;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::ptr;

use libc::{
    c_ulong, seccomp_data, sock_filter, BPF_ABS, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W,
    SECCOMP_FILTER_FLAG_NEW_LISTENER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV,
    SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_USER_NOTIF,
};
use nix::errno::Errno;
use nix::sys::prctl;

/// How a kind of processor numbers the calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Machine {
    /// `AUDIT_ARCH_*` of linux/audit.h: its calling convention.
    pub(super) convention: u32,
    /// socket(2).
    pub(super) socket: u32,
    /// bind(2).
    pub(super) bind: u32,
    /// listen(2).
    pub(super) listen: u32,
}

/// `asm/unistd_64.h`. A program for x32 has the same convention and bit 30 in its numbers, so that none of them is ours.
pub(super) const X86_64: Machine = Machine { convention: 0xC000_003E, socket: 41, bind: 49, listen: 50 };

/// `asm-generic/unistd.h`.
pub(super) const AARCH64: Machine = Machine { convention: 0xC000_00B7, socket: 198, bind: 200, listen: 201 };

/// What this program was built for.
pub(super) const NATIVE: Option<Machine> = if cfg!(all(target_arch = "x86_64", target_pointer_width = "64")) {
    Some(X86_64)
} else if cfg!(all(target_arch = "aarch64", target_pointer_width = "64", target_endian = "little")) {
    Some(AARCH64)
} else {
    None
};

/// How many instructions there are.
const LENGTH: u16 = 16;

/// socket(2) with [`IPPROTO_MPTCP`] gives this, as it does where Linux was built without it.
pub(super) const NO_MULTIPATH: u32 = SECCOMP_RET_ERRNO | libc::EPROTONOSUPPORT as u32;

/// Which calls are caught: bind(2) and listen(2), and nothing else. Multipath TCP is not there, as its listeners cannot be
/// steered (`SO_ATTACH_REUSEPORT_CBPF` gives EOPNOTSUPP, net/mptcp/sockopt.c): programs that prefer it then use TCP (Go's
/// net.Listen from 1.24 on).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filter([sock_filter; LENGTH as usize]);

/// A filter that is in force.
#[derive(Debug)]
pub struct Installed {
    /// What a [`super::Notifier`] is made of. Close-on-exec.
    pub listener: OwnedFd,
    /// Without privilege, the kernel wants programs to gain none by execve(2) from now on: setuid and file capabilities
    /// do nothing any more.
    pub no_new_privs: bool,
}

impl Filter {
    /// None where the numbers of the calls are not known: on other than x86-64 and aarch64.
    #[must_use]
    pub fn bind_and_listen() -> Option<Filter> {
        NATIVE.map(Filter::of)
    }

    /// Each line has its reason. The order costs least for what passes: four instructions below bind(2) and above.
    /// Since Linux 5.11 the kernel finds out beforehand which numbers always pass, as these depend on nothing but the
    /// number and the convention, and does not run the program for them. That is all but these three.
    pub(super) const fn of(machine: Machine) -> Filter {
        assert!(machine.listen == machine.bind + 1 && machine.socket < machine.bind, "one range, and one below");
        Filter([
            load(offset_of!(seccomp_data, nr)),
            // read, write, close, accept, sendto, recvfrom …: what a server does all day has lower numbers, so it goes first.
            jump(BPF_JGE, machine.bind, Goto::Next, Goto::Skip(4)),
            // Everything above, all of x32's numbers too.
            jump(BPF_JGT, machine.listen, Goto::Skip(11), Goto::Next),
            load(offset_of!(seccomp_data, arch)),
            // The same number is another call in a 32-bit program (geteuid, getgid on i386): not to be misread.
            jump(BPF_JEQ, machine.convention, Goto::Next, Goto::Skip(9)),
            answer(SECCOMP_RET_USER_NOTIF),
            jump(BPF_JEQ, machine.socket, Goto::Next, Goto::Skip(7)),
            load(offset_of!(seccomp_data, arch)),
            jump(BPF_JEQ, machine.convention, Goto::Next, Goto::Skip(5)),
            load(argument(2)),
            jump(BPF_JEQ, libc::IPPROTO_MPTCP as u32, Goto::Next, Goto::Skip(3)),
            // Of other families it is another protocol.
            load(argument(0)),
            jump(BPF_JEQ, libc::AF_INET as u32, Goto::Skip(2), Goto::Next),
            jump(BPF_JEQ, libc::AF_INET6 as u32, Goto::Skip(1), Goto::Next),
            answer(SECCOMP_RET_ALLOW),
            answer(NO_MULTIPATH),
        ])
    }

    /// The program.
    #[cfg(test)]
    pub(super) fn program(&self) -> &[sock_filter] {
        &self.0
    }

    /// Puts it in force for the calling thread and all that it starts, for ever. Async-signal-safe.
    ///
    /// # Errors
    /// EBUSY: there is such a filter already. EINVAL, ENOSYS: the kernel knows nothing of it. EACCES, EPERM: forbidden.
    pub fn install(&self) -> nix::Result<Installed> {
        match self.install_with_best_flags() {
            // No CAP_SYS_ADMIN: then it must not be used to fool a setuid program.
            Err(Errno::EACCES) => {
                prctl::set_no_new_privs()?;
                Ok(Installed { listener: self.install_with_best_flags()?, no_new_privs: true })
            }
            result => Ok(Installed { listener: result?, no_new_privs: false }),
        }
    }

    fn install_with_best_flags(&self) -> nix::Result<OwnedFd> {
        // No switching off of processor features for the service, which before Linux 5.16 was the price of any filter.
        let flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_SPEC_ALLOW;
        // Once we have been told of a call, signals do not interrupt it any more, except deadly ones.
        match self.set(flags | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV) {
            // Before Linux 5.19.
            Err(Errno::EINVAL) => self.set(flags),
            result => result,
        }
    }

    fn set(&self, flags: c_ulong) -> nix::Result<OwnedFd> {
        let Filter(mut program) = *self;
        // The kernel reads it only.
        let program = libc::sock_fprog { len: LENGTH, filter: program.as_mut_ptr() };
        let (operation, program) = (libc::SECCOMP_SET_MODE_FILTER, &raw const program);
        // SAFETY: seccomp(2) reads a sock_fprog and the instructions that it points to, which live until it returns.
        let fd = unsafe { libc::syscall(libc::SYS_seccomp, operation, flags, program) };
        let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
        // SAFETY: the kernel has just made this fd for us, and nobody else knows of it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// Where a jump leads to.
#[derive(Clone, Copy)]
enum Goto {
    Next,
    /// Past so many instructions.
    Skip(u8),
}

impl Goto {
    const fn offset(self) -> u8 {
        match self {
            Goto::Next => 0,
            Goto::Skip(count) => count,
        }
    }
}

#[allow(clippy::cast_possible_truncation)] // Opcodes and offsets are small numbers.
const fn load(offset: usize) -> sock_filter {
    sock_filter { code: (BPF_LD | BPF_W | BPF_ABS) as u16, jt: 0, jf: 0, k: offset as u32 }
}

/// The lower half of an argument: all that the kernel looks at where it is an int.
const fn argument(number: usize) -> usize {
    let upper_half_is_first = cfg!(target_endian = "big");
    offset_of!(seccomp_data, args) + 8 * number + if upper_half_is_first { 4 } else { 0 }
}

#[allow(clippy::cast_possible_truncation)]
const fn jump(comparison: u32, with: u32, yes: Goto, no: Goto) -> sock_filter {
    sock_filter { code: (BPF_JMP | comparison | BPF_K) as u16, jt: yes.offset(), jf: no.offset(), k: with }
}

#[allow(clippy::cast_possible_truncation)]
const fn answer(action: u32) -> sock_filter {
    sock_filter { code: (BPF_RET | BPF_K) as u16, jt: 0, jf: 0, k: action }
}

/// How large the kernel's `seccomp_notif` is: later kernels may have more to say.
pub(super) fn notification_size() -> nix::Result<usize> {
    let mut sizes = libc::seccomp_notif_sizes { seccomp_notif: 0, seccomp_notif_resp: 0, seccomp_data: 0 };
    // SAFETY: this operation of seccomp(2) writes one seccomp_notif_sizes.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_NOTIF_SIZES, 0, ptr::from_mut(&mut sizes)) };
    Errno::result(result)?;
    Ok(usize::from(sizes.seccomp_notif))
}
