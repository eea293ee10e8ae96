//! Hostile input: nothing crashes, nothing leaks, and the service goes on.

use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use crate::common::{request, try_request, wait_for, PATIENCE};
use crate::stage::{clean, Stage};

fn open_fds(stage: &Stage) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", stage.pid())).unwrap().count()
}

fn memory_kib(stage: &Stage) -> u64 {
    let status = procfs::process::Process::new(stage.pid()).unwrap().status().unwrap();
    status.vmrss.unwrap()
}

/// Sends bytes to the control socket and gives what comes back.
fn send(stage: &Stage, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(stage.control()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // It may be closed before all is sent.
    let _refused = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _reset = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn the_control_socket_outlives_garbage() {
    let stage = Stage::start(&[], "--version 1");
    let loads = [stage.load(), stage.keep_alive_load()];
    let before = open_fds(&stage);
    let endless = [b"GET /v1/status HTTP/1.1\r\nX: ".to_vec(), vec![b'a'; 1 << 20]].concat();
    let body =
        [b"POST /v1/upgrade HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n".to_vec(), vec![0; 999_999]].concat();
    for bytes in [
        &b"\0\x01\x02garbage\r\n\r\n"[..],
        b"GET /v1/../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"DELETE /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /v1/upgrade HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &endless,
        &body,
    ] {
        let answer = send(&stage, bytes);
        assert!(!answer.starts_with("HTTP/1.1 2"), "{answer}");
    }
    assert_eq!(stage.status().serving.unwrap().0, 1, "nothing of this was an upgrade");
    stage.next("--version 2");
    stage.upgrade();
    wait_for("its fds are as many as before", || open_fds(&stage) <= before + 1);
    clean(loads);
}

#[test]
fn connections_that_say_nothing_do_not_lock_anybody_out() {
    let stage = Stage::start(&[], "--version 1");
    let before = open_fds(&stage);
    let idle: Vec<_> = (0..200).filter_map(|_| UnixStream::connect(stage.control()).ok()).collect();
    assert!(idle.len() > 60);
    // SIGHUP needs no socket, and once the idle ones have had their time, they are closed.
    stage.next("--version 2");
    stage.signal(nix::sys::signal::Signal::SIGHUP);
    wait_for("version 2 serves", || try_request(stage.address(), "/").is_ok_and(|body| body.contains("version=2 ")));
    drop(idle);
    wait_for("its fds are as many as before", || open_fds(&stage) <= before + 2);
    stage.upgrade();
}

#[test]
fn another_user_is_refused() {
    if !nix::unistd::geteuid().is_root() || Command::new("curl").arg("--version").output().is_err() {
        eprintln!("skipped: another user's request needs root and curl");
        return;
    }
    let stage = Stage::start(&[], "--version 1");
    // Let it reach the socket at all: the credentials are what is tested.
    for path in [stage.dir.path().to_owned(), stage.dir.path().join("zddsup"), stage.control()] {
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "curl", "-s", "-w", "%{http_code}"]);
    command.args(["-X", "POST", "--unix-socket"]).arg(stage.control()).arg("http://zddsup/v1/upgrade");
    let answer = String::from_utf8(command.output().unwrap().stdout).unwrap();
    assert!(answer.ends_with("403"), "{answer}");
    assert_eq!(stage.status().serving.unwrap().0, 1);
}

/// Sends to the service's notify socket as itself, by the puppet.
fn notify(stage: &Stage, query: &str) {
    let _answer = request(stage.address(), &format!("/notify?{query}"));
}

#[test]
fn notify_messages_of_every_bad_kind_are_ignored() {
    let stage = Stage::start(&[], "--version 1");
    let before = open_fds(&stage);
    for query in [
        "bytes=100000",
        "text=",
        "text=%00",
        "text=READY%3D1&fds=253",
        "text=FDSTORE%3D1&fds=0",
        "text=MAINPID%3D1",
        "text=MAINPID%3D-5",
        "text=WATCHDOG_USEC%3D99999999999999999999",
    ] {
        notify(&stage, query);
    }
    // What was sent last is taken after all that came before.
    notify(&stage, "text=STATUS%3Dstill-here");
    stage.wait_until("the status has come", |status| {
        status.generations.iter().any(|generation| generation.status.as_deref() == Some("still-here"))
    });
    wait_for("nothing of it is open", || open_fds(&stage) <= before + 1);
    assert_eq!(stage.serving().number.0, 1);
    stage.next("--version 2");
    stage.upgrade();
}

#[test]
fn a_stranger_cannot_speak_for_a_generation() {
    let stage = Stage::start(&["--ready", "notify", "--start-timeout", "2s"], "--version 1");
    stage.next("--version 2 --ready none");
    let mut upgrade = stage.cli_command(&["upgrade"]).stderr(Stdio::null()).spawn().unwrap();
    let status = stage.wait_until("the candidate runs", |status| {
        status.generations.iter().any(|generation| generation.number.0 == 2 && generation.pid.is_some())
    });
    let candidate = status.generations.iter().find(|generation| generation.number.0 == 2).unwrap().pid.unwrap();
    let environ = std::fs::read(format!("/proc/{candidate}/environ")).unwrap();
    let socket = environ.split(|&byte| byte == 0).find_map(|pair| pair.strip_prefix(b"NOTIFY_SOCKET=@")).unwrap();
    let address = std::os::unix::net::SocketAddr::from_abstract_name(socket).unwrap();
    // This process is none of the candidate's.
    let sender = std::os::unix::net::UnixDatagram::unbound().unwrap();
    sender.send_to_addr(b"READY=1", &address).unwrap();
    assert_eq!(upgrade.wait().unwrap().code(), Some(3));
    assert_eq!(stage.serving().number.0, 1);
    assert!(stage.log().contains("not of this generation"), "{}", stage.log());
}

#[test]
fn a_flood_of_notify_messages_neither_fills_memory_nor_stops_anything() {
    let stage = Stage::start(&[], "--version 1");
    let load = stage.load();
    let before = memory_kib(&stage);
    let address = stage.address();
    let floods: Vec<_> = (0..4)
        .map(|_| {
            std::thread::spawn(move || {
                for _ in 0..500 {
                    let _answer = try_request(address, "/notify?text=STATUS%3Dflood");
                }
            })
        })
        .collect();
    stage.next("--version 2");
    stage.upgrade();
    for flood in floods {
        flood.join().unwrap();
    }
    assert!(load.more(20, PATIENCE));
    load.stop().assert_clean();
    let after = memory_kib(&stage);
    println!("{before} KiB before, {after} KiB after");
    assert!(after < before + 16 * 1024, "{before} KiB before, {after} KiB after");
}

#[test]
fn whoever_follows_the_events_and_reads_nothing_stops_nobody() {
    let stage = Stage::start(&[], "--version 1");
    let mut deaf: Vec<_> = (0..10).map(|_| UnixStream::connect(stage.control()).unwrap()).collect();
    for stream in &mut deaf {
        stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    }
    for _ in 0..20 {
        stage.upgrade();
    }
    stage.wait_settled();
    assert!(memory_kib(&stage) < 64 * 1024);
    drop(deaf);
    assert!(try_request(stage.address(), "/").is_ok());
}
