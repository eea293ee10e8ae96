//! Where an unmodified program runs: as an ordinary user, in a sandbox that forbids something, under another zddsup, and
//! with sockets that were not seen.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::{Command, Output};

use nix::sys::signal::Signal;
use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags};

use crate::common::load::Load;
use crate::common::{puppet, request, try_request, wait_for, Setup, PATIENCE, ZDDSUP};
use crate::stage::{upgrade_under_load, Site};

/// Runs the rest of its arguments under a filter that lets one system call fail with EPERM, as a container's profile does.
const FORBID: &str = "
import ctypes, os, struct, sys
numbers = {'x86_64': (317, 310), 'aarch64': (277, 270)}[os.uname().machine]
number = dict(zip(('seccomp', 'process_vm_readv'), numbers), pidfd_getfd=438)[sys.argv[1]]
code = b''.join(struct.pack('HBBI', *one) for one in [(0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, 0x50001), (6, 0, 0, 0x7fff0000)])
room = ctypes.create_string_buffer(code)
program = struct.pack('HxxxxxxP', len(code) // 8, ctypes.addressof(room))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
os.execv(sys.argv[2], sys.argv[2:])
";

fn forbid(call: &str) -> [&str; 4] {
    ["/usr/bin/python3", "-c", FORBID, call]
}

pub const NOBODY: [&str; 4] = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];

fn doctor(wrapper: &[&str]) -> Output {
    let words = [wrapper, &[ZDDSUP, "doctor"]].concat();
    Command::new(words[0]).args(&words[1..]).output().unwrap()
}

#[track_caller]
fn says(output: &Output, code: i32, lines: &[&str]) {
    let shown = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    for line in lines {
        assert!(shown.contains(line), "no {line:?}:\n{shown}");
    }
}

#[test]
fn the_doctor_finds_all_in_order_here() {
    says(&doctor(&[]), 0, &["ok       catch bind and listen", "ok       steer connections"]);
}

#[test]
fn the_doctor_says_what_an_ordinary_user_lacks() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("not checked: only root can become another user");
    }
    says(&doctor(&NOBODY), 0, &["note     privileges", "setuid"]);
}

#[test]
fn the_doctor_says_what_a_sandbox_forbids_and_what_to_use_instead() {
    let forbidden = doctor(&forbid("pidfd_getfd"));
    says(&forbidden, 1, &["MISSING  catch bind and listen", "pidfd_getfd(2)", "CAP_SYS_PTRACE", "--listen"]);
    says(&doctor(&forbid("seccomp")), 1, &["MISSING  catch bind and listen", "seccomp", "--handoff fds"]);
    let dark = doctor(&["unshare", "--net", "--map-root-user"]);
    says(&dark, 1, &["MISSING  steer connections", "--listen"]);
}

/// As an ordinary user zddsup may not install a filter for programs that could gain privileges.
#[test]
fn an_ordinary_user_upgrades_too() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("not checked: only root can become another user");
    }
    let site = Site::new();
    site.write("script", "--version 1");
    let directory = site.dir.path();
    std::os::unix::fs::chown(directory, Some(65534), Some(65534)).unwrap();
    let (puppet, address) = (puppet(), site.address.to_string());
    let words = ["--", &puppet, "--bind", &address, "--script", "script"];
    let supervisor = Setup::within(site.dir.clone(), words).through(&NOBODY).start();
    assert!(supervisor.log().contains("cannot gain privileges"), "{}", supervisor.log());
    assert!(request(site.address, "/inherited").contains("NoNewPrivs 1\n"));
    let loads = [Load::start(site.load()), Load::start(site.load().keep_alive())];
    for number in 2..=6 {
        supervisor.signal(Signal::SIGHUP);
        supervisor
            .wait_until("the next one serves", |status| status.serving.is_some_and(|serving| serving.0 == number));
        assert!(loads.iter().all(|load| load.more(20, PATIENCE)));
    }
    loads.into_iter().for_each(|load| load.stop().assert_clean());
}

