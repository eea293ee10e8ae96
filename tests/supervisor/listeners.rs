//! Each kind of listener through upgrades, and those that systemd passes.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use nix::sys::signal::Signal;

use crate::common::{puppet, request, Setup, Supervisor, PATIENCE};
use crate::seen::{environ, fds, is_root, taken};

fn supervisor(dir: &Arc<tempfile::TempDir>, listen: &[&str]) -> Setup {
    let puppet = puppet();
    let flags: Vec<_> = listen.iter().flat_map(|address| ["--listen", address]).collect();
    Setup::within(Arc::clone(dir), [&flags[..], &["--ready", "notify", "--", &puppet]].concat())
}

/// A request on a connection that is there.
fn ask(mut stream: impl Read + Write) -> String {
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn ask_path(path: &Path) -> String {
    ask(UnixStream::connect(path).unwrap())
}

#[test]
fn a_unix_sockets_file_has_its_mode_and_stays_through_upgrades_until_the_end() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let path = dir.path().join("s");
    let owner = if is_root("user= and group= of a socket's file") { "&user=nobody&group=54321" } else { "" };
    let mut supervisor = supervisor(&dir, &[&format!("unix://{}?mode=0640{owner}", path.display())]).start();
    let found = std::fs::symlink_metadata(&path).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.mode() & 0o7777, 0o640);
    if !owner.is_empty() {
        let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
        assert_eq!((found.uid(), found.gid()), (nobody.uid.as_raw(), 54321));
    }
    assert!(ask_path(&path).contains("generation=1"));
    for generation in 2..4 {
        supervisor.upgrade();
        supervisor.wait_settled();
        assert_eq!(std::fs::symlink_metadata(&path).unwrap().ino(), found.ino());
        assert!(ask_path(&path).contains(&format!("generation={generation}")));
    }
    supervisor.signal(Signal::SIGTERM);
    assert_eq!(supervisor.wait().code(), Some(0));
    assert!(!path.exists());
}

#[test]
fn a_file_that_nobody_listens_on_is_replaced() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let supervisor = supervisor(&dir, &[&format!("unix://{}", path.display())]).start();
    assert!(ask_path(&path).contains("generation=1"));
    drop(supervisor);
    assert!(!path.exists());
}

#[test]
fn a_file_that_somebody_listens_on_is_left_to_him() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let path = dir.path().join("s");
    let theirs = UnixListener::bind(&path).unwrap();
    let mut refused = supervisor(&dir, &[&format!("unix://{}", path.display())]).spawn();
    assert_eq!(refused.wait().code(), Some(1));
    refused.wait_for_log("a living process");
    assert!(refused.log().contains(&format!("by process {}", std::process::id())), "{}", refused.log());
    // What zddsup's look left in the queue is not what is asked for here.
    theirs.set_nonblocking(true).unwrap();
    while theirs.accept().is_ok() {}
    let _connects = UnixStream::connect(&path).unwrap();
    assert!(theirs.accept().is_ok());
}

#[test]
fn an_abstract_name_has_no_file() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let name = format!("zddsup-test-{}", dir.path().file_name().unwrap().to_str().unwrap());
    let supervisor = supervisor(&dir, &[&format!("unix:@{name}")]).start();
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    let connect = || UnixStream::connect_addr(&address);
    assert!(ask(connect().unwrap()).contains("generation=1"));
    supervisor.upgrade();
    supervisor.wait_settled();
    assert!(ask(connect().unwrap()).contains("generation=2"));
    drop(supervisor);
    assert!(connect().is_err());
}

#[test]
fn every_address_is_ipv4_and_ipv6_on_one_port() {
    if TcpListener::bind("[::1]:0").is_err() {
        eprintln!("skipped: this machine has no IPv6");
        return;
    }
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let supervisor = supervisor(&dir, &[":0"]).start();
    let address = &supervisor.status().listeners[0].address;
    let port: u16 = address.rsplit(':').next().unwrap().parse().unwrap();
    assert_ne!(port, 0);
    for generation in 1..3 {
        for ip in ["127.0.0.1", "[::1]"] {
            let address: SocketAddr = format!("{ip}:{port}").parse().unwrap();
            assert!(request(address, "/").contains(&format!("generation={generation}")));
        }
        if generation == 1 {
            supervisor.upgrade();
            supervisor.wait_settled();
        }
    }
}

