//! What a generation is handed: fds, their names and numbers, stored fds; and what it may do to them without harm.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::common::{example, processes_with, puppet, request, Setup, Supervisor, PATIENCE};
use crate::seen::{environ, fds, inherited_fds};
use crate::stage::Stage;

/// A supervised puppet with three kinds of listeners.
fn three_listeners(flags: &[&str], puppet_flags: &[&str]) -> Supervisor {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let local = format!("local=unix://{}", dir.path().join("s").display());
    let mut args = vec!["--listen", "web=127.0.0.1:0", "--listen", "dns=udp://127.0.0.1:0", "--listen", &local];
    args.extend(flags);
    let puppet = puppet();
    args.extend(["--", &puppet]);
    args.extend(puppet_flags);
    Setup::within(dir, args).start()
}

fn address_of(supervisor: &Supervisor, name: &str) -> SocketAddr {
    let listeners = supervisor.status().listeners;
    let listener = listeners.iter().find(|listener| listener.name == name).unwrap();
    listener.address.split_once("://").unwrap().1.parse().unwrap()
}

fn serving_environ(supervisor: &Supervisor) -> (i32, BTreeMap<String, String>) {
    let pid = supervisor.serving().pid.unwrap();
    (pid, environ(pid))
}

fn ask_datagram(address: SocketAddr) -> String {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.send_to(b"hello", address).unwrap();
    let mut answer = [0; 200];
    let length = socket.recv(&mut answer).unwrap();
    String::from_utf8_lossy(&answer[..length]).into_owned()
}

fn ask_unix(path: &Path) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Which of these sockets has the inode that an fd shows.
fn kind_of(fd: &str, web: SocketAddr, dns: SocketAddr, local: &Path) -> &'static str {
    let inode: u64 = fd.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')).unwrap().parse().unwrap();
    if procfs::net::tcp().unwrap().iter().any(|entry| entry.inode == inode && entry.local_address == web) {
        "web"
    } else if procfs::net::udp().unwrap().iter().any(|entry| entry.inode == inode && entry.local_address == dns) {
        "dns"
    } else if procfs::net::unix()
        .unwrap()
        .iter()
        .any(|entry| entry.inode == inode && entry.path.as_deref() == Some(local))
    {
        "local"
    } else {
        "unknown"
    }
}

#[test]
fn listeners_are_fds_from_3_in_order_with_their_names() {
    let supervisor = three_listeners(&["--handoff", "fds"], &[]);
    let (web, dns) = (address_of(&supervisor, "web"), address_of(&supervisor, "dns"));
    let local = supervisor.dir.path().join("s");
    for generation in 1..=2 {
        let (pid, env) = serving_environ(&supervisor);
        assert_eq!((env["LISTEN_FDS"].as_str(), env["LISTEN_FDNAMES"].as_str()), ("3", "web:dns:local"));
        assert_eq!(env["LISTEN_PID"], pid.to_string());
        assert_eq!(env["ZDDSUP_GENERATION"], generation.to_string());
        assert!(!env.contains_key("ZDDSUP_SOCKET"));
        let handed = inherited_fds(&request(web, "/inherited"));
        assert_eq!(handed.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5], "{handed:?}");
        let kinds: Vec<_> = (3..=5).map(|number| kind_of(&handed[&number], web, dns, &local)).collect();
        assert_eq!(kinds, ["web", "dns", "local"], "{handed:?}");
        let named = format!("pid={pid} ");
        assert!(request(web, "/").contains(&named));
        assert!(ask_datagram(dns).contains(&named));
        assert!(ask_unix(&local).contains(&named));
        if generation == 1 {
            supervisor.upgrade();
            supervisor.wait_settled();
        }
    }
}

#[test]
fn placeholders_are_filled_in_anew_for_each_generation() {
    let env = "NGINX={fd:local};{fd:web};, generation {generation}";
    let supervisor = three_listeners(&["--env", &format!("SOCKETS={env}")], &["--version", "{fd:dns}-{generation}"]);
    let web = address_of(&supervisor, "web");
    assert!(request(web, "/").contains("version=4-1 "));
    assert_eq!(serving_environ(&supervisor).1["SOCKETS"], "NGINX=5;3;, generation 1");
    supervisor.upgrade();
    supervisor.wait_settled();
    assert!(request(web, "/").contains("version=4-2 "));
    assert_eq!(serving_environ(&supervisor).1["SOCKETS"], "NGINX=5;3;, generation 2");
}

