use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};

use nix::fcntl::{fcntl, FcntlArg, FdFlag};
use nix::sys::socket::{bind, socket, AddressFamily, NetlinkAddr, SockFlag, SockType, UnixAddr as NixUnix};
use proptest::prelude::*;

use super::*;
use crate::sys::seccomp::fixture::{next, trapped};
use crate::sys::seccomp::Call;

/// What a thread binds, as it is seen from outside.
async fn seen<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> Address {
    let (notifier, thread) = trapped(act);
    let notification = next(&notifier).await;
    let caller = Caller::of(&notifier, &notification).unwrap();
    assert_eq!(caller.pid(), nix::unistd::getpid().as_raw());
    let Call::Bind { address, length, .. } = notification.call else { panic!("{notification:?}") };
    let found = caller.address(address, length).unwrap();
    notifier.answer(notification.id, Ok(())).unwrap();
    // Whatever comes next is allowed to fail: the thread sees sockets that are not bound.
    while let Ok(more) = notifier.next().await {
        notifier.answer(more.id, Ok(())).unwrap();
    }
    let _result = thread.join();
    found
}

fn unix_socket() -> OwnedFd {
    socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).unwrap()
}

#[tokio::test]
async fn addresses_of_each_family_are_read() {
    for text in ["127.0.0.1:8080", "0.0.0.0:0", "[::1]:53", "[fe80::1%3]:65535"] {
        let address: SocketAddr = text.parse().unwrap();
        assert_eq!(seen(move || UdpSocket::bind(address)).await, Address::Inet(address));
    }
    let path = Address::Unix(UnixName::Path("some/where.sock".into()));
    assert_eq!(seen(|| UnixDatagram::bind("some/where.sock")).await, path);
    let hidden = || UnixDatagram::bind_addr(&UnixAddr::from_abstract_name(b"a\0b").unwrap());
    assert_eq!(seen(hidden).await, Address::Unix(UnixName::Abstract(b"a\0b".to_vec())));
    let unnamed = || bind(unix_socket().as_raw_fd(), &NixUnix::new_unnamed());
    assert_eq!(seen(unnamed).await, Address::Unix(UnixName::Unnamed));
    let kernels = || bind(unix_socket().as_raw_fd(), &NetlinkAddr::new(0, 0));
    assert_eq!(seen(kernels).await, Address::Other);
}

#[tokio::test]
async fn memory_that_is_not_there_is_no_address_and_no_error() {
    let (notifier, thread) = trapped(|| UdpSocket::bind("127.0.0.1:0").map(drop));
    let notification = next(&notifier).await;
    let caller = Caller::of(&notifier, &notification).unwrap();
    let Call::Bind { address, .. } = notification.call else { panic!("{notification:?}") };
    for (at, length) in [(0, 16), (u64::MAX, 16), (address, 129), (address, u32::MAX), (address, 0), (address, 1)] {
        assert_eq!(caller.address(at, length).unwrap(), Address::Other, "{at:#x} {length}");
    }
    notifier.go_on(notification.id).unwrap();
    thread.join().unwrap().unwrap();
}

#[tokio::test]
async fn the_copy_is_the_same_socket() {
    let (notifier, thread) = trapped(|| TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    let notification = next(&notifier).await;
    let Call::Bind { fd, .. } = notification.call else { panic!("{notification:?}") };
    let caller = Caller::of(&notifier, &notification).unwrap();
    let copy = std::net::TcpListener::from(caller.copy(fd).unwrap());
    assert!(caller.closes_on_exec(fd).unwrap(), "std's do");
    fcntl(&copy, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    assert!(caller.closes_on_exec(fd).unwrap(), "the flag is not of the file");
    assert!(!caller.closes_on_exec(1_000_000).unwrap());
    let error = caller.copy(1_000_000).unwrap_err();
    assert!(matches!(error, LookError::Copy { fd: 1_000_000, .. }), "{error}");
    notifier.go_on(notification.id).unwrap();
    notifier.go_on(next(&notifier).await.id).unwrap();
    assert_eq!(thread.join().unwrap(), copy.local_addr().unwrap());
}

#[tokio::test]
async fn what_is_over_is_not_looked_at() {
    let (notifier, thread) = trapped(|| UdpSocket::bind("127.0.0.1:0").map(drop));
    let notification = next(&notifier).await;
    let Call::Bind { fd, address, length } = notification.call else { panic!("{notification:?}") };
    let caller = Caller::of(&notifier, &notification).unwrap();
    notifier.go_on(notification.id).unwrap();
    thread.join().unwrap().unwrap();
    assert!(matches!(caller.copy(fd), Err(LookError::Gone)));
    assert!(matches!(caller.closes_on_exec(fd), Err(LookError::Gone)));
    assert!(matches!(caller.address(address, length), Err(LookError::Gone)));
    assert!(matches!(Caller::of(&notifier, &notification), Err(LookError::Gone)));
    let elsewhere = Notification { tid: 0, ..notification };
    assert!(matches!(Caller::of(&notifier, &elsewhere), Err(LookError::Elsewhere)));
}

#[test]
fn flags_are_octal() {
    assert_eq!(flags("pos:\t0\nflags:\t02000002\nmnt_id:\t9\n"), Some(libc::O_CLOEXEC | libc::O_RDWR));
    assert_eq!(flags("pos:\t0\n"), None);
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..140), family in 0..20_u16) {
        let _any = parse(&bytes);
        let _of_a_family = parse(&[&family.to_ne_bytes()[..], &bytes].concat());
    }
}

#[test]
fn odd_ones_are_read_as_the_kernel_reads_them() {
    let of = |family: i32, rest: &[u8]| parse(&[&u16::try_from(family).unwrap().to_ne_bytes()[..], rest].concat());
    let mut v4 = [0; 14];
    v4[..6].copy_from_slice(&[0x1f, 0x90, 0, 0, 0, 0]);
    let every = Address::Inet("0.0.0.0:8080".parse().unwrap());
    assert_eq!(of(libc::AF_INET, &v4), every);
    assert_eq!(of(libc::AF_INET, &v4[..13]), Address::Other);
    assert_eq!(of(libc::AF_UNSPEC, &v4), every);
    v4[2] = 127;
    assert_eq!(of(libc::AF_UNSPEC, &v4), Address::Other);
    let mut v6 = [0; 26];
    v6[1] = 80;
    v6[21] = 1;
    // With a scope, and without one as before it was there.
    assert_eq!(of(libc::AF_INET6, &v6), Address::Inet("[::1]:80".parse().unwrap()));
    assert_eq!(of(libc::AF_INET6, &v6[..22]), Address::Inet("[::1]:80".parse().unwrap()));
    assert_eq!(of(libc::AF_INET6, &v6[..21]), Address::Other);
    assert_eq!(of(libc::AF_UNIX, b"/a\0rest"), Address::Unix(UnixName::Path("/a".into())));
    let longest = [b'a'; 108];
    assert_eq!(of(libc::AF_UNIX, &longest), Address::Unix(UnixName::Path(OsStr::from_bytes(&longest).into())));
    assert_eq!(of(libc::AF_UNIX, &[b'a'; 109]), Address::Other);
    assert_eq!(parse(&[]), Address::Other);
    assert_eq!(parse(&[1]), Address::Other);
}
