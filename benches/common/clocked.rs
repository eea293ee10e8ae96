//! A server that serves nothing and says when: the benchmark's own executable, started again.
//!
//! ```text
//! BENCH --clocked          says when its main began, READY=1, when that was sent, and when TERM came; then it exits
//! BENCH --exec PROGRAM …   says when, and becomes PROGRAM with the same fds and LISTEN_PID of its own
//! ```
//!
//! Times are `CLOCK_MONOTONIC`, sent to the socket that `BENCH_CLOCK` names (what begins with `ZDDSUP_` is not passed on).

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{fcntl, FcntlArg};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;

use super::now_ns;
use super::supervised::PATIENCE;

/// Where times are sent.
pub const CLOCK_VAR: &str = "BENCH_CLOCK";

/// Something that happened in a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    pub what: String,
    pub pid: i32,
    pub at_ns: u64,
}

/// Takes over if the benchmark was started as one of its servers. To be called first in `main`.
pub fn be_server_if_told() {
    let began = now_ns();
    let mut args = std::env::args_os().skip(1);
    match args.next().as_deref().and_then(|arg| arg.to_str()) {
        Some("--clocked") => be_clocked(began),
        Some("--exec") => {
            let program = args.next().expect("a program");
            let listener = fcntl(std::io::stdin(), FcntlArg::F_DUPFD(3)).expect("a listener as stdin");
            assert_eq!(listener, 3, "fd 3 was inherited already");
            std::env::set_var("LISTEN_PID", std::process::id().to_string());
            say("exec", now_ns());
            panic!("{}", Command::new(program).args(args).exec());
        }
        _ => {}
    }
}

fn be_clocked(began: u64) -> ! {
    let term = SigSet::from(Signal::SIGTERM);
    term.thread_block().expect("a valid mask");
    say("main", began);
    let ready = now_ns();
    notify();
    say("ready", ready);
    let _signal = term.wait().expect("sigwait");
    say("term", now_ns());
    std::process::exit(0)
}

/// To the supervisor, if there is one: its socket has an abstract name.
fn notify() {
    let Some(place) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let name = place.as_bytes().strip_prefix(b"@").expect("an abstract name");
    let address = SocketAddr::from_abstract_name(name).expect("a name");
    let socket = UnixDatagram::unbound().expect("a socket");
    socket.send_to_addr(b"READY=1", &address).expect("a supervisor");
}

fn say(what: &str, at_ns: u64) {
    let Some(path) = std::env::var_os(CLOCK_VAR) else { return };
    let socket = UnixDatagram::unbound().expect("a socket");
    let text = format!("{what} {} {at_ns}", std::process::id());
    socket.send_to(text.as_bytes(), Path::new(&path)).expect("the benchmark listens");
}

/// Hears what servers say.
pub struct Ear {
    socket: UnixDatagram,
    pub path: PathBuf,
    heard: Vec<Said>,
}

impl Ear {
    #[must_use]
    pub fn new(dir: &Path) -> Ear {
        let path = dir.join("clock");
        let socket = UnixDatagram::bind(&path).expect("a socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        Ear { socket, path, heard: Vec::new() }
    }

    /// Waits until such a thing is said, in whatever order they come. Each is heard once.
    pub fn hear(&mut self, what: &str, is: impl Fn(&Said) -> bool) -> Said {
        loop {
            if let Some(at) = self.heard.iter().position(|said| said.what == what && is(said)) {
                return self.heard.remove(at);
            }
            let mut buffer = [0; 256];
            let length = self.socket.recv(&mut buffer).unwrap_or_else(|error| panic!("no {what:?}: {error}"));
            let text = std::str::from_utf8(&buffer[..length]).expect("text");
            let mut words = text.split(' ');
            let mut word = || words.next().expect("three words");
            let said = Said { what: word().to_owned(), pid: word().parse().unwrap(), at_ns: word().parse().unwrap() };
            self.heard.push(said);
        }
    }
}

/// A server started by nobody but the benchmark, until it says READY=1.
pub struct Bare {
    child: Child,
    /// From its execve(2) to READY=1.
    pub start: Duration,
}

impl Bare {
    /// It gets the listener as fd 3.
    #[must_use]
    #[allow(clippy::zombie_processes)] // It is waited for when this is dropped; without READY=1 the bench is over.
    pub fn start(dir: &Path, ear: &mut Ear, listener: &TcpListener, command: &[String]) -> Bare {
        let path = dir.join("notify");
        let notify = UnixDatagram::bind(&path).expect("a socket");
        notify.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut bare = Command::new(std::env::current_exe().expect("its own path"));
        bare.arg("--exec").args(command).env(CLOCK_VAR, &ear.path).env("NOTIFY_SOCKET", &path);
        bare.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "http").stderr(Stdio::null()).process_group(0);
        bare.stdin(OwnedFd::from(listener.try_clone().expect("an fd")));
        let child = bare.spawn().expect("the server starts");
        let mut buffer = [0; 4096];
        loop {
            let length = notify.recv(&mut buffer).expect("READY=1");
            let ready_ns = now_ns();
            let text = String::from_utf8_lossy(&buffer[..length]);
            if text.lines().any(|line| line == "READY=1") {
                std::fs::remove_file(&path).expect("its own file");
                let pid = i32::try_from(child.id()).unwrap();
                let exec = ear.hear("exec", |said| said.pid == pid);
                return Bare { child, start: Duration::from_nanos(ready_ns - exec.at_ns) };
            }
        }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _gone = nix::sys::signal::killpg(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(5);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}
