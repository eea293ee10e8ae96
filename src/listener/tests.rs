use super::*;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::socket::{getsockopt, shutdown, sockopt, Shutdown};
use std::os::fd::AsRawFd;

fn bind(text: &str) -> Result<Listener, BindError> {
    Listener::bind(&text.parse().unwrap())
}

fn bound(text: &str) -> Listener {
    bind(text).unwrap()
}

fn refused(text: &str) -> String {
    bind(text).unwrap_err().to_string()
}

fn greets(listener: &Listener) {
    let address = listener.local().unwrap();
    let mut client = TcpStream::connect(address).unwrap();
    let server = TcpListener::from(listener.fd().try_clone().unwrap());
    server.accept().unwrap().0.write_all(b"hi").unwrap();
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hi");
}

/// A directory and a path in it.
fn place() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    (dir, path)
}

fn at(path: &std::path::Path, query: &str) -> String {
    format!("unix://{}{query}", path.display())
}

#[test]
fn tcp_listens_where_it_says() {
    let listener = bound("web=127.0.0.1:0");
    assert_eq!(listener.name(), "web");
    assert_eq!(listener.address(), format!("tcp://{}", listener.local().unwrap()));
    assert_ne!(listener.local().unwrap().port(), 0);
    assert_eq!(tcp_backlog(listener.fd()).unwrap(), 4096.min(somaxconn()));
    greets(&listener);
}

fn somaxconn() -> u32 {
    fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap().trim().parse().unwrap()
}

#[test]
fn a_bare_port_takes_ipv4_and_ipv6() {
    let listener = bound("tcp://:0");
    let port = listener.local().unwrap().port();
    TcpStream::connect(("127.0.0.1", port)).unwrap();
    if TcpListener::bind("[::1]:0").is_ok() {
        assert_eq!(listener.address(), format!("tcp://:{port}"));
        TcpStream::connect(("::1", port)).unwrap();
    }
}

#[test]
fn v6only_leaves_ipv4_to_others() {
    if TcpListener::bind("[::1]:0").is_err() {
        return;
    }
    let listener = bound("tcp://:0?v6only");
    let port = listener.local().unwrap().port();
    assert_eq!(listener.address(), format!("tcp://[::]:{port}"));
    let _other = TcpListener::bind(("127.0.0.1", port)).unwrap();
}

#[test]
fn tcp_options_reach_the_kernel() {
    let listener =
        bound("127.0.0.1:0?backlog=7&nodelay&keepalive&fastopen=5&defer-accept=2&rcvbuf=70000&sndbuf=80000&tos=16&priority=3&freebind&reuseport");
    let fd = listener.fd();
    let socket = SockRef::from(&*fd);
    assert_eq!(tcp_backlog(&fd).unwrap(), 7);
    assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap() && socket.reuse_port().unwrap());
    assert!(socket.freebind_v4().unwrap());
    assert_eq!(socket.tos_v4().unwrap(), 16);
    assert_eq!(getsockopt(&fd, sockopt::Priority).unwrap(), 3);
    // The kernel doubles what it is told.
    assert_eq!(socket.recv_buffer_size().unwrap(), 140_000);
    assert_eq!(socket.send_buffer_size().unwrap(), 160_000);
    let _joins = bound(&format!("{}?reuseport", listener.address()));
}

#[test]
fn a_socket_blocks_unless_it_is_told_not_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    for address in ["127.0.0.1:0", "udp://127.0.0.1:0", &format!("unix://{}", path.display())] {
        assert!(!bound(address).status_flags().unwrap().contains(OFlag::O_NONBLOCK), "{address}");
        let listener = bound(&format!("{address}?nonblock"));
        assert!(listener.status_flags().unwrap().contains(OFlag::O_NONBLOCK), "{address}");
    }
}

#[test]
fn freebind_takes_an_address_that_is_not_there() {
    assert!(refused("192.0.2.1:0").contains("freebind"));
    assert_eq!(bound("192.0.2.1:0?freebind").local().unwrap().ip().to_string(), "192.0.2.1");
}

