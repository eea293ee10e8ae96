//! Promise 6: nothing is left behind.

use std::time::Instant;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use procfs::process::Process;

use crate::common::{processes_with, request, wait_for};
use crate::stage::{clean, Stage};

fn runtime_dir(stage: &Stage) -> String {
    format!("XDG_RUNTIME_DIR={}", stage.dir.path().display())
}

fn is_alive(pid: i32) -> bool {
    Process::new(pid).and_then(|process| process.stat()).is_ok_and(|stat| stat.state != 'Z')
}

fn open_fds(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn zombies_of(pid: i32) -> usize {
    let all = procfs::process::all_processes().unwrap().flatten();
    all.filter(|process| process.stat().is_ok_and(|stat| stat.ppid == pid && stat.state == 'Z')).count()
}

fn grandchild(stage: &Stage) -> i32 {
    let pid = request(stage.address(), "/grandchild").trim().parse().unwrap();
    assert!(is_alive(pid));
    pid
}

#[test]
fn a_grandchild_in_a_session_of_its_own_goes_with_its_generation() {
    for kind in ["--spawn-grandchild", "--spawn-stubborn-grandchild"] {
        let flags = ["--stop-timeout", "300ms", "--drain-timeout", "500ms"];
        let mut stage = Stage::start(&flags, &format!("--version 1 {kind}"));
        let first = grandchild(&stage);
        stage.next(&format!("--version 2 {kind}"));
        stage.upgrade();
        stage.wait_settled();
        assert!(!is_alive(first), "{kind}");
        let second = grandchild(&stage);
        stage.signal(Signal::SIGTERM);
        assert!(stage.supervisor.wait().success());
        assert!(!is_alive(second), "{kind}");
        assert_eq!(processes_with(&runtime_dir(&stage)), [0; 0], "{kind}");
    }
}

#[test]
fn workers_of_a_main_process_that_was_killed_are_swept() {
    let stage = Stage::start(&["--stop-timeout", "300ms"], "--version 1 --spawn-stubborn-grandchild");
    let orphan = grandchild(&stage);
    let before = stage.serving();
    kill(Pid::from_raw(before.pid.unwrap()), Signal::SIGKILL).unwrap();
    stage.wait_until("another one serves", |status| status.serving.is_some_and(|serving| serving > before.number));
    wait_for("the orphan is gone", || !is_alive(orphan));
    stage.wait_settled();
}

#[test]
fn a_drain_that_overruns_its_time_is_ended_as_a_group() {
    let flags = ["--drain-timeout", "300ms", "--stop-timeout", "300ms"];
    let stage = Stage::start(&flags, "--version 1 --ignore-term --spawn-stubborn-grandchild");
    let (old, grandchild) = (stage.serving().pid.unwrap(), grandchild(&stage));
    stage.next("--version 2");
    let begin = Instant::now();
    let output = stage.cli(&["upgrade", "--wait"]);
    assert!(output.status.success(), "{output:?}");
    assert!(begin.elapsed().as_millis() >= 600, "it had no time to drain");
    assert!(!is_alive(old) && !is_alive(grandchild));
    assert!(stage.log().contains("SIGKILL to all of its processes"), "{}", stage.log());
}

#[test]
fn after_many_upgrades_there_are_as_many_fds_and_no_zombie() {
    let stage = Stage::start(&["--max-draining", "5"], "--version 1");
    // The first ones make what is made once: threads, pools.
    for _ in 0..5 {
        stage.upgrade();
    }
    stage.wait_settled();
    let fds = open_fds(stage.pid());
    for _ in 0..200 {
        stage.upgrade();
    }
    stage.wait_settled();
    // Connections of the control socket that were just closed are let go a moment later.
    wait_for("its fds are as many as before", || open_fds(stage.pid()) <= fds);
    assert_eq!(zombies_of(stage.pid()), 0);
    assert_eq!(processes_with(&runtime_dir(&stage)).len(), 2, "the supervisor and the generation that serves");
    assert_eq!(stage.status().serving.unwrap().0, 206);
}

#[test]
fn one_that_ignores_everything_is_killed_and_nobody_notices() {
    let flags = ["--drain-timeout", "300ms", "--stop-timeout", "200ms"];
    let stage = Stage::start(&flags, "--version 1 --ignore-term");
    let load = stage.load();
    stage.next("--version 2");
    stage.upgrade();
    // Both accept from the shared queue until the old one is killed: what it had then is lost, and only that.
    stage.wait_settled();
    let before = load.so_far();
    assert!(load.more(50, crate::common::PATIENCE));
    let summary = load.stop();
    assert!(summary.failed() <= before.failed(), "{summary}");
    assert!(!summary.failures.contains_key(&crate::common::load::Failure::Refused), "{summary}");
}

#[test]
fn a_drain_has_its_numbers() {
    let stage = Stage::start(&[], "--version 1 --drain-ms 800");
    let loads = [stage.load(), stage.keep_alive_load()];
    stage.next("--version 2");
    let output = stage.cli(&["upgrade", "--wait"]);
    assert!(output.status.success(), "{output:?}");
    let report = stage.status().upgrades[0].clone();
    assert!(report.retired);
    let phases: Vec<_> = report.phases.iter().map(|time| time.phase.to_string()).collect();
    assert!(phases.iter().any(|phase| phase == "draining"), "{phases:?}");
    assert_eq!(report.connections_left, Some(0));
    clean(loads);
}