#[test]
fn the_socket_handoff_has_no_fds_by_number() {
    let hello = example("axum_hello").display().to_string();
    let args = ["--listen", "127.0.0.1:0", "--handoff", "socket", "--ready", "notify", "--", &hello, "v1"];
    let supervisor = Supervisor::start(args);
    let (pid, env) = serving_environ(&supervisor);
    let listens: Vec<_> = env.keys().filter(|name| name.starts_with("LISTEN_")).collect();
    assert_eq!(listens, [""; 0]);
    assert_eq!(env["ZDDSUP_SOCKET"], "3");
    assert!(fds(pid).contains_key(&3));
    // It got its listener by a message, and said ready there.
    assert!(request(supervisor.address(), "/").contains("v1"));
    supervisor.upgrade();
    supervisor.wait_settled();
    assert!(request(supervisor.address(), "/").contains("v1"));
}

#[test]
fn the_automatic_handoff_has_both() {
    let supervisor = three_listeners(&[], &[]);
    let (_, env) = serving_environ(&supervisor);
    // What LISTEN_FDS counts are listeners; the handoff socket comes after them.
    assert_eq!((env["LISTEN_FDS"].as_str(), env["ZDDSUP_SOCKET"].as_str()), ("3", "6"));
    let handed = inherited_fds(&request(address_of(&supervisor, "web"), "/inherited"));
    assert_eq!(handed.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6], "{handed:?}");
}

#[test]
fn without_listeners_there_are_no_variables_about_them() {
    let supervisor = Supervisor::start(["--handoff", "fds", "--", &puppet(), "--bind", "127.0.0.1:0"]);
    let (_, env) = serving_environ(&supervisor);
    let listens: Vec<_> = env.keys().filter(|name| name.starts_with("LISTEN_")).collect();
    assert_eq!(listens, [""; 0]);
}

#[test]
fn servers_of_other_supervisors_find_theirs() {
    let supervisor = three_listeners(&["--compat", "start_server,einhorn"], &[]);
    supervisor.upgrade();
    supervisor.wait_settled();
    let (_, env) = serving_environ(&supervisor);
    let (web, local) = (address_of(&supervisor, "web"), supervisor.dir.path().join("s"));
    // It knows no datagrams.
    assert_eq!(env["SERVER_STARTER_PORT"], format!("{web}=3;{}=5", local.display()));
    assert_eq!(env["SERVER_STARTER_GENERATION"], "2");
    let einhorn: Vec<_> = env.iter().filter(|(name, _)| name.starts_with("EINHORN_")).collect();
    let wanted = [("EINHORN_FD_0", "3"), ("EINHORN_FD_1", "4"), ("EINHORN_FD_2", "5"), ("EINHORN_FD_COUNT", "3")];
    assert_eq!(
        einhorn,
        wanted.map(|(name, value)| (name.to_owned(), value.to_owned())).each_ref().map(|(a, b)| (a, b))
    );
    let without = three_listeners(&[], &[]);
    let (_, env) = serving_environ(&without);
    assert!(!env.keys().any(|name| name.starts_with("EINHORN_") || name.starts_with("SERVER_STARTER_")));
}

#[test]
fn stored_fds_are_handed_on_until_they_are_removed() {
    let stage = Stage::start(&[], "--version 1 --fdstore cache --fdstore more");
    stage.wait_until("both are stored", |status| status.stored_fds == 2);
    for version in ["2", "3"] {
        stage.next(&format!("--version {version}"));
        stage.upgrade();
        stage.wait_settled();
        assert_eq!(request(stage.address(), "/stored"), "cache=1\nmore=1");
        let (_, env) = serving_environ(&stage);
        assert_eq!((env["LISTEN_FDS"].as_str(), env["LISTEN_FDNAMES"].as_str()), ("3", "listener:cache:more"));
    }
    assert!(request(stage.address(), "/barrier?text=FDSTOREREMOVE=1%0AFDNAME=cache").contains("version="));
    assert_eq!(stage.status().stored_fds, 1);
    stage.upgrade();
    stage.wait_settled();
    assert_eq!(request(stage.address(), "/stored"), "more=1");
}

