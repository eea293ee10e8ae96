//! Back to the version before: a switch in the bake, afterwards its executable, which zddsup keeps open.

use std::sync::Arc;

use zddsup::control::types::{ServicePhase, UpgradeKind, UpgradeResult};

use crate::common::load::{Config, Load, Target};
use crate::common::request;
use crate::common::{puppet, Setup, PATIENCE};
use crate::stage::{clean, Stage};

#[test]
fn in_the_bake_the_old_one_is_back_at_once() {
    let stage = Stage::start(&["--bake", "60s"], "--version 1");
    let loads = [stage.load(), stage.keep_alive_load()];
    let first = stage.serving();
    stage.next("--version 2");
    let mut upgrade = stage.cli_command(&["upgrade"]).spawn().unwrap();
    stage.wait_until("it bakes", |status| status.phase == ServicePhase::Baking);
    let output = stage.cli(&["rollback"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(stage.serving().pid, first.pid);
    // Whoever asked for the upgrade hears that it did not last.
    assert!(!upgrade.wait().unwrap().success());
    for load in &loads {
        assert!(load.more(20, PATIENCE));
    }
    clean(loads);
    stage.wait_settled();
}

/// The executable was replaced by rename, and its file is gone: the held one runs.
#[test]
fn after_the_bake_the_former_program_runs_although_its_file_was_replaced() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let path = dir.path().join("server");
    std::fs::copy(puppet(), &path).unwrap();
    let env = dir.path().join("env");
    std::fs::write(&env, "RELEASE=1\n").unwrap();
    let (program, env_file) = (path.display().to_string(), env.display().to_string());
    let args = ["--listen", "127.0.0.1:0", "--env-file", &env_file, "--", &program, "--version", "same"];
    let supervisor = Setup::within(dir, args).start();
    let first = supervisor.wait_until("its digest is known", |status| status.generations[0].program.sha256.is_some());
    let beside = path.with_extension("new");
    // Another file with another digest: the same server and a byte more.
    let mut bytes = std::fs::read(puppet()).unwrap();
    bytes.push(b'\n');
    std::fs::write(&beside, bytes).unwrap();
    std::fs::set_permissions(&beside, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::rename(&beside, &path).unwrap();
    std::fs::write(&env, "RELEASE=2\n").unwrap();
    supervisor.upgrade();
    supervisor.wait_settled();
    assert!(request(supervisor.address(), "/env").contains("RELEASE=2"));
    let load = Load::start(Config::new(Target::Tcp(supervisor.address())));
    assert!(load.more(20, PATIENCE));
    let output = supervisor.cli(&["rollback"]);
    assert!(output.status.success(), "{output:?}\n{}", supervisor.log());
    assert!(load.more(20, PATIENCE));
    load.stop().assert_clean();
    supervisor.wait_settled();
    // The recorded environment with it.
    assert!(request(supervisor.address(), "/env").contains("RELEASE=1"));
    assert_eq!(supervisor.serving().program.sha256, first.generations[0].program.sha256);
    let report = supervisor.status().upgrades[0].clone();
    assert_eq!((report.kind, report.result), (UpgradeKind::Rollback, Some(UpgradeResult::Succeeded)));
    // A crash restarts what serves now, not what lies at the path.
    let serving = supervisor.serving();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(serving.pid.unwrap()), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    supervisor.wait_until("it was started again", |status| status.serving.is_some_and(|id| id > serving.number));
    assert!(request(supervisor.address(), "/env").contains("RELEASE=1"));
}

#[test]
fn with_nothing_before_it_is_refused() {
    let stage = Stage::start(&[], "--version 1");
    let output = stage.cli(&["rollback"]);
    assert_eq!(output.status.code(), Some(6), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("no version served before"), "{output:?}");
}

#[test]
fn a_scripts_file_that_is_gone_is_said() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let path = dir.path().join("server");
    let write = |version: &str| {
        std::fs::remove_file(&path).ok();
        std::fs::write(&path, format!("#!/bin/sh\nexec {} --version {version}\n", puppet())).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    };
    write("1");
    let program = path.display().to_string();
    let supervisor = Setup::within(Arc::clone(&dir), ["--listen", "127.0.0.1:0", "--", &program]).start();
    write("2");
    supervisor.upgrade();
    let output = supervisor.cli(&["rollback"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("script"), "{output:?}");
    supervisor.wait_settled();
    assert!(request(supervisor.address(), "/").contains("version=2 "));
}