#[test]
fn interfaces_are_known_by_name() {
    assert!(refused("127.0.0.1:0?device=nosuch0").contains("no network interface \"nosuch0\""));
    assert!(refused("[fe80::1%nosuch0]:0").contains("nosuch0"));
    let fd = bound("127.0.0.1:0?device=lo").fd();
    assert_eq!(SockRef::from(&*fd).device().unwrap().as_deref(), Some(b"lo".as_slice()));
}

#[test]
fn udp_takes_datagrams() {
    let listener = bound("udp://127.0.0.1:0");
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.send_to(b"hi", listener.local().unwrap()).unwrap();
    let server = UdpSocket::from(listener.fd().try_clone().unwrap());
    assert_eq!(server.recv(&mut [0; 8]).unwrap(), 2);
    assert_eq!(listener.repair().unwrap(), Repair::Untouched);
}

#[test]
fn an_address_in_use_names_who_has_it() {
    let first = bound("127.0.0.1:0");
    let error = refused(&first.address());
    assert!(error.contains("in use (by another --listen of this zddsup)"), "{error}");
    let udp = bound("udp://127.0.0.1:0");
    assert!(refused(&udp.address()).contains("in use"));
}

#[test]
fn a_unix_listener_has_mode_and_owner_and_takes_its_file_along() {
    let (_dir, path) = place();
    let listener =
        bound(&format!("{}?mode=0622&user={}&group={}", at(&path, ""), nix::unistd::getuid(), nix::unistd::getgid()));
    let found = fs::metadata(&path).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o622);
    assert_eq!(listener.address(), at(&path, ""));
    UnixStream::connect(&path).unwrap();
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn owner_without_mode_leaves_the_usual_mode() {
    let (dir, path) = place();
    let _listener = bound(&at(&path, &format!("?user={}", nix::unistd::getuid())));
    let other = dir.path().join("usual");
    let _usual = UnixListener::bind(&other).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode(), fs::metadata(&other).unwrap().mode());
    assert!(refused(&at(&dir.path().join("x"), "?user=no-such-user")).contains("no user \"no-such-user\""));
    assert!(refused(&at(&dir.path().join("x"), "?group=no-such-group")).contains("no group"));
}

/// Datagrams need no listen(2): the file must be closed to others from its first moment.
#[test]
fn a_datagram_socket_is_never_open_to_others() {
    let (_dir, path) = place();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut seen = 0;
            while !done.load(Ordering::SeqCst) {
                seen |= fs::metadata(&path).map_or(0, |found| found.mode() & 0o777);
            }
            seen
        });
        for _ in 0..200 {
            drop(bound(&format!("unixgram://{}?mode=0600", path.display())));
        }
        done.store(true, Ordering::SeqCst);
        assert_eq!(watcher.join().unwrap() & !0o600, 0);
    });
}

#[test]
fn unix_kinds_and_abstract_names_work() {
    let (_dir, path) = place();
    let datagrams = bound(&format!("unixgram://{}", path.display()));
    UnixDatagram::unbound().unwrap().send_to(b"hi", &path).unwrap();
    let server = UnixDatagram::from(datagrams.fd().try_clone().unwrap());
    assert_eq!(server.recv(&mut [0; 8]).unwrap(), 2);

    let name = format!("zddsup-test-{}-{:?}", std::process::id(), std::thread::current().id());
    let packets = bound(&format!("unixpacket:@{name}"));
    assert!(packets.address().starts_with("unixpacket:@zddsup-test-"));
    assert!(refused(&format!("unixpacket:@{name}")).contains("living process (by another --listen of this zddsup)"));
    let socket = Socket::new(socket2::Domain::UNIX, socket2::Type::SEQPACKET, None).unwrap();
    socket.connect(&socket2::SockAddr::unix(format!("\0{name}")).unwrap()).unwrap();
}

