//! The program that names the socket of a `SO_REUSEPORT` group for what arrives (socket(7), `linux/filter.h`).
#![allow(clippy::cast_possible_truncation)] // of sizes of small structures

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};

/// An instruction of classic BPF.
pub type Instruction = libc::sock_filter;

/// Gives a group its program, in the place of the one that it had (`SO_ATTACH_REUSEPORT_CBPF`). What it returns is the
/// index of a socket in the group; one that is too great leaves the choice to the kernel's hash.
///
/// The socket is to be in the group already: one that has yet to listen would get a group of its own, and its listen(2)
/// would fail.
pub fn attach(socket: impl AsFd, program: &[Instruction]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let filter = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the fd is borrowed for the call. The kernel reads `len` instructions, which live, and writes none; it
    // checks them itself.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const filter).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The number of the network namespace that a socket is in (`SO_NETNS_COOKIE`, Linux 5.14).
pub fn network_namespace(socket: impl AsFd) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the fd is borrowed for the call; the kernel writes at most `length` bytes into `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_socket_without_a_group_takes_no_program() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let program = [Instruction { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 }];
        assert_eq!(attach(&listener, &program).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert_eq!(attach(&listener, &[]).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        let too_long = vec![program[0]; 1 << 16];
        assert_eq!(attach(&listener, &too_long).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_thread_of_its_own_namespace_has_another_number() {
        let namespace = || network_namespace(TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
        assert_eq!(namespace(), namespace());
        let there = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).ok()?;
            network_namespace(std::net::UdpSocket::bind("0.0.0.0:0").unwrap()).ok()
        });
        match there.join().unwrap() {
            Some(there) => assert_ne!(there, namespace()),
            None => eprintln!("not checked: only root makes a network namespace"),
        }
    }
}
