//! Programs that know nothing of it, whose bind(2) and listen(2) are caught.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid};
use zddsup::core::End;
use zddsup::handoff::adopt::remote::{Address, Caller, LookError};
use zddsup::process::identity::Identity;
use zddsup::process::reaper::Reaper;
use zddsup::process::spawn::{spawn, Launch, Spawned};
use zddsup::sys::seccomp::{Call, Filter, Notification, Notifier};

use crate::children::{alone, end, failure, launch, program, read_all, shell};

/// `cargo test` builds it; `cargo test --test process` alone does not.
fn puppet() -> PathBuf {
    let path = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("examples/puppet");
    assert!(path.exists(), "{} is not there: run `cargo build --examples`", path.display());
    path
}

/// A server that binds and listens by itself.
fn server(address: SocketAddr) -> Launch {
    let args = ["--bind", &address.to_string(), "--ready", "none"];
    Launch { trap: true, ..launch(&program(puppet()), &args) }
}

fn any() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

fn notifier(spawned: &Spawned) -> &Notifier {
    &spawned.trap.as_ref().unwrap().notifier
}

/// Its next call, and the socket that it is about.
async fn next(notifier: &Notifier) -> (Notification, i32) {
    let notification = notifier.next().await.unwrap();
    let (Call::Bind { fd, .. } | Call::Listen { fd, .. }) = notification.call;
    (notification, fd)
}

/// Lets it bind and listen, and gives a copy of its socket.
async fn let_listen(notifier: &Notifier) -> TcpListener {
    let (bind, _) = next(notifier).await;
    assert!(matches!(bind.call, Call::Bind { .. }), "{bind:?}");
    assert!(notifier.go_on(bind.id).unwrap());
    let (listen, fd) = next(notifier).await;
    assert!(matches!(listen.call, Call::Listen { backlog: 1024, .. }), "{listen:?}");
    let copy = Caller::of(notifier, &listen).unwrap().copy(fd).unwrap();
    assert!(notifier.go_on(listen.id).unwrap());
    copy.into()
}

/// Asks the server for its name. Waits until it accepts.
fn answer(address: SocketAddr) -> String {
    // Between the answer and listen(2) itself nobody listens yet.
    let mut stream = loop {
        match TcpStream::connect(address) {
            Ok(stream) => break stream,
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionRefused),
        }
    };
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn status(pid: i32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap().trim().to_owned()
}

async fn killed(spawned: Spawned, reaper: &Reaper) {
    spawned.pidfd.signal(Signal::SIGKILL).unwrap();
    assert_eq!(end(spawned, reaper).await, End::Killed { signal: libc::SIGKILL, core: false });
}

#[test]
fn a_server_that_may_go_on_serves_with_its_own_socket() {
    alone(async {
        let reaper = Reaper::new();
        let spawned = spawn(server(any()), &reaper).await.unwrap();
        let socket = let_listen(notifier(&spawned)).await;
        let pid = spawned.member.pid;
        assert!(answer(socket.local_addr().unwrap()).contains(&format!("pid={pid}")));
        assert_eq!((status(pid, "Seccomp"), status(pid, "Seccomp_filters")), ("2".to_owned(), "1".to_owned()));
        // Its sockets, those that it was given, and its report's: none is left in it but its own.
        let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        let files = files.map(|file| fs::read_link(file.path()).unwrap().to_string_lossy().into_owned());
        assert!(!files.into_iter().any(|file| file.contains("seccomp")), "it could answer itself");
        killed(spawned, &reaper).await;
    });
}

#[test]
fn a_server_is_told_that_its_address_is_taken() {
    alone(async {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let reaper = Reaper::new();
        let launch = Launch { stderr: Some(write), ..server(any()) };
        let spawned = spawn(launch, &reaper).await.unwrap();
        let (bind, _) = next(notifier(&spawned)).await;
        assert!(notifier(&spawned).answer(bind.id, Err(Errno::EADDRINUSE)).unwrap());
        assert_eq!(end(spawned, &reaper).await, End::Exited(67));
        assert!(read_all(read).contains("Address already in use"));
    });
}

#[test]
fn a_server_serves_with_a_socket_that_was_held_for_it() {
    alone(async {
        let held = TcpListener::bind(any()).unwrap();
        let address = held.local_addr().unwrap();
        // It asks for another one, and would not get the port of this.
        let reaper = Reaper::new();
        let spawned = spawn(server(address), &reaper).await.unwrap();
        let waiting = TcpStream::connect(address).unwrap();
        let notifier = notifier(&spawned);
        let (bind, fd) = next(notifier).await;
        let caller = Caller::of(notifier, &bind).unwrap();
        let Call::Bind { address: at, length, .. } = bind.call else { panic!("{bind:?}") };
        assert_eq!(caller.address(at, length).unwrap(), Address::Inet(address));
        let close_on_exec = caller.closes_on_exec(fd).unwrap();
        assert!(close_on_exec);
        assert!(notifier.put_in_place(bind.id, held.as_fd(), fd, close_on_exec).unwrap());
        assert!(notifier.answer(bind.id, Ok(())).unwrap());
        let (listen, _) = next(notifier).await;
        assert!(notifier.answer(listen.id, Ok(())).unwrap());
        assert!(answer(address).contains(&format!("pid={}", spawned.member.pid)));
        drop(waiting);
        killed(spawned, &reaper).await;
    });
}

