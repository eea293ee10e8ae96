use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::thread::JoinHandleExt;
use std::sync::mpsc;
use std::thread;

use libc::sock_filter;
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, FdFlag};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
use socket2::{Domain, Protocol, Socket, Type};

use super::filter::{Machine, AARCH64, NATIVE, X86_64};
use super::fixture::{next, trapped};
use super::{Call, Filter, Notification};

// The filter, as data.

const MACHINES: [Machine; 2] = [X86_64, AARCH64];

/// linux/audit.h: x86-64, i386, aarch64, arm, riscv64, ppc64le, s390x, mips64, none.
const CONVENTIONS: [u32; 9] =
    [0xC000_003E, 0x4000_0003, 0xC000_00B7, 0x4000_0028, 0xC000_00F3, 0xC000_0015, 0x8000_0016, 0x8000_0008, 0];

const X32: u32 = 0x4000_0000;

fn numbers() -> impl Iterator<Item = u32> {
    (0..1024).chain(X32..X32 + 1024).chain([0x8000_0031, u32::MAX - 1, u32::MAX])
}

/// What the kernel would do: the answer, and after how many instructions.
fn run(program: &[sock_filter], number: u32, convention: u32, args: [u32; 6]) -> Option<(u32, usize)> {
    let (mut at, mut accumulator) = (0, 0);
    for steps in 1.. {
        let sock_filter { code, jt, jf, k } = *program.get(at)?;
        at += 1;
        let mut jump = |yes: bool| at += usize::from(if yes { jt } else { jf });
        match (code, k) {
            (0x20, 0) => accumulator = number,
            (0x20, 4) => accumulator = convention,
            // The kernel cannot follow this beforehand (seccomp_is_const_allow in kernel/seccomp.c).
            (0x20, 16..) => accumulator = args[usize::try_from(k - 16).unwrap() / 8],
            (0x05, _) => at += usize::try_from(k).unwrap(),
            (0x15, _) => jump(accumulator == k),
            (0x25, _) => jump(accumulator > k),
            (0x35, _) => jump(accumulator >= k),
            (0x45, _) => jump(accumulator & k != 0),
            (0x06, _) => return Some((k, steps)),
            _ => panic!("{code:#x} {k}"),
        }
    }
    None
}

/// Families, and protocols of each.
const SOCKETS: [[u32; 6]; 6] = [
    [libc::AF_INET as u32, libc::SOCK_STREAM as u32, 0, 0, 0, 0],
    [libc::AF_INET as u32, libc::SOCK_STREAM as u32, 262, 0, 0, 0],
    [libc::AF_INET6 as u32, libc::SOCK_STREAM as u32, 262, 0, 0, 0],
    [libc::AF_INET6 as u32, libc::SOCK_STREAM as u32, 6, 0, 0, 0],
    [libc::AF_PACKET as u32, libc::SOCK_RAW as u32, 262, 0, 0, 0],
    [262, 0, 2, 0, 0, 0],
];

fn is_right(program: &[sock_filter], machine: Machine) -> bool {
    CONVENTIONS.iter().all(|&convention| {
        numbers().all(|number| {
            SOCKETS.iter().all(|&args| {
                let is_multipath = [libc::AF_INET as u32, libc::AF_INET6 as u32].contains(&args[0]) && args[2] == 262;
                let wanted = if convention != machine.convention {
                    libc::SECCOMP_RET_ALLOW
                } else if number == machine.socket && is_multipath {
                    super::filter::NO_MULTIPATH
                } else if [machine.bind, machine.listen].contains(&number) {
                    libc::SECCOMP_RET_USER_NOTIF
                } else {
                    libc::SECCOMP_RET_ALLOW
                };
                run(program, number, convention, args).is_some_and(|(answer, _)| answer == wanted)
            })
        })
    })
}

#[test]
fn bind_and_listen_are_caught_and_nothing_else_of_any_architecture() {
    for machine in MACHINES {
        assert!(is_right(Filter::of(machine).program(), machine), "{machine:x?}");
    }
}

#[test]
fn no_instruction_is_there_without_need() {
    let nothing = sock_filter { code: 0x05, jt: 0, jf: 0, k: 0 };
    for machine in MACHINES {
        for index in 0..Filter::of(machine).program().len() {
            let mut program = Filter::of(machine).program().to_vec();
            program[index] = nothing;
            assert!(!is_right(&program, machine), "instruction {index} does nothing");
        }
    }
}

#[test]
fn what_passes_costs_four_instructions() {
    for machine in MACHINES {
        let filter = Filter::of(machine);
        for number in numbers() {
            if ![machine.socket, machine.bind, machine.listen].contains(&number) {
                assert_eq!(run(filter.program(), number, machine.convention, [0; 6]).unwrap().1, 4, "{number}");
            }
        }
    }
}