#[test]
fn datagrams_are_answered_by_the_one_that_serves() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let supervisor = supervisor(&dir, &["udp://127.0.0.1:0"]).start();
    let address = supervisor.address();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let ask = || {
        socket.send_to(b"hello", address).unwrap();
        let mut answer = [0; 200];
        let length = socket.recv(&mut answer).unwrap();
        String::from_utf8_lossy(&answer[..length]).into_owned()
    };
    assert!(ask().contains("generation=1 hello"));
    supervisor.upgrade();
    supervisor.wait_settled();
    assert!(ask().contains("generation=2 hello"));
}

/// As systemd starts zddsup: with one socket as fd 3, and another one as fd 4.
fn activated(listen: &[&str], pid: &str, names: &str, one: OwnedFd, two: OwnedFd) -> Setup {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let script = format!(
        "export LISTEN_PID={pid} LISTEN_FDS=2 LISTEN_FDNAMES={names}; exec \"$@\" 3<&0 4<&1 </dev/null >/dev/null"
    );
    let mut setup = supervisor(&dir, listen).through(&["sh", "-c", &script, "sh"]);
    setup.command().stdin(one).stdout(two);
    setup
}

fn names(supervisor: &Supervisor) -> Vec<String> {
    supervisor.status().listeners.into_iter().map(|listener| listener.name).collect()
}

#[test]
fn all_sockets_that_systemd_passed_are_used_where_none_is_asked_for() {
    let ((one, at_one), (two, at_two)) = (taken(), taken());
    let held = [one.try_clone().unwrap(), two.try_clone().unwrap()];
    let mut supervisor = activated(&[], "$$", "web:admin", one.into(), two.into()).start();
    assert_eq!(names(&supervisor), ["web", "admin"]);
    let pid = supervisor.serving().pid.unwrap();
    let env = environ(pid);
    assert_eq!((env["LISTEN_FDS"].as_str(), env["LISTEN_FDNAMES"].as_str()), ("2", "web:admin"));
    assert_eq!(env["LISTEN_PID"], pid.to_string());
    for address in [at_one, at_two] {
        assert!(request(address, "/").contains("generation=1"));
    }
    supervisor.upgrade();
    supervisor.wait_settled();
    for address in [at_one, at_two] {
        assert!(request(address, "/").contains("generation=2"));
    }
    supervisor.signal(Signal::SIGTERM);
    assert_eq!(supervisor.wait().code(), Some(0));
    // They are systemd's, and go on waiting for connections.
    drop(TcpStream::connect(at_one).unwrap());
    drop(held);
}

#[test]
fn a_socket_that_systemd_passed_is_found_by_name_and_by_address() {
    let ((one, at_one), (two, at_two)) = (taken(), taken());
    let by_address = format!("mine={at_two}");
    // systemd says where web is; port 1 is what a test could not bind without being root.
    let supervisor = activated(&["web=127.0.0.1:1", &by_address], "$$", "web:other", one.into(), two.into()).start();
    assert_eq!(names(&supervisor), ["web", "mine"]);
    assert_eq!(supervisor.status().listeners[0].address, format!("tcp://{at_one}"));
    for address in [at_one, at_two] {
        assert!(request(address, "/").contains("generation=1"));
    }
}

#[test]
fn a_passed_socket_that_nobody_asks_for_is_closed_and_said() {
    let ((one, at_one), (two, at_two)) = (taken(), taken());
    let supervisor = activated(&["web=127.0.0.1:1"], "$$", "web:spare", one.into(), two.into()).start();
    supervisor.wait_for_log(&format!("systemd passed spare (tcp://{at_two}), which no --listen asks for: closed"));
    assert!(request(at_one, "/").contains("generation=1"));
    assert!(TcpStream::connect(at_two).is_err());
}

#[test]
fn sockets_that_were_passed_to_another_process_are_not_taken() {
    let ((one, at_one), (two, _)) = (taken(), taken());
    let supervisor = activated(&["127.0.0.1:0"], "1", "web:admin", one.into(), two.into()).start();
    assert_eq!(names(&supervisor), ["listener"]);
    assert_ne!(supervisor.address(), at_one);
    // Nor do they leak into the service.
    let pid = supervisor.serving().pid.unwrap();
    let sockets = fds(pid).into_values().filter(|what| what.starts_with("socket:")).count();
    let own = crate::seen::inherited_fds(&request(supervisor.address(), "/inherited"));
    assert_eq!(own.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3, 4], "{sockets} sockets");
}