#[test]
fn one_that_is_killed_while_it_waits_leaves_nothing_to_answer() {
    alone(async {
        let reaper = Reaper::new();
        let mut spawned = spawn(server(any()), &reaper).await.unwrap();
        let trap = spawned.trap.take().unwrap();
        let (bind, fd) = next(&trap.notifier).await;
        let caller = Caller::of(&trap.notifier, &bind).unwrap();
        killed(spawned, &reaper).await;
        assert!(!trap.notifier.still_waits(bind.id));
        assert!(matches!(caller.copy(fd), Err(LookError::Gone)));
        let held = TcpListener::bind(any()).unwrap();
        assert!(!trap.notifier.put_in_place(bind.id, held.as_fd(), fd, true).unwrap());
        assert!(!trap.notifier.go_on(bind.id).unwrap());
        assert_eq!(trap.notifier.next().await.unwrap_err().kind(), ErrorKind::UnexpectedEof);
    });
}

#[test]
fn what_it_starts_is_caught_too() {
    alone(async {
        let reaper = Reaper::new();
        let script = format!("'{}' --bind 127.0.0.1:0 --ready none & wait", puppet().display());
        let spawned = spawn(Launch { trap: true, ..shell(&script) }, &reaper).await.unwrap();
        let notifier = notifier(&spawned);
        let (bind, _) = next(notifier).await;
        let child = Caller::of(notifier, &bind).unwrap().pid();
        assert_eq!(status(child, "PPid"), spawned.member.pid.to_string());
        assert!(notifier.go_on(bind.id).unwrap());
        let (listen, fd) = next(notifier).await;
        let socket = TcpListener::from(Caller::of(notifier, &listen).unwrap().copy(fd).unwrap());
        assert!(notifier.go_on(listen.id).unwrap());
        assert!(answer(socket.local_addr().unwrap()).contains(&format!("pid={child}")));
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), Signal::SIGKILL).unwrap();
        assert_eq!(end(spawned, &reaper).await, End::Exited(0));
    });
}

#[test]
fn a_program_that_never_binds_runs_as_ever() {
    alone(async {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let reaper = Reaper::new();
        let launch = Launch { trap: true, stdout: Some(write), ..shell("ls -l /proc/self/fd | grep -c -- '->'") };
        let mut spawned = spawn(launch, &reaper).await.unwrap();
        let trap = spawned.trap.take().unwrap();
        assert_eq!(end(spawned, &reaper).await, End::Exited(0));
        // 0, 1, 2 and the directory.
        assert_eq!(read_all(read), "4\n");
        assert_eq!(trap.notifier.next().await.unwrap_err().kind(), ErrorKind::UnexpectedEof);
    });
}

fn somebody() -> Identity {
    let (uid, gid) = (Uid::from_raw(54321), Gid::from_raw(54322));
    Identity { uid, gid, groups: vec![gid], name: "somebody".to_owned(), home: "/".into(), shell: "/bin/sh".into() }
}

#[test]
fn a_service_of_root_may_gain_privileges_as_ever_whoever_it_runs_as() {
    if !Uid::effective().is_root() {
        return;
    }
    alone(async {
        let reaper = Reaper::new();
        let launch = Launch { trap: true, identity: Some(somebody()), ..launch(&program("/bin/sleep"), &["60"]) };
        let spawned = spawn(launch, &reaper).await.unwrap();
        assert!(!spawned.trap.as_ref().unwrap().no_new_privs);
        let pid = spawned.member.pid;
        assert_eq!((status(pid, "NoNewPrivs"), status(pid, "Seccomp")), ("0".to_owned(), "2".to_owned()));
        killed(spawned, &reaper).await;
    });
}

/// The calling thread's alone, as setresuid(2) itself is.
#[allow(unsafe_code)]
fn set_effective(uid: Uid) {
    // SAFETY: setresuid(2) takes integers.
    let set = unsafe { libc::syscall(libc::SYS_setresuid, u32::MAX, uid.as_raw(), u32::MAX) };
    assert_eq!(set, 0);
}

#[test]
fn without_privilege_none_can_be_gained_and_that_is_said() {
    if !Uid::effective().is_root() {
        return;
    }
    alone(async {
        let reaper = Reaper::new();
        let sleep = Launch { trap: true, ..launch(&program("/bin/sleep"), &["60"]) };
        set_effective(somebody().uid);
        let spawned = spawn(sleep, &reaper).await;
        set_effective(Uid::from_raw(0));
        let spawned = spawned.unwrap();
        assert!(spawned.trap.as_ref().unwrap().no_new_privs);
        assert_eq!(status(spawned.member.pid, "NoNewPrivs"), "1");
        killed(spawned, &reaper).await;
    });
}

#[test]
fn under_another_filter_there_can_be_none() {
    // A thread of its own: it never gets rid of its filter.
    let thread = std::thread::spawn(|| {
        let _listener = Filter::bind_and_listen().unwrap().install().unwrap();
        alone(async {
            let error = failure(Launch { trap: true, ..shell("true") }).await;
            assert!(error.contains("EBUSY") && error.contains("--handoff fds"), "{error}");
            assert!(!error.contains('\n'), "{error}");
        });
    });
    thread.join().unwrap();
}

#[test]
fn one_that_cannot_be_executed_says_so_trapped_or_not() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("app");
        fs::copy("/bin/true", &path).unwrap();
        let program = program(&path);
        fs::remove_file(path).unwrap();
        let error = failure(Launch { trap: true, ..launch(&program, &[]) }).await;
        assert!(error.contains("there is no program"), "{error}");
        assert_eq!(Arc::strong_count(&program), 1);
    });
}