#[test]
fn the_numbers_are_those_of_this_machine() {
    let native = NATIVE.unwrap();
    let numbers = [native.socket, native.bind, native.listen].map(i64::from);
    assert_eq!(numbers, [libc::SYS_socket, libc::SYS_bind, libc::SYS_listen]);
}

// The filter, in force.

const ANY: &str = "127.0.0.1:0";

fn socket() -> Socket {
    Socket::new(Domain::IPV4, Type::STREAM, None).unwrap()
}

fn any() -> SocketAddr {
    ANY.parse().unwrap()
}

#[tokio::test]
async fn calls_that_go_on_do_what_they_do() {
    let (notifier, thread) = trapped(|| {
        let socket = socket();
        socket.bind(&any().into()).unwrap();
        socket.listen(7).unwrap();
        (socket.as_raw_fd(), TcpListener::from(socket), nix::unistd::gettid().as_raw())
    });
    let bind = next(&notifier).await;
    assert!(notifier.still_waits(bind.id));
    assert!(notifier.go_on(bind.id).unwrap());
    let listen = next(&notifier).await;
    assert!(notifier.go_on(listen.id).unwrap());
    let (number, listener, thread) = thread.join().unwrap();
    assert!(matches!(bind.call, Call::Bind { fd, length: 16, .. } if fd == number), "{bind:?}");
    assert_eq!(listen.call, Call::Listen { fd: number, backlog: 7 });
    assert_eq!([bind.tid, listen.tid], [thread; 2]);
    TcpStream::connect(listener.local_addr().unwrap()).unwrap();
}

#[tokio::test]
async fn a_call_ends_with_the_result_it_is_given() {
    let (notifier, thread) = trapped(|| {
        let socket = socket();
        let refused = socket.bind(&any().into()).unwrap_err();
        socket.bind(&any().into()).unwrap();
        (refused, socket.local_addr().unwrap().as_socket().unwrap().port())
    });
    for result in [Err(Errno::EADDRINUSE), Ok(())] {
        assert!(notifier.answer(next(&notifier).await.id, result).unwrap());
    }
    let (refused, port) = thread.join().unwrap();
    assert_eq!(refused.raw_os_error(), Some(libc::EADDRINUSE));
    assert_eq!(port, 0, "it was not bound: the answer was all");
}

#[tokio::test]
async fn a_held_socket_is_put_in_place_and_serves() {
    for close_on_exec in [false, true] {
        let held = TcpListener::bind(ANY).unwrap();
        // Waits since before the other one was there.
        let mut client = TcpStream::connect(held.local_addr().unwrap()).unwrap();
        client.write_all(b"x").unwrap();
        let (notifier, thread) = trapped(|| {
            let socket = socket();
            socket.bind(&any().into()).unwrap();
            socket.listen(7).unwrap();
            let flags = FdFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFD).unwrap());
            let mut byte = [0];
            TcpListener::from(socket).accept().unwrap().0.read_exact(&mut byte).unwrap();
            (byte, flags.contains(FdFlag::FD_CLOEXEC))
        });
        let Notification { id, call: Call::Bind { fd, .. }, .. } = next(&notifier).await else { panic!("no bind") };
        assert!(notifier.put_in_place(id, held.as_fd(), fd, close_on_exec).unwrap());
        assert!(notifier.still_waits(id));
        assert!(notifier.answer(id, Ok(())).unwrap());
        assert!(notifier.answer(next(&notifier).await.id, Ok(())).unwrap());
        assert_eq!(thread.join().unwrap(), (*b"x", close_on_exec));
    }
}

#[tokio::test]
async fn calls_that_wait_at_once_are_all_told() {
    let (notifier, thread) = trapped(|| {
        let threads: Vec<_> = (0..8).map(|_| thread::spawn(|| UdpSocket::bind(ANY).unwrap())).collect();
        for thread in threads {
            thread.join().unwrap();
        }
    });
    let mut waiting = Vec::new();
    while waiting.len() < 8 {
        waiting.push(next(&notifier).await);
    }
    let mut threads: Vec<_> = waiting.iter().map(|notification| notification.tid).collect();
    threads.sort_unstable();
    threads.dedup();
    assert_eq!(threads.len(), 8);
    for notification in waiting.into_iter().rev() {
        assert!(notifier.go_on(notification.id).unwrap());
    }
    thread.join().unwrap();
}

