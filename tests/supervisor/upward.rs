//! What a supervisor above this one hears: a `NOTIFY_SOCKET` of the test's own.

use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;

use nix::sys::signal::Signal;
use zddsup::sys::scm;

use crate::common::{puppet, wait_for, Setup, Supervisor, PATIENCE};

/// The one above, and a supervised puppet that does what its script says.
struct Above {
    socket: UnixDatagram,
    supervisor: Supervisor,
    script: std::path::PathBuf,
}

impl Above {
    /// As systemd starts it, `env` besides.
    fn start(script: &str, flags: &[&str], env: &[(&str, &str)]) -> Above {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let place = dir.path().join("above");
        let socket = UnixDatagram::bind(&place).unwrap();
        Above::start_at(socket, &place.display().to_string(), dir, script, flags, env)
    }

    fn start_at(
        socket: UnixDatagram,
        place: &str,
        dir: Arc<tempfile::TempDir>,
        script: &str,
        flags: &[&str],
        env: &[(&str, &str)],
    ) -> Above {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let file = dir.path().join("script");
        std::fs::write(&file, script).unwrap();
        let (puppet, path) = (puppet(), file.display().to_string());
        let args = [&["--listen", "127.0.0.1:0"], flags, &["--", &puppet, "--script", &path]].concat();
        let mut setup = Setup::within(dir, args);
        setup.command().env("NOTIFY_SOCKET", place).envs(env.iter().copied());
        Above { socket, supervisor: setup.spawn(), script: file }
    }