#[test]
fn what_a_failed_candidate_stores_or_removes_does_not_count() {
    let stage = Stage::start(&["--ready", "notify"], "--version 1 --fdstore cache");
    stage.wait_until("it is stored", |status| status.stored_fds == 1);
    stage.next(
        "--version 2 --notify-raw FDSTOREREMOVE=1\\nFDNAME=cache --fdstore other --ready none --exit-after-ms 200:1",
    );
    assert_eq!(stage.cli(&["upgrade"]).status.code(), Some(3));
    stage.wait_settled();
    assert_eq!(stage.status().stored_fds, 1);
    stage.next("--version 3");
    stage.upgrade();
    stage.wait_settled();
    assert_eq!(request(stage.address(), "/stored"), "cache=1");
}

/// The flags of fd 3, as the puppet sees them.
fn flags_of_listener(address: SocketAddr) -> String {
    let text = request(address, "/fds");
    text.lines()
        .find(|line| line.starts_with("fd 3 "))
        .and_then(|line| line.split(" flags=").nth(1))
        .unwrap()
        .to_owned()
}

#[test]
fn a_failing_candidate_leaves_no_status_flag_behind() {
    let stage = Stage::start(&["--ready", "notify"], "--version 1 --strict-blocking");
    let before = flags_of_listener(stage.address());
    stage.next("--version 2 --nonblocking --ready none --exit-after-ms 200:9");
    assert_eq!(stage.cli(&["upgrade"]).status.code(), Some(3));
    stage.wait_settled();
    // Its accept(2) began before; the next one would end with EAGAIN, and the puppet with it.
    for _ in 0..5 {
        assert!(request(stage.address(), "/").contains("version=1 "));
    }
    assert_eq!(flags_of_listener(stage.address()), before);
    assert_eq!(stage.status().restarts, 0);
}

#[test]
fn one_that_was_timed_out_leaves_no_status_flag_behind_either() {
    let stage = Stage::start(&["--ready", "notify", "--start-timeout", "4s"], "--version 1 --strict-blocking");
    stage.next("--version 2 --nonblocking --ready none --drain-ms 300");
    assert_eq!(stage.cli(&["upgrade"]).status.code(), Some(3));
    stage.wait_settled();
    for _ in 0..5 {
        assert!(request(stage.address(), "/").contains("version=1 "));
    }
    assert_eq!(stage.status().restarts, 0);
}

#[test]
fn a_generations_own_backlog_does_not_stay() {
    let stage = Stage::start(&[], "--version 1 --listen-backlog 1");
    let address = stage.address();
    assert!(request(address, "/hang").contains("version=1 "));
    // Nobody accepts: all of these wait in the queue, which with its backlog has room for two.
    let within = Duration::from_secs(20);
    let waiting: Vec<_> = (0..20).map(|_| TcpStream::connect_timeout(&address, within).unwrap()).collect();
    assert_eq!(waiting.len(), 20);
    // Nor does a process that hangs stay behind the test.
    let dir = stage.dir.path().display().to_string();
    assert_eq!(processes_with(&dir).len(), 2);
    drop(stage);
    assert_eq!(processes_with(&dir), [0; 0]);
}

#[test]
fn a_listener_that_was_shut_down_listens_again() {
    let stage = Stage::start(&[], "--version 1 --shutdown-listener");
    let address = stage.address();
    stage.next("--version 2");
    let output = stage.cli(&["upgrade", "--wait"]);
    assert!(output.status.success(), "{output:?}");
    stage.wait_for_log("a generation called shutdown(2) on the shared socket: listening again");
    assert_eq!(stage.address(), address);
    for _ in 0..5 {
        assert!(request(address, "/").contains("version=2 "));
    }
    // The next ones have it as well.
    stage.next("--version 3");
    stage.upgrade();
    stage.wait_settled();
    assert!(request(address, "/").contains("version=3 "));
}
