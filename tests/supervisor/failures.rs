//! Promise 4: a new version that fails in any way changes nothing, and the reason reaches whoever asked.

use std::os::unix::fs::PermissionsExt;
use std::process::Output;
use std::sync::Arc;

use nix::sys::signal::Signal;
use zddsup::control::types::UpgradeResult;

use crate::common::load::{Config, Load, Target};
use crate::common::{puppet, Setup, Supervisor, PATIENCE};
use crate::stage::{clean, Stage};

const FAILED: Option<i32> = Some(3);

/// An upgrade under load that must fail with all of this in what it prints.
#[track_caller]
fn fails(stage: &Stage, words: &[&str]) -> Output {
    let loads = [stage.load(), stage.keep_alive_load()];
    let before = stage.serving();
    let output = stage.cli(&["upgrade"]);
    let printed = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), FAILED, "{printed}");
    for word in words {
        assert!(printed.contains(word), "{word:?} is not in: {printed}");
    }
    assert!(printed.contains("never stopped"), "{printed}");
    let after = stage.serving();
    assert_eq!((before.number, before.pid), (after.number, after.pid));
    for load in &loads {
        assert!(load.more(20, PATIENCE));
    }
    clean(loads);
    stage.wait_settled();
    output
}

#[test]
fn exits_at_once() {
    let stage = Stage::start(&[], "--version 1");
    stage.next("--version 2 --stderr the-last-words --exit-before-ready 7");
    fails(&stage, &["exited with status 7", "the-last-words"]);
    let report = stage.wait_for_report("it failed", |report| report.result == Some(UpgradeResult::Failed));
    assert!(report.old_kept_serving);
    assert!(report.stderr.iter().any(|line| line.contains("the-last-words")), "{report:?}");
    stage.next("--version 3");
    stage.upgrade();
}

#[test]
fn crashes() {
    let stage = Stage::start(&[], "--version 1");
    stage.next("--version 2 --crash-before-ready");
    fails(&stage, &["was killed by SIG"]);
}

#[test]
fn is_never_ready() {
    let stage = Stage::start(&["--ready", "notify", "--start-timeout", "500ms"], "--version 1");
    stage.next("--version 2 --ready none");
    fails(&stage, &["not ready within 500ms"]);
}

#[test]
fn dies_in_the_bake() {
    let stage = Stage::start(&["--bake", "30s"], "--version 1");
    stage.next("--version 2 --exit-after-ms 300:9");
    let before = stage.serving();
    let load = stage.load();
    let output = stage.cli(&["upgrade"]);
    let printed = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), FAILED, "{printed}");
    assert!(printed.contains("exited with status 9 in its bake"), "{printed}");
    assert_eq!(stage.serving().number, before.number);
    assert!(load.more(20, PATIENCE));
    // What the dead version had accepted died with it; nobody was refused.
    let summary = load.stop();
    assert!(!summary.failures.contains_key(&crate::common::load::Failure::Refused), "{summary}");
}

#[test]
fn dies_while_the_old_one_drains() {
    let stage = Stage::start(&[], "--version 1 --drain-ms 3000");
    stage.next("--version 2");
    stage.upgrade();
    let second = stage.serving();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(second.pid.unwrap()), Signal::SIGKILL).unwrap();
    let status =
        stage.wait_until("it is started again", |status| status.serving.is_some_and(|serving| serving > second.number));
    assert_eq!(status.restarts, 1);
    stage.wait_settled();
}

/// A supervisor around a program file that the test replaces.
struct Program {
    supervisor: Supervisor,
    path: std::path::PathBuf,
}

impl Program {
    fn start() -> Program {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let path = dir.path().join("server");
        std::fs::copy(puppet(), &path).unwrap();
        let program = path.display().to_string();
        let setup = Setup::within(dir, ["--listen", "127.0.0.1:0", "--", &program]);
        Program { supervisor: setup.start(), path }
    }

    #[track_caller]
    fn cannot_be_replaced_by(&self, words: &[&str]) {
        let load = Load::start(Config::new(Target::Tcp(self.supervisor.address())));
        assert!(load.more(20, PATIENCE));
        let before = self.supervisor.serving();
        let output = self.supervisor.cli(&["upgrade"]);
        let printed = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), FAILED, "{printed}");
        for word in words {
            assert!(printed.contains(word), "{word:?} is not in: {printed}");
        }
        assert_eq!(self.supervisor.serving().pid, before.pid);
        load.stop().assert_clean();
    }

    fn put(&self, content: &[u8], mode: u32) {
        let beside = self.path.with_extension("new");
        std::fs::write(&beside, content).unwrap();
        std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(mode)).unwrap();
        std::fs::rename(beside, &self.path).unwrap();
    }
}

#[test]
fn is_not_there() {
    let program = Program::start();
    std::fs::remove_file(&program.path).unwrap();
    program.cannot_be_replaced_by(&["there is no program", "server"]);
}

#[test]
fn is_not_executable() {
    let program = Program::start();
    program.put(b"#!/bin/sh\n", 0o644);
    program.cannot_be_replaced_by(&["is not executable", "chmod"]);
}

#[test]
fn is_being_written() {
    let program = Program::start();
    let beside = program.path.with_extension("new");
    std::fs::copy(puppet(), &beside).unwrap();
    std::fs::rename(beside, &program.path).unwrap();
    let _writer = std::fs::OpenOptions::new().write(true).open(&program.path).unwrap();
    program.cannot_be_replaced_by(&["open for writing", "rename"]);
}

#[test]
fn has_no_interpreter() {
    let program = Program::start();
    program.put(b"#!/no/such/interpreter\n", 0o755);
    program.cannot_be_replaced_by(&["/no/such/interpreter"]);
}

#[test]
fn is_no_program() {
    let program = Program::start();
    program.put(b"just text\n", 0o755);
    program.cannot_be_replaced_by(&["#!"]);
}
