//! Socket calls and options that std, nix and socket2 do not have safely.
#![allow(clippy::cast_possible_truncation)] // of sizes of small structures

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use super::fds;

/// `enum` in `net/tcp_states.h`; part of the ABI of `TCP_INFO`.
const TCP_LISTEN: u8 = 10;

/// Lets that many connections send data with their first packet (`TCP_FASTOPEN`, tcp(7)).
pub fn set_fastopen(socket: impl AsFd, queue: i32) -> io::Result<()> {
    set_tcp(socket, libc::TCP_FASTOPEN, queue)
}

/// Wakes a server only once data came, or after that many seconds (`TCP_DEFER_ACCEPT`, tcp(7)).
pub fn set_defer_accept(socket: impl AsFd, seconds: i32) -> io::Result<()> {
    set_tcp(socket, libc::TCP_DEFER_ACCEPT, seconds)
}

fn set_tcp(socket: impl AsFd, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the fd is borrowed for the call, and the pointer and length are those of a live c_int.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The queue limit that a listening TCP socket has: what listen(2) was told, as the kernel capped it.
pub fn tcp_backlog(socket: impl AsFd) -> io::Result<u32> {
    // In state LISTEN this field is sk_max_ack_backlog (tcp_get_info in net/ipv4/tcp.c).
    Ok(tcp_info(socket)?.tcpi_sacked)
}

/// How many connections wait in the queue of a listening TCP socket: complete, and accepted by nobody. None when it does
/// not listen.
pub fn queue_length(socket: impl AsFd) -> io::Result<Option<u32>> {
    let info = tcp_info(socket)?;
    // In state LISTEN this field is sk_ack_backlog.
    Ok((info.tcpi_state == TCP_LISTEN).then_some(info.tcpi_unacked))
}

fn tcp_info(socket: impl AsFd) -> io::Result<libc::tcp_info> {
    // SAFETY: tcp_info is plain numbers, for which zero is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the fd is borrowed for the call; the kernel writes at most `length` bytes into `info`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(info)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether something can be read: on a UDP socket, whether a datagram waits. One may be empty, so that no count of bytes
/// tells.
pub fn is_readable(socket: impl AsFd) -> io::Result<bool> {
    polled(socket, libc::POLLIN)
}

/// Whether shutdown(2) was called on a socket for reading, which a listening Unix socket does not come back from.
pub fn is_shut_down(socket: impl AsFd) -> io::Result<bool> {
    polled(socket, libc::POLLRDHUP)
}

fn polled(socket: impl AsFd, event: libc::c_short) -> io::Result<bool> {
    let mut polled = libc::pollfd { fd: socket.as_fd().as_raw_fd(), events: event, revents: 0 };
    // SAFETY: one live pollfd is given and its fd is borrowed for the call, which does not wait.
    if unsafe { libc::poll(&raw mut polled, 1, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(polled.revents & event != 0)
}

/// First of the fds that systemd passes (`sd_listen_fds(3)`).
const FIRST_PASSED: RawFd = 3;

static TAKEN: AtomicBool = AtomicBool::new(false);

/// Takes the fds that were passed to this process from 3 on, once: a second call has none. To be called before anything
/// is opened, and with the count that `LISTEN_FDS` gave for this very process.
///
/// Each is marked close-on-exec. One that is not open is an error, and none is taken.
pub fn take_passed_fds(count: usize) -> io::Result<Vec<OwnedFd>> {
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(Vec::new());
    }
    take_from(FIRST_PASSED, count)
}

fn take_from(first: RawFd, count: usize) -> io::Result<Vec<OwnedFd>> {
    let last = RawFd::try_from(count).ok().and_then(|count| first.checked_add(count));
    let last = last.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    fds::take(first..last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn backlog_is_read_back() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(tcp_backlog(&listener).unwrap(), 128);
    }

    #[test]
    fn the_queue_is_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(queue_length(&listener).unwrap(), Some(0));
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        while !is_readable(&listener).unwrap() {}
        assert_eq!(queue_length(&listener).unwrap(), Some(1));
        assert_eq!(queue_length(&client).unwrap(), None);
    }

    #[test]
    fn an_empty_datagram_can_be_read() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(!is_readable(&socket).unwrap());
        socket.send_to(b"", socket.local_addr().unwrap()).unwrap();
        while !is_readable(&socket).unwrap() {}
    }

    #[test]
    fn passed_fds_are_closed_on_exec_and_owned() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // SAFETY: duplicates an fd that is held; the number it gets is free.
        let first = unsafe { libc::fcntl(listener.as_raw_fd(), libc::F_DUPFD, 700) };
        assert!(first >= 700);
        let taken = take_from(first, 1).unwrap();
        // SAFETY: F_GETFD touches no memory.
        assert_eq!(unsafe { libc::fcntl(first, libc::F_GETFD) }, libc::FD_CLOEXEC);
        assert_eq!(
            TcpListener::from(taken.into_iter().next().unwrap()).local_addr().unwrap(),
            listener.local_addr().unwrap()
        );
    }

    #[test]
    fn fds_that_are_not_open_are_an_error() {
        assert_eq!(take_from(1_000_000, 2).unwrap_err().raw_os_error(), Some(libc::EBADF));
        assert!(take_from(3, usize::MAX).is_err());
    }

    #[test]
    fn tcp_options_are_refused_by_other_sockets() {
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(set_fastopen(&udp, 5).is_err());
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        set_defer_accept(&tcp, 3).unwrap();
    }
}
