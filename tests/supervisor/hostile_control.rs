//! What harm can be tried on the control socket, while the supervisor goes on with its work.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::common::PATIENCE;
use crate::stage::{clean, Stage};
use crate::watched::Rest;

/// Far less than what those who dawdle are given, and enough on a busy machine.
const SOON: Duration = Duration::from_secs(8);

/// A supervisor that serves and has fds, memory and answers to lose.
struct Victim {
    stage: Stage,
    rest: Rest,
}

impl Victim {
    fn start() -> Victim {
        let stage = Stage::start(&[], "--version 1");
        let rest = Rest::of(&stage);
        Victim { stage, rest }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.stage.control()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// What is answered to this, if anything is.
    fn send(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // It may be refused before its end.
        let _broken = stream.write_all(bytes);
        let _broken = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _broken = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// By a signal: the command follows the events, for which there may be no room.
    fn upgrade(&self) {
        let before = self.stage.status().serving;
        self.stage.signal(Signal::SIGHUP);
        self.stage.wait_until("the next one serves", |status| status.serving > before);
    }

    /// It answers within a reasonable time, upgrades, and has no more open than before.
    fn is_well(&self) {
        self.stage.answers_within(SOON);
        self.stage.upgrade();
        self.stage.wait_settled();
        self.rest.is_back();
        assert!(!self.stage.log().contains("panicked"));
    }
}

#[test]
fn garbage_and_requests_that_are_none() {
    let victim = Victim::start();
    let load = victim.stage.load();
    let noise: Vec<u8> = (0..1_000_000u32).map(|i| i.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    let huge = format!("GET /v1/status HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "y".repeat(4 << 20));
    let many = format!("GET /v1/status HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(10_000));
    let long = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(1 << 20));
    let body = format!("POST /v1/stop HTTP/1.1\r\nHost: x\r\nContent-Length: 1048576\r\n\r\n{}", "b".repeat(1 << 20));
    let requests: [&[u8]; 14] = [
        &noise,
        huge.as_bytes(),
        many.as_bytes(),
        long.as_bytes(),
        body.as_bytes(),
        b"",
        b"\r\n\r\n\r\n\r\n",
        b"POST /v1/stop HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
        b"POST /v1/stop HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /v1/stop HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/status HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v2/stop HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/stop/../upgrade HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/stop HTTP/1.1\r\nHost",
    ];
    for _ in 0..5 {
        for request in requests {
            let answer = victim.send(request);
            let shown = String::from_utf8_lossy(&request[..request.len().min(60)]);
            assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{shown}: {answer}");
        }
    }
    victim.is_well();
    load.stop().assert_clean();
}

#[test]
fn five_hundred_that_say_nothing_leave_room_for_one_that_does() {
    let victim = Victim::start();
    let loads = [victim.stage.load(), victim.stage.keep_alive_load()];
    // More than the listener's queue holds, and no patience to wait: in threads.
    let silent: Vec<_> = std::thread::scope(|scope| {
        let connect = |index: usize| {
            let victim = &victim;
            scope.spawn(move || {
                let mut stream = victim.connect();
                if index % 2 == 0 {
                    // Half a request says as little.
                    let _broken = stream.write_all(b"GET /v1/status HTTP/1.1\r\nHos");
                }
                stream
            })
        };
        let threads: Vec<_> = (0..500).map(connect).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let took = victim.stage.answers_within(SOON);
    println!("status in {took:?} with {} silent connections", silent.len());
    victim.stage.upgrade();
    for load in &loads {
        assert!(load.more(20, PATIENCE));
    }
    // Streams of events are not silent, and not endless in number.
    let followers: Vec<_> = (0..100)
        .map(|_| {
            let mut stream = victim.connect();
            let _broken = stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n");
            stream
        })
        .collect();
    victim.stage.answers_within(SOON);
    victim.upgrade();
    drop((silent, followers));
    victim.is_well();
    clean(loads);
}

#[test]
fn who_asks_for_all_and_reads_nothing() {
    let victim = Victim::start();
    let deaf: Vec<_> = (0..200)
        .map(|index| {
            let mut stream = victim.connect();
            let path = ["status", "metrics", "events"][index % 3];
            let _broken = stream.write_all(format!("GET /v1/{path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes());
            stream
        })
        .collect();
    // News that they do not hear, more than anybody should keep for them.
    for _ in 0..5 {
        victim.upgrade();
    }
    drop(deaf);
    victim.is_well();
}

#[test]
fn another_user_is_refused() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can be another user");
        return;
    }
    let victim = Victim::start();
    let socket = victim.stage.control();
    let ask = |mode: u32| {
        std::fs::set_permissions(&socket, PermissionsExt::from_mode(mode)).unwrap();
        let mut curl = Command::new("setpriv");
        curl.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "curl", "-sS", "-XPOST"]);
        curl.arg("--unix-socket").arg(&socket).arg("http://x/v1/stop").output()
    };
    // Even if somebody opens the way to it.
    for directory in [victim.stage.dir.path().to_owned(), socket.parent().unwrap().to_owned()] {
        std::fs::set_permissions(directory, PermissionsExt::from_mode(0o755)).unwrap();
    }
    match ask(0o600) {
        Err(error) => {
            eprintln!("skipped: setpriv: {error}");
            return;
        }
        Ok(output) if String::from_utf8_lossy(&output.stderr).contains("failed to execute curl") => {
            eprintln!("skipped: there is no curl");
            return;
        }
        Ok(output) => assert!(!output.status.success(), "{output:?}"),
    }
    let output = ask(0o666).unwrap();
    let answer = String::from_utf8_lossy(&output.stdout);
    assert!(answer.contains("user 65534"), "{output:?}");
    victim.is_well();
}