#[tokio::test]
async fn everything_else_is_untouched() {
    let held = TcpListener::bind(ANY).unwrap();
    let address = held.local_addr().unwrap();
    // Nobody answers, so it would hang.
    let (_notifier, thread) = trapped(move || {
        let mut client = TcpStream::connect(address).unwrap();
        let (mut served, _) = held.accept().unwrap();
        client.write_all(b"x").unwrap();
        served.read_exact(&mut [0]).unwrap();
        // With the number of bind(2), and of x32.
        // SAFETY: bind(2) of no socket; no such call is there, or it finds that out.
        #[cfg(target_arch = "x86_64")]
        let of_x32 = Errno::result(unsafe { libc::syscall(0x4000_0031, -1, 0, 0) });
        #[cfg(not(target_arch = "x86_64"))]
        let of_x32: nix::Result<()> = Err(Errno::EBADF);
        assert!(of_x32.is_err());
    });
    thread.join().unwrap();
}

/// A program that prefers Multipath TCP falls back to TCP, as where Linux has none.
#[tokio::test]
async fn multipath_tcp_is_not_there() {
    let (_notifier, thread) = trapped(|| {
        let of = |domain, protocol| Socket::new(domain, Type::STREAM, Some(protocol));
        for domain in [Domain::IPV4, Domain::IPV6] {
            let refused = of(domain, Protocol::MPTCP).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EPROTONOSUPPORT));
            of(domain, Protocol::TCP).unwrap();
        }
    });
    thread.join().unwrap();
}

#[tokio::test]
async fn one_that_asks_is_told_when_nobody_is_left() {
    let (notifier, thread) = trapped(|| ());
    thread.join().unwrap();
    let ended = tokio::time::timeout(std::time::Duration::from_secs(60), notifier.next()).await.expect("no end");
    assert_eq!(ended.unwrap_err().kind(), ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn an_answer_to_what_is_over_is_no_error() {
    let (notifier, thread) = trapped(|| UdpSocket::bind(ANY).map(drop));
    let held = UdpSocket::bind(ANY).unwrap();
    let id = next(&notifier).await.id;
    assert!(notifier.go_on(id).unwrap());
    thread.join().unwrap().unwrap();
    assert!(!notifier.still_waits(id));
    assert!(!notifier.go_on(id).unwrap());
    assert!(!notifier.answer(id, Ok(())).unwrap());
    assert!(!notifier.put_in_place(id, held.as_fd(), 0, true).unwrap());
}

#[tokio::test]
async fn calls_fail_once_nobody_can_answer() {
    let (notifier, thread) = trapped(|| [UdpSocket::bind(ANY), UdpSocket::bind(ANY)].map(Result::unwrap_err));
    let _waits = next(&notifier).await;
    drop(notifier);
    let codes = thread.join().unwrap().map(|error| error.raw_os_error());
    assert_eq!(codes, [Some(libc::ENOSYS); 2]);
}

#[tokio::test]
async fn a_second_filter_is_refused() {
    let (_notifier, thread) = trapped(|| Filter::bind_and_listen().unwrap().install().unwrap_err());
    assert_eq!(thread.join().unwrap(), Errno::EBUSY);
}

/// Its default is to be ignored, so that a handler changes nothing for other tests.
const SIGNAL: Signal = Signal::SIGWINCH;

/// System calls that wait are interrupted by it, and not begun again.
fn handle_signals() {
    extern "C" fn nothing(_: i32) {}
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, which is safe at any time.
    unsafe { sigaction(SIGNAL, &action) }.unwrap();
}

fn signal<T>(thread: &thread::JoinHandle<T>) {
    // SAFETY: the thread was not joined, so its id is valid.
    assert_eq!(unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGNAL as i32) }, 0);
}

#[tokio::test]
async fn one_that_was_interrupted_before_it_was_received_is_passed_over() {
    handle_signals();
    let (say, hear) = mpsc::channel();
    let (notifier, thread) = trapped(move || {
        say.send(UdpSocket::bind(ANY).map(drop)).unwrap();
        UdpSocket::bind(ANY).map(drop)
    });
    let mut polled = [PollFd::new(notifier.as_fd(), PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::NONE).unwrap();
    signal(&thread);
    assert_eq!(hear.recv().unwrap().unwrap_err().kind(), ErrorKind::Interrupted);
    assert!(notifier.go_on(next(&notifier).await.id).unwrap());
    thread.join().unwrap().unwrap();
}

#[tokio::test]
async fn signals_wait_for_the_answer_to_what_was_received() {
    handle_signals();
    let (notifier, thread) = trapped(|| UdpSocket::bind(ANY).map(drop));
    let id = next(&notifier).await.id;
    signal(&thread);
    assert!(notifier.still_waits(id));
    assert!(notifier.go_on(id).unwrap());
    thread.join().unwrap().unwrap();
}