#[test]
fn where_calls_cannot_be_understood_auto_goes_without_and_adopt_is_an_error() {
    for (call, says) in [("pidfd_getfd", "cannot look into"), ("seccomp", "cannot catch bind(2)")] {
        let site = Site::new();
        let (address, port) = (site.address.to_string(), site.address.port().to_string());
        let command = ["--", "/usr/bin/python3", "-m", "http.server", "--bind", "127.0.0.1", &port];
        let adopt = [&["--handoff", "adopt"], &command[..]].concat();
        let mut strict = Setup::within(site.dir.clone(), adopt).through(&forbid(call)).spawn();
        assert_eq!(strict.wait().code(), Some(10), "{}", strict.log());
        assert!(strict.log().contains(says), "{}", strict.log());
        assert!(std::net::TcpStream::connect(site.address).is_err(), "{address} is served by what is left");

        let lenient = Setup::within(site.dir.clone(), command).through(&forbid(call)).start();
        assert!(lenient.log().contains("cannot be upgraded without a gap here"), "{}", lenient.log());
        wait_for("it serves", || try_request(site.address, "/").is_ok());
        // The next one finds its address taken, and the old one serves on.
        let load = Load::start(site.load());
        assert!(load.more(20, PATIENCE));
        assert_eq!(lenient.cli(&["upgrade"]).status.code(), Some(3), "{}", lenient.log());
        assert!(load.more(20, PATIENCE));
        load.stop().assert_clean();
    }
}

/// As Podman's profile has it: memory is read by /proc/PID/mem then.
#[test]
fn where_process_vm_readv_is_forbidden_nothing_is_missing() {
    says(&doctor(&forbid("process_vm_readv")), 0, &["ok       catch bind and listen"]);
    let site = Site::new();
    let (puppet, address) = (puppet(), site.address.to_string());
    let command = ["--handoff", "adopt", "--", &puppet, "--bind", &address, "--version", "1"];
    let supervisor = Setup::within(site.dir.clone(), command).through(&forbid("process_vm_readv")).start();
    let load = Load::start(site.load());
    assert!(load.more(20, PATIENCE), "{}\n{}", load.so_far(), supervisor.log());
    for _ in 0..2 {
        supervisor.upgrade();
        assert!(load.more(20, PATIENCE));
    }
    load.stop().assert_clean();
}

/// The kernel allows one such filter in a process' ancestry.
#[test]
fn a_zddsup_under_another_one_says_why_it_cannot() {
    let site = Site::new();
    let (puppet, address) = (puppet(), site.address.to_string());
    let inner = [ZDDSUP, "run", "--name", "inner", "--", &puppet, "--bind", &address];
    let supervisor = Setup::within(site.dir.clone(), [&["--ready", "delay:10ms", "--"], &inner[..]].concat()).start();
    let log = supervisor.wait_for_log("cannot be upgraded without a gap here");
    assert!(log.contains("under such a filter already"), "{log}");
    wait_for("the inner one serves", || try_request(site.address, "/").is_ok());
}

/// A server that is given its listening socket, as one that makes it by `io_uring`: no call is caught.
#[test]
fn a_listener_that_was_not_seen_is_told_of() {
    const SERVER: &str = "
import os, socket, sys
given = socket.socket(socket.AF_UNIX)
given.connect(sys.argv[1])
_, fds, _, _ = socket.recv_fds(given, 1, 1)
listener = socket.socket(fileno=fds[0])
ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
ready.sendto(b'READY=1', os.environ['NOTIFY_SOCKET'].replace('@', chr(0)))
while True:
    connection, _ = listener.accept()
    connection.recv(4096)
    connection.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 5\\r\\nConnection: close\\r\\n\\r\\ngiven')
    connection.close()
";
    let site = Site::new();
    let giver = UnixListener::bind(site.path("giver")).unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let listener = OwnedFd::from(listener);
    let words = ["--ready", "notify", "--", "/usr/bin/python3", "-c", SERVER, "giver"];
    let supervisor = Setup::within(site.dir.clone(), words).spawn();
    let (taker, _) = giver.accept().unwrap();
    let fds = [std::os::fd::AsRawFd::as_raw_fd(&listener)];
    let bytes = [std::io::IoSlice::new(b"x")];
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(std::os::fd::AsRawFd::as_raw_fd(&taker), &bytes, &rights, MsgFlags::empty(), None).unwrap();
    supervisor.wait_until("it serves", |status| status.serving.is_some());
    let log = supervisor.wait_for_log("did not see how");
    assert!(log.contains(&format!("listens on {address}")), "{log}");
}

/// As Go does from 1.24 on: Multipath TCP, and TCP where there is none.
#[test]
fn one_that_prefers_multipath_tcp_is_upgraded() {
    const SERVER: &str = "
import http.server, socket, sys
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 1024
    def __init__(self, *args):
        super().__init__(*args, bind_and_activate=False)
        self.socket.close()
        try:
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
        except OSError as error:
            assert error.errno == 93, error
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.server_bind()
        self.server_activate()
http.server.SimpleHTTPRequestHandler.protocol_version = 'HTTP/1.1'
Server(('127.0.0.1', int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
";
    let site = Site::new();
    let supervisor = site.start(&["--max-draining", "10", "--", "/usr/bin/python3", "-c", SERVER, "PORT"]);
    upgrade_under_load(&supervisor, &site.load());
}