#[test]
fn a_stale_file_is_replaced_and_a_live_one_refused() {
    let (_dir, path) = place();
    drop(UnixListener::bind(&path).unwrap());
    let listener = bound(&at(&path, ""));
    let error = refused(&at(&path, ""));
    assert!(error.contains("living process"), "{error}");
    UnixStream::connect(&path).unwrap();
    drop(listener);
    fs::write(&path, "precious").unwrap();
    assert!(refused(&at(&path, "")).contains("not a socket"));
    assert!(refused("unix:///no/such/directory/s").contains("\"/no/such/directory\" does not exist"));
}

#[test]
fn a_shutdown_of_a_tcp_listener_is_undone_on_the_same_port() {
    for text in ["127.0.0.1:0", "tcp://:0"] {
        let listener = bound(text);
        let before = (listener.address(), listener.inode());
        assert_eq!(listener.repair().unwrap(), Repair::Untouched);
        shutdown(listener.fd().as_raw_fd(), Shutdown::Both).unwrap();
        assert!(TcpStream::connect(("127.0.0.1", listener.local().unwrap().port())).is_err());
        assert_eq!(listener.repair().unwrap(), Repair::Relistened);
        assert_eq!((listener.address(), listener.inode()), before);
        assert_eq!(format!("{}", bind::address_of(&SockRef::from(&*listener.fd())).unwrap()), before.0);
        let client = TcpStream::connect(("127.0.0.1", listener.local().unwrap().port())).unwrap();
        drop(client);
    }
}

#[test]
fn a_queue_that_was_shrunk_has_its_size_again() {
    let listener = bound("127.0.0.1:0?backlog=99");
    SockRef::from(&*listener.fd()).listen(1).unwrap();
    assert_eq!(listener.repair().unwrap(), Repair::Untouched);
    assert_eq!(tcp_backlog(listener.fd()).unwrap(), 99);
}

#[test]
fn a_unix_listener_that_was_shut_down_is_replaced_for_the_next_generation() {
    let (_dir, path) = place();
    let listener = bound(&at(&path, ""));
    let broken = listener.fd();
    shutdown(broken.as_raw_fd(), Shutdown::Both).unwrap();
    assert!(UnixStream::connect(&path).is_err());
    assert!(listener.repair().unwrap_err().to_string().contains("zddsup restart"));
    assert_eq!(listener.repair().unwrap(), Repair::Untouched);
    UnixStream::connect(&path).unwrap();
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn flags_that_one_generation_sets_can_be_taken_back() {
    let listener = bound("127.0.0.1:0");
    let before = listener.status_flags().unwrap();
    assert!(!before.contains(OFlag::O_NONBLOCK));
    SockRef::from(&*listener.fd()).set_nonblocking(true).unwrap();
    assert!(listener.status_flags().unwrap().contains(OFlag::O_NONBLOCK));
    listener.restore_flags(before);
    assert_eq!(listener.status_flags().unwrap(), before);
}

#[test]
fn a_supervisor_goes_on_with_the_sockets_of_the_one_before() {
    let (_dir, path) = place();
    let before = [bound("web=127.0.0.1:0"), bound(&at(&path, ""))];
    let copies = [0, 1].map(|place| before[place].fd().try_clone().unwrap());
    let inodes = [before[0].inode(), before[1].inode()];
    // Killed: nothing is removed.
    before.into_iter().for_each(std::mem::forget);
    let [tcp, unix] = copies;
    let tcp = Listener::adopt(tcp, &"web=127.0.0.1:0?backlog=33".parse().unwrap()).unwrap();
    let unix = Listener::adopt(unix, &at(&path, "").parse().unwrap()).unwrap();
    assert_eq!([tcp.inode(), unix.inode()], inodes);
    assert_eq!(tcp_backlog(tcp.fd()).unwrap(), 33);
    greets(&tcp);
    let error = Listener::adopt(tcp.fd().try_clone().unwrap(), &"web=127.0.0.1:1".parse().unwrap()).unwrap_err();
    assert!(error.to_string().contains("correct one of the two"), "{error}");
    drop(unix);
    assert!(!path.exists());
}
