//! What happens when a service ends by itself, and `zddsup restart`.

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use zddsup::control::types::UpgradeKind;

use crate::common::PATIENCE;
use crate::common::{request, try_request};
use crate::stage::{clean, Stage};

#[test]
fn the_newest_version_that_became_ready_is_started_again() {
    let stage = Stage::start(&[], "--version 1");
    let before = stage.serving();
    stage.next("--version 2 --exit-before-ready 1");
    assert_eq!(stage.cli(&["upgrade"]).status.code(), Some(3));
    stage.next("--version 1");
    kill(Pid::from_raw(before.pid.unwrap()), Signal::SIGKILL).unwrap();
    stage.wait_until("it is back", |status| status.serving.is_some_and(|serving| serving > before.number));
    assert!(request(stage.address(), "/").contains("version=1 "));
}

#[test]
fn past_the_limit_it_says_so_and_exits() {
    let mut stage = Stage::start(&["--restart-limit", "3/60s"], "--version 1");
    stage.next("--version 2 --exit-before-ready 5");
    kill(Pid::from_raw(stage.serving().pid.unwrap()), Signal::SIGKILL).unwrap();
    assert_eq!(stage.supervisor.wait().code(), Some(11));
    assert!(stage.log().contains("restart limit"), "{}", stage.log());
}

#[test]
fn a_first_version_that_never_becomes_ready_ends_it() {
    let mut stage = Stage::spawn(&[], "--version 1 --exit-before-ready 5");
    assert_eq!(stage.supervisor.wait().code(), Some(10));
    assert!(stage.log().contains("exited with status 5 before it was ready"), "{}", stage.log());
}

#[test]
fn the_policies_give_the_services_own_status() {
    for (policy, path, code) in
        [("never", "/exit?code=0", 0), ("never", "/exit?code=9", 9), ("on-failure", "/exit?code=0", 0)]
    {
        let mut stage = Stage::start(&["--restart", policy], "--version 1");
        let _gone_before_its_answer = try_request(stage.address(), path);
        assert_eq!(stage.supervisor.wait().code(), Some(code), "{policy} {path}");
    }
    let stage = Stage::start(&["--restart", "on-failure"], "--version 1");
    let _gone_before_its_answer = try_request(stage.address(), "/exit?code=9");
    stage.wait_until("it is back", |status| status.serving.is_some_and(|serving| serving.0 == 2));
    let mut stage = Stage::start(&["--restart", "never"], "--version 1");
    kill(Pid::from_raw(stage.serving().pid.unwrap()), Signal::SIGKILL).unwrap();
    assert_eq!(stage.supervisor.wait().code(), Some(128 + 9));
}

#[test]
fn restart_is_a_fresh_process_of_the_same_version() {
    let stage = Stage::start(&[], "--version 1");
    let loads = [stage.load(), stage.keep_alive_load()];
    let before = stage.serving();
    let output = stage.cli(&["restart"]);
    assert!(output.status.success(), "{output:?}");
    for load in &loads {
        assert!(load.more(20, PATIENCE));
    }
    clean(loads);
    let status = stage.wait_settled();
    assert_ne!(stage.serving().pid, before.pid);
    assert_eq!(status.upgrades[0].kind, UpgradeKind::Restart);
}

#[test]
fn the_old_process_dies_while_the_new_one_starts() {
    let stage = Stage::start(&[], "--version 1");
    stage.next("--version 2 --ready delay-ms=700");
    let old = stage.serving();
    let mut upgrade = stage.cli_command(&["upgrade"]).spawn().unwrap();
    stage.wait_until("a candidate starts", |status| status.upgrades[0].to.is_some_and(|to| to.0 == 2));
    kill(Pid::from_raw(old.pid.unwrap()), Signal::SIGKILL).unwrap();
    // Connections wait in the queue until the candidate is ready: no third process is started.
    assert!(upgrade.wait().unwrap().success());
    assert!(request(stage.address(), "/").contains("version=2 "));
    assert_eq!(stage.status().serving.unwrap().0, 2);
}

#[test]
fn the_new_one_dies_while_two_drain() {
    let stage = Stage::start(&[], "--version 1 --drain-ms 4000");
    stage.next("--version 2 --drain-ms 4000");
    stage.upgrade();
    stage.next("--version 3");
    stage.upgrade();
    kill(Pid::from_raw(stage.serving().pid.unwrap()), Signal::SIGKILL).unwrap();
    stage.wait_until("it is back", |status| status.serving.is_some_and(|serving| serving.0 == 4));
    assert!(request(stage.address(), "/").contains("version=3 "));
    stage.wait_settled();
}

#[test]
fn a_missed_watchdog_counts_as_a_loss() {
    let stage = Stage::start(&["--watchdog", "500ms"], "--version 1 --watchdog-then-hang");
    stage.next("--version 2 --watchdog");
    stage.wait_until("another one serves", |status| status.serving.is_some_and(|serving| serving.0 >= 2));
    assert!(stage.log().contains("watchdog"), "{}", stage.log());
}
