//! Signals to zddsup, in every phase, as PID 1, and with a terminal.

use std::io::{Read, Write};
use std::net::TcpStream;

use nix::sys::signal::Signal;
use zddsup::control::types::ServicePhase;

use crate::common::PATIENCE;
use crate::stage::Stage;

#[test]
fn term_drains_and_the_listener_stays_open_until_the_end() {
    let mut stage = Stage::start(&[], "--version 1 --drain-ms 800");
    let address = stage.address();
    let load = stage.keep_alive_load();
    stage.signal(Signal::SIGTERM);
    stage.wait_until("it stops", |status| status.phase == ServicePhase::Stopping);
    // Nobody accepts any more, and nobody is refused: the connection waits in the queue.
    let late = TcpStream::connect(address);
    assert!(late.is_ok(), "{late:?}");
    assert!(stage.supervisor.wait().success());
    assert!(TcpStream::connect(address).is_err());
    drop(load);
}

#[test]
fn a_lame_duck_serves_on_first() {
    let mut stage = Stage::start(&["--lame-duck", "700ms"], "--version 1");
    let load = stage.load();
    let begin = std::time::Instant::now();
    stage.signal(Signal::SIGTERM);
    stage.wait_until("it is a lame duck", |status| status.phase == ServicePhase::LameDuck);
    assert!(load.more(20, PATIENCE));
    let so_far = load.so_far();
    assert_eq!(so_far.failed(), 0, "{so_far}");
    assert!(stage.supervisor.wait().success());
    assert!(begin.elapsed().as_millis() >= 700);
}

#[test]
fn a_second_term_and_quit_are_quick() {
    for signals in [&[Signal::SIGTERM, Signal::SIGTERM][..], &[Signal::SIGINT, Signal::SIGQUIT], &[Signal::SIGQUIT]] {
        let mut stage = Stage::start(&["--stop-timeout", "200ms"], "--version 1 --ignore-term");
        for &signal in signals {
            stage.signal(signal);
            stage.wait_for_log("stopping");
        }
        assert!(stage.supervisor.wait().success(), "{signals:?}\n{}", stage.log());
    }
}

#[test]
fn usr1_prints_the_status() {
    let stage = Stage::start(&[], "--version 1");
    stage.signal(Signal::SIGUSR1);
    stage.wait_for_log("generation 1 serves");
}

#[test]
fn winch_is_passed_on() {
    let stage = Stage::start(&[], "--version 1");
    stage.signal(Signal::SIGWINCH);
    crate::common::wait_for("the service got it", || {
        crate::common::request(stage.address(), "/signals").contains("SIGWINCH")
    });
}

/// TERM in every phase of an upgrade ends everything, and quickly: nothing hangs.
#[test]
fn term_in_every_phase() {
    for (flags, next, until) in [
        (&[][..], "--version 2 --ready none", ServicePhase::Upgrading),
        (&["--bake", "60s"], "--version 2", ServicePhase::Baking),
        (&["--restart-limit", "100/60s"], "--exit-before-ready 1", ServicePhase::Restarting),
    ] {
        let flags: Vec<_> = flags.iter().copied().chain(["--ready", "notify"]).collect();
        let mut stage = Stage::start(&flags, "--version 1");
        stage.next(next);
        if until == ServicePhase::Restarting {
            let pid = nix::unistd::Pid::from_raw(stage.serving().pid.unwrap());
            nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
        } else {
            stage.signal(Signal::SIGHUP);
        }
        stage.wait_until("the phase has come", |status| status.phase == until);
        stage.signal(Signal::SIGTERM);
        assert!(stage.supervisor.wait().success(), "{until:?}\n{}", stage.log());
    }
    // While the first version starts.
    let mut stage = Stage::spawn(&["--ready", "notify"], "--version 1 --ready none");
    stage.wait_until("it starts", |status| status.generations.iter().any(|generation| generation.pid.is_some()));
    stage.signal(Signal::SIGTERM);
    assert!(stage.supervisor.wait().success(), "{}", stage.log());
}

