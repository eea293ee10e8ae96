//! Programs that know nothing of it, whose bind(2) and listen(2) are caught.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{waitid, Id, WaitPidFlag};
use nix::unistd::{Gid, Pid, Uid};
use zddsup::core::End;
use zddsup::handoff::adopt::remote::{Address, Caller, LookError};
use zddsup::process::identity::Identity;
use zddsup::process::reaper::Reaper;
use zddsup::process::spawn::{spawn, Launch, Spawned, Trap};
use zddsup::sys::pidfd::PidFd;
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
    launch(&program(puppet()), &args)
}

fn any() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// A child under the trap, which is gone with its test, failed or not.
struct Trapped {
    spawned: Spawned,
    reaper: Reaper,
    gone: GoneAtLast,
}

struct GoneAtLast(PidFd);

impl Drop for GoneAtLast {
    fn drop(&mut self) {
        let _gone_already = self.0.signal(Signal::SIGKILL);
        let _reaped_already = waitid(Id::PIDFd(self.0.as_fd()), WaitPidFlag::WEXITED);
    }
}

impl Trapped {
    async fn start(launch: Launch) -> Trapped {
        let reaper = Reaper::new();
        let spawned = spawn(Launch { trap: true, ..launch }, &reaper).await.unwrap();
        let gone = GoneAtLast(spawned.pidfd.try_clone().unwrap());
        Trapped { spawned, reaper, gone }
    }

    fn pid(&self) -> i32 {
        self.spawned.member.pid
    }

    fn trap(&self) -> &Trap {
        self.spawned.trap.as_ref().unwrap()
    }

    fn notifier(&self) -> &Notifier {
        &self.trap().notifier
    }

    /// How it ended, and what is left to ask for its calls.
    async fn end(mut self) -> (End, Notifier) {
        let notifier = self.spawned.trap.take().unwrap().notifier;
        let end = end(self.spawned, &self.reaper).await;
        drop(self.gone);
        (end, notifier)
    }

    async fn kill(self) -> Notifier {
        self.spawned.pidfd.signal(Signal::SIGKILL).unwrap();
        let (end, notifier) = self.end().await;
        assert_eq!(end, End::Killed { signal: libc::SIGKILL, core: false });
        notifier
    }
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

fn answer(address: SocketAddr) -> String {
    ask(connect(address))
}

/// Between the answer and listen(2) itself nobody listens yet.
fn connect(address: SocketAddr) -> TcpStream {
    loop {
        match TcpStream::connect(address) {
            Ok(stream) => return stream,
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionRefused),
        }
    }
}