    /// The next message.
    fn next(&mut self) -> String {
        let mut buffer = [0; 8192];
        let length =
            self.socket.recv(&mut buffer).unwrap_or_else(|error| panic!("nothing: {error}\n{}", self.supervisor.log()));
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    /// The messages up to the one that begins like this, with it.
    fn until(&mut self, begin: &str) -> Vec<String> {
        let mut messages = Vec::new();
        loop {
            messages.push(self.next());
            if messages[messages.len() - 1].starts_with(begin) {
                return messages;
            }
        }
    }
}

/// Those that are not for people, nor signs of life.
fn states(messages: &[String]) -> Vec<&str> {
    let states = messages.iter().filter_map(|message| message.split('=').next());
    states.filter(|state| !["STATUS", "WATCHDOG", "EXTEND_TIMEOUT_USEC"].contains(state)).collect()
}

#[test]
fn ready_comes_when_the_first_generation_is_and_a_long_start_is_extended() {
    let mut above = Above::start("--version 1\n--ready delay-ms=700", &[], &[]);
    let messages = above.until("READY=1");
    assert_eq!(states(&messages), ["READY"]);
    assert_eq!(messages.last().unwrap(), &format!("READY=1\nMAINPID={}", above.supervisor.pid()));
    assert!(messages.iter().any(|message| message.starts_with("EXTEND_TIMEOUT_USEC=")), "{messages:?}");
    above.until("STATUS=generation 1 serves");
}

#[test]
fn an_upgrade_is_a_reload_and_ends_with_ready() {
    let mut above = Above::start("--version 1", &[], &[]);
    above.until("READY=1");
    std::fs::write(&above.script, "--version 2").unwrap();
    above.supervisor.signal(Signal::SIGHUP);
    let begin = above.until("RELOADING=1\nMONOTONIC_USEC=");
    assert!(begin.last().unwrap().contains("\nEXTEND_TIMEOUT_USEC="), "{begin:?}");
    let end = above.until("READY=1");
    // The process is told once: it stays the same.
    assert_eq!(end.last().unwrap(), "READY=1");
    assert_eq!(states(&end), ["READY"]);
    assert!(above.until("STATUS=generation 2 serves").iter().all(|message| !message.contains("failed")));
    assert_eq!(above.supervisor.status().serving.unwrap().0, 2);
}

#[test]
fn an_upgrade_that_failed_is_ready_again_with_the_reason() {
    let mut above = Above::start("--version 1", &[], &[]);
    above.until("READY=1");
    std::fs::write(&above.script, "--exit-before-ready 3").unwrap();
    let failed = above.supervisor.cli(&["upgrade"]);
    assert_eq!(failed.status.code(), Some(3), "{failed:?}");
    above.until("RELOADING=1");
    assert_eq!(states(&above.until("READY=1")), ["READY"]);
    let status = above.until("STATUS=generation 1 serves").pop().unwrap();
    assert!(status.contains("; upgrade 2 failed: generation 2 exited with status 3"), "{status}");
    // The next one that goes well takes it back.
    std::fs::write(&above.script, "--version 3").unwrap();
    above.supervisor.upgrade();
    let status = above.until("STATUS=generation 3 serves").pop().unwrap();
    assert!(!status.contains("failed"), "{status}");
}

#[test]
fn a_restart_after_a_crash_is_no_reload() {
    let mut above = Above::start("--version 1\n--exit-after-ms 300:1", &[], &[]);
    above.until("READY=1");
    std::fs::write(&above.script, "--version 2").unwrap();
    assert_eq!(states(&above.until("STATUS=generation 2 serves")), [""; 0]);
}

#[test]
fn stopping_is_told_and_a_long_drain_extended() {
    let mut above = Above::start("--version 1\n--drain-ms 300", &[], &[]);
    above.until("READY=1");
    above.supervisor.signal(Signal::SIGTERM);
    let stopping = above.until("STOPPING=1").pop().unwrap();
    assert!(stopping.contains("\nEXTEND_TIMEOUT_USEC="), "{stopping}");
    let end = above.until("BARRIER=1");
    assert_eq!(end[end.len() - 2..], ["STATUS=stopped", "BARRIER=1"]);
    assert!(above.supervisor.wait().success());
}

#[test]
fn the_end_waits_until_the_last_words_are_heard() {
    let mut above = Above::start("--version 1", &[], &[]);
    above.until("READY=1");
    above.supervisor.signal(Signal::SIGTERM);
    let barrier = loop {
        let mut buffer = [0; 8192];
        match scm::receive(above.socket.as_fd(), &mut buffer).unwrap() {
            Some(mut message) if message.len == 9 && buffer.starts_with(b"BARRIER=1") => break message.fds.pop(),
            Some(message) => assert_eq!(message.fds.len(), 0),
            None => std::thread::sleep(std::time::Duration::from_millis(5)),
        }
    };
    let barrier = barrier.expect("an fd that is to be closed");
    // Everything else is over by then.
    wait_for("its control socket is gone", || !above.supervisor.control().exists());
    let runs = || std::path::Path::new(&format!("/proc/{}/exe", above.supervisor.pid())).exists();
    assert!(runs());
    drop(barrier);
    assert!(above.supervisor.wait().success());
}

#[test]
fn one_above_that_hears_nothing_holds_up_the_end_for_a_while() {
    let mut above = Above::start("--version 1", &[], &[]);
    above.until("READY=1");
    above.supervisor.signal(Signal::SIGTERM);
    assert!(above.supervisor.wait().success());
    let end = above.until("BARRIER=1");
    assert!(end.contains(&"STATUS=stopped".to_owned()), "{end:?}");
}

#[test]
fn a_service_that_never_starts_says_why() {
    let mut above = Above::start("--exit-before-ready 3", &[], &[]);
    let end = above.until("BARRIER=1");
    let last = &end[end.len() - 2];
    assert!(last.starts_with("STATUS=the first version never became ready: generation 1 exited"), "{end:?}");
    assert_eq!(states(&end), ["STOPPING", "BARRIER"]);
}

/// It serves and upgrades as if nobody were to be told, and warns once.
fn nobody_hears(place: &str, why: &str) {
    let mut setup = Setup::new(["--listen", "127.0.0.1:0", "--", &puppet(), "--version", "1"]);
    setup.command().env("NOTIFY_SOCKET", place).env("WATCHDOG_USEC", "500000");
    let mut supervisor = setup.start();
    let log = supervisor.wait_for_log("NOTIFY_SOCKET=");
    assert!(log.contains(why), "{log}");
    supervisor.upgrade();
    assert!(crate::common::request(supervisor.address(), "/").contains("version=1 "));
    supervisor.signal(Signal::SIGTERM);
    assert!(supervisor.wait().success());
    assert_eq!(supervisor.log().matches("NOTIFY_SOCKET=").count(), 1, "{}", supervisor.log());
}

#[test]
fn an_address_that_is_none_is_told_once() {
    nobody_hears("run/notify", "none of /PATH, @NAME and vsock:CID:PORT");
    nobody_hears("vsock::9", "has to be vsock:CID:PORT");
}

#[test]
fn a_socket_that_nobody_has_is_told_once() {
    nobody_hears("/nowhere/notify", "No such file or directory");
    // Which error it is, is the kernel's to say.
    nobody_hears("vsock-stream:0:9", "NOTIFY_SOCKET=vsock-stream:0:9: ");
}

#[test]
fn the_loop_feeds_a_watchdog_that_is_its_own() {
    let mut above = Above::start("--version 1", &[], &[("WATCHDOG_USEC", "400000")]);
    let pid = above.supervisor.pid();
    for _ in 0..3 {
        above.until("WATCHDOG=1");
    }
    // One that does not turn its loop is silent.
    crate::common::freeze(nix::unistd::Pid::from_raw(pid));
    above.socket.set_nonblocking(true).unwrap();
    while above.socket.recv(&mut [0; 8192]).is_ok() {}
    above.socket.set_nonblocking(false).unwrap();
    above.socket.set_read_timeout(Some(std::time::Duration::from_millis(900))).unwrap();
    assert!(above.socket.recv(&mut [0; 8192]).is_err());
    above.supervisor.signal(Signal::SIGCONT);
    above.socket.set_read_timeout(Some(PATIENCE)).unwrap();
    above.until("WATCHDOG=1");
}

#[test]
fn a_watchdog_of_another_process_is_left_alone() {
    let env = [("WATCHDOG_USEC", "20000"), ("WATCHDOG_PID", "1")];
    let mut above = Above::start("--version 1\n--ready delay-ms=300", &[], &env);
    let messages = above.until("READY=1");
    assert!(!messages.iter().any(|message| message.starts_with("WATCHDOG")), "{messages:?}");
}

#[test]
fn an_abstract_socket_is_reached() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let name = format!("zddsup-above-{}", dir.path().display());
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let mut above = Above::start_at(socket, &format!("@{name}"), dir, "--version 1", &[], &[]);
    above.until("READY=1");
}
