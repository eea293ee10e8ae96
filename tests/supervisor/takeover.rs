//! zddsup itself is killed with SIGKILL: its generation serves on, and the next `zddsup run` of that name takes over.

use std::sync::Arc;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::common::load::{Config, Load, Target};
use crate::common::request;
use crate::common::{processes_with, puppet, Setup, PATIENCE};

fn setup(dir: &Arc<tempfile::TempDir>, address: &str, version: &str) -> Setup {
    let puppet = puppet();
    Setup::within(Arc::clone(dir), ["--listen", address, "--ready", "notify", "--", &puppet, "--version", version])
}

#[test]
fn the_next_one_of_the_name_goes_on_without_a_refused_connection() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let first = setup(&dir, "127.0.0.1:0", "1").start();
    let address = first.address();
    let old = first.serving();
    let loads =
        [Load::start(Config::new(Target::Tcp(address))), Load::start(Config::new(Target::Tcp(address)).keep_alive())];
    for load in &loads {
        assert!(load.more(20, PATIENCE));
    }
    first.kill_alone();
    // It serves on.
    for load in &loads {
        assert!(load.more(20, PATIENCE));
    }
    let second = setup(&dir, &address.to_string(), "2").start();
    for load in &loads {
        assert!(load.saw("2", PATIENCE), "{}\n{}", load.so_far(), second.log());
    }
    for load in loads {
        load.stop().assert_clean();
    }
    let status = second.wait_settled();
    assert_eq!(status.serving.unwrap().0, old.number.0 + 1);
    assert!(!processes_with("ZDDSUP_GENERATION=1\0").contains(&old.pid.unwrap()), "the old process is still there");
    // The former program can still be gone back to.
    assert!(second.cli(&["rollback"]).status.success(), "{}", second.log());
    // Until it has stopped accepting, version 2 may still take a connection from the shared queue.
    second.wait_settled();
    assert!(request(address, "/").contains("version=1 "));
}

#[test]
fn what_was_draining_is_drained_and_what_was_starting_is_ended() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let script = dir.path().join("script");
    std::fs::write(&script, "--version 1\n--drain-ms 60000\n").unwrap();
    let (puppet, path) = (puppet(), script.display().to_string());
    let args = ["--listen", "127.0.0.1:0", "--ready", "notify", "--", &puppet, "--script", &path];
    let first = Setup::within(Arc::clone(&dir), args).start();
    let address = first.address().to_string();
    std::fs::write(&script, "--version 2\n").unwrap();
    first.upgrade();
    std::fs::write(&script, "--version 3\n--ready none\n").unwrap();
    first.signal(Signal::SIGHUP);
    first.wait_until("a third one starts", |status| {
        status.generations.iter().any(|g| g.number.0 == 3 && g.pid.is_some())
    });
    first.kill_alone();
    std::fs::write(&script, "--version 4\n").unwrap();
    let args =
        ["--listen", &address, "--drain-timeout", "300ms", "--stop-timeout", "300ms", "--", &puppet, "--script", &path];
    let second = Setup::within(Arc::clone(&dir), args).start();
    second.wait_until("the fourth serves alone", |status| status.serving.is_some_and(|serving| serving.0 == 4));
    second.wait_settled();
    let marked = format!("XDG_RUNTIME_DIR={}", dir.path().display());
    crate::common::wait_for("only the supervisor and its generation are left", || processes_with(&marked).len() == 2);
}

#[test]
fn an_orphan_that_died_too_leaves_nothing_behind() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let first = setup(&dir, "127.0.0.1:0", "1").start();
    let address = first.address().to_string();
    let pid = Pid::from_raw(first.serving().pid.unwrap());
    first.kill_alone();
    kill(pid, Signal::SIGKILL).unwrap();
    let second = setup(&dir, &address, "2").start();
    assert!(request(second.address(), "/").contains("version=2 "));
}

#[test]
fn a_name_that_is_taken_is_refused() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let first = setup(&dir, "127.0.0.1:0", "1").start();
    let mut second = setup(&dir, "127.0.0.1:0", "2").spawn();
    assert_eq!(second.wait().code(), Some(1));
    assert!(second.log().contains("supervised already"), "{}", second.log());
    assert!(request(first.address(), "/").contains("version=1 "));
}