/// The server's name is in its answer.
fn ask(mut stream: TcpStream) -> String {
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

#[test]
fn a_server_that_may_go_on_serves_with_its_own_socket() {
    alone(async {
        let server = Trapped::start(server(any())).await;
        let socket = let_listen(server.notifier()).await;
        let pid = server.pid();
        assert!(answer(socket.local_addr().unwrap()).contains(&format!("pid={pid}")));
        assert_eq!((status(pid, "Seccomp"), status(pid, "Seccomp_filters")), ("2".to_owned(), "1".to_owned()));
        // The connection may close meanwhile.
        let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        let files: Vec<_> = files.filter_map(|file| fs::read_link(file.path()).ok()).collect();
        assert!(files.len() > 3 && !files.contains(&"anon_inode:seccomp notify".into()), "it could answer itself");
        server.kill().await;
    });
}

#[test]
fn a_server_is_told_that_its_address_is_taken() {
    alone(async {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let server = Trapped::start(Launch { stderr: Some(write), ..server(any()) }).await;
        let (bind, _) = next(server.notifier()).await;
        assert!(server.notifier().answer(bind.id, Err(Errno::EADDRINUSE)).unwrap());
        assert_eq!(server.end().await.0, End::Exited(67));
        assert!(read_all(read).contains("Address already in use"));
    });
}

#[test]
fn a_server_serves_with_a_socket_that_was_held_for_it() {
    alone(async {
        let held = TcpListener::bind(any()).unwrap();
        let address = held.local_addr().unwrap();
        // Its own bind(2) would say that the address is taken.
        let server = Trapped::start(server(address)).await;
        // Waits in the queue since before the server listens.
        let waiting = TcpStream::connect(address).unwrap();
        let notifier = server.notifier();
        let (bind, fd) = next(notifier).await;
        let caller = Caller::of(notifier, &bind).unwrap();
        let Call::Bind { address: at, length, .. } = bind.call else { panic!("{bind:?}") };
        assert_eq!(caller.address(at, length).unwrap(), Address::Inet(address));
        assert!(caller.closes_on_exec(fd).unwrap());
        assert!(notifier.put_in_place(bind.id, held.as_fd(), fd, true).unwrap());
        assert!(notifier.answer(bind.id, Ok(())).unwrap());
        let (listen, _) = next(notifier).await;
        assert!(notifier.answer(listen.id, Ok(())).unwrap());
        drop(held);
        for stream in [waiting, connect(address)] {
            assert!(ask(stream).contains(&format!("pid={}", server.pid())));
        }
        server.kill().await;
    });
}

#[test]
fn one_that_is_killed_while_it_waits_leaves_nothing_to_answer() {
    alone(async {
        let server = Trapped::start(server(any())).await;
        let (bind, fd) = next(server.notifier()).await;
        let notifier = server.kill().await;
        assert!(!notifier.still_waits(bind.id));
        assert!(matches!(Caller::of(&notifier, &bind), Err(LookError::Gone)));
        let held = TcpListener::bind(any()).unwrap();
        assert!(!notifier.put_in_place(bind.id, held.as_fd(), fd, true).unwrap());
        assert!(!notifier.go_on(bind.id).unwrap());
        assert_eq!(notifier.next().await.unwrap_err().kind(), ErrorKind::UnexpectedEof);
    });
}

#[test]
fn one_that_is_killed_in_the_middle_of_a_look_is_no_longer_looked_at() {
    alone(async {
        let server = Trapped::start(server(any())).await;
        let (bind, fd) = next(server.notifier()).await;
        let caller = Caller::of(server.notifier(), &bind).unwrap();
        let Call::Bind { address, length, .. } = bind.call else { panic!("{bind:?}") };
        server.spawned.pidfd.signal(Signal::SIGKILL).unwrap();
        server.spawned.pidfd.exited().await.unwrap();
        assert!(matches!(caller.copy(fd), Err(LookError::Gone)));
        assert!(matches!(caller.closes_on_exec(fd), Err(LookError::Gone)));
        assert!(matches!(caller.address(address, length), Err(LookError::Gone)));
        server.end().await;
    });
}

#[test]
fn what_it_starts_is_caught_too() {
    alone(async {
        let script = format!("'{}' --bind 127.0.0.1:0 --ready none & wait", puppet().display());
        let parent = Trapped::start(shell(&script)).await;
        let notifier = parent.notifier();
        let (bind, _) = next(notifier).await;
        let child = Caller::of(notifier, &bind).unwrap().pid();
        let held = PidFd::open(Pid::from_raw(child)).unwrap();
        assert_eq!(status(child, "PPid"), parent.pid().to_string());
        assert!(notifier.go_on(bind.id).unwrap());
        let (listen, fd) = next(notifier).await;
        let socket = TcpListener::from(Caller::of(notifier, &listen).unwrap().copy(fd).unwrap());
        assert!(notifier.go_on(listen.id).unwrap());
        let answer = answer(socket.local_addr().unwrap());
        held.signal(Signal::SIGKILL).unwrap();
        assert!(answer.contains(&format!("pid={child}")), "{answer}");
        assert_eq!(parent.end().await.0, End::Exited(0));
    });
}

#[test]
fn a_program_that_never_binds_runs_as_ever() {
    alone(async {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let launch = Launch { stdout: Some(write), ..shell("ls -l /proc/self/fd | grep -c -- '->'") };
        let (end, notifier) = Trapped::start(launch).await.end().await;
        assert_eq!(end, End::Exited(0));
        // 0, 1, 2 and the directory.
        assert_eq!(read_all(read), "4\n");
        assert_eq!(notifier.next().await.unwrap_err().kind(), ErrorKind::UnexpectedEof);
    });
}

fn sleep() -> Launch {
    launch(&program("/bin/sleep"), &["60"])
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
        let service = Trapped::start(Launch { identity: Some(somebody()), ..sleep() }).await;
        assert!(!service.trap().no_new_privs);
        let pid = service.pid();
        assert_eq!((status(pid, "NoNewPrivs"), status(pid, "Seccomp")), ("0".to_owned(), "2".to_owned()));
        service.kill().await;
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
    });
}