#[test]
fn hangup_in_every_phase() {
    // In the bake of the one before.
    let stage = Stage::start(&["--bake", "500ms"], "--version 1");
    stage.next("--version 2");
    stage.signal(Signal::SIGHUP);
    stage.wait_until("it bakes", |status| status.phase == ServicePhase::Baking);
    stage.next("--version 3");
    stage.signal(Signal::SIGHUP);
    stage.wait_until("the third serves", |status| status.serving.is_some_and(|serving| serving.0 == 3));
    // While stopping it is refused, and said so.
    let mut stage = Stage::start(&[], "--version 1 --drain-ms 500");
    stage.signal(Signal::SIGTERM);
    stage.wait_until("it stops", |status| status.phase == ServicePhase::Stopping);
    stage.signal(Signal::SIGHUP);
    stage.wait_for_log("refused");
    assert!(stage.supervisor.wait().success());
}

/// A shell in a terminal starts it; then the terminal is closed: that is no deploy.
#[test]
fn a_closed_terminal_does_not_deploy() {
    use nix::pty::openpty;
    let pty = openpty(None, None).unwrap();
    // The terminal is closed only when nobody has this end any more.
    nix::fcntl::fcntl(&pty.master, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    // It leads no group, so that setsid(1) has no need to fork.
    let mut command = std::process::Command::new("setsid");
    command
        .args(["--ctty", crate::common::ZDDSUP, "run", "--name", "web", "--listen", "127.0.0.1:0", "--"])
        .arg(crate::common::puppet())
        .env("XDG_RUNTIME_DIR", dir.path())
        .stdin(pty.slave.try_clone().unwrap())
        .stdout(pty.slave.try_clone().unwrap())
        .stderr(pty.slave);
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut terminal = std::fs::File::from(pty.master);
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    while !String::from_utf8_lossy(&seen).contains("serves") {
        let read = terminal.read(&mut buffer).unwrap();
        seen.extend(&buffer[..read]);
    }
    terminal.flush().unwrap();
    drop(terminal);
    assert!(child.wait().unwrap().success());
    assert_eq!(crate::common::processes_with(&format!("XDG_RUNTIME_DIR={}\0", dir.path().display())), [0; 0]);
    assert!(!String::from_utf8_lossy(&seen).contains("generation=2"));
}

/// Ctrl-C once: the whole foreground group gets SIGINT, and the service drains.
#[test]
fn interrupt_from_a_terminal_drains() {
    let mut stage = Stage::start(&[], "--version 1");
    stage.signal(Signal::SIGINT);
    assert!(stage.supervisor.wait().success());
    assert!(!stage.log().contains("SIGKILL"), "{}", stage.log());
}

#[test]
fn as_pid_1_it_reaps_and_stops() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: a PID namespace needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut command = std::process::Command::new("unshare");
    command
        .args(["--pid", "--fork", "--kill-child", "--mount-proc", crate::common::ZDDSUP, "run", "--name", "web"])
        .args(["--listen", "127.0.0.1:0", "--"])
        .arg(crate::common::puppet())
        .args(["--spawn-grandchild"])
        .env("XDG_RUNTIME_DIR", dir.path())
        .stderr(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    let control = dir.path().join("zddsup/web.sock");
    let status = |args: &[&str]| {
        let mut command = std::process::Command::new(crate::common::ZDDSUP);
        command.args(args).arg("--control").arg(&control).output().unwrap()
    };
    crate::common::wait_for("it serves", || status(&["status", "--ready"]).status.success());
    assert!(status(&["upgrade", "--wait"]).status.success());
    // The first generation's grandchild, a daemon of its own session, went with it.
    let printed = String::from_utf8(status(&["status", "--json"]).stdout).unwrap();
    let parsed: zddsup::control::types::Status = serde_json::from_str(&printed).unwrap();
    assert_eq!(parsed.supervisor.pid, 1);
    assert!(status(&["stop"]).status.success());
    assert!(child.wait().unwrap().success());
}
