//! Promise 7: program, directory, environment file and the program's own files are resolved anew for each generation.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;

use crate::common::request;
use crate::common::{puppet, Setup, PATIENCE};
use crate::stage::Stage;

/// A release directory with a server whose version is its name.
fn release(dir: &Path, name: &str) {
    let release = dir.join(name);
    std::fs::create_dir_all(&release).unwrap();
    let script = format!("#!/bin/sh\nexec {} --version {name}\n", puppet());
    std::fs::write(release.join("server"), script).unwrap();
    std::fs::set_permissions(release.join("server"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
}

fn point(dir: &Path, at: &str) {
    let beside = dir.join("current.new");
    symlink(at, &beside).unwrap();
    std::fs::rename(beside, dir.join("current")).unwrap();
}

#[test]
fn a_symlink_is_followed_anew() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    release(dir.path(), "a");
    release(dir.path(), "b");
    point(dir.path(), "a");
    let program = dir.path().join("current/server").display().to_string();
    let supervisor = Setup::within(Arc::clone(&dir), ["--listen", "127.0.0.1:0", "--", &program]).start();
    assert!(request(supervisor.address(), "/").contains("version=a "));
    point(dir.path(), "b");
    supervisor.upgrade();
    supervisor.wait_settled();
    assert!(request(supervisor.address(), "/").contains("version=b "));
    assert!(supervisor.serving().program.path.ends_with("b/server"));
}

#[test]
fn the_directory_that_it_was_started_in_may_be_deleted_and_made_again() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    release(dir.path(), "one");
    release(dir.path(), "two");
    point(dir.path(), "one");
    let mut setup = Setup::within(Arc::clone(&dir), ["--listen", "127.0.0.1:0", "--", "./server"]);
    let here = dir.path().join("current");
    setup.command().current_dir(&here).env("PWD", &here);
    let supervisor = setup.start();
    assert!(request(supervisor.address(), "/").contains("version=one "));
    point(dir.path(), "two");
    std::fs::remove_dir_all(dir.path().join("one")).unwrap();
    supervisor.upgrade();
    supervisor.wait_settled();
    assert!(request(supervisor.address(), "/").contains("version=two "));
}

#[test]
fn the_path_of_an_environment_file_counts() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    release(dir.path(), "x");
    release(dir.path(), "y");
    let file = dir.path().join("env");
    let set = |name: &str| {
        let path = dir.path().join(name);
        std::fs::write(&file, format!("PATH={}:/usr/bin:/bin\nONLY_{name}=1\n", path.display())).unwrap();
    };
    set("x");
    let file_name = file.display().to_string();
    let args = ["--listen", "127.0.0.1:0", "--env-file", &file_name, "--", "server"];
    let supervisor = Setup::within(Arc::clone(&dir), args).start();
    assert!(request(supervisor.address(), "/").contains("version=x "));
    set("y");
    supervisor.upgrade();
    supervisor.wait_settled();
    assert!(request(supervisor.address(), "/").contains("version=y "));
    let env = request(supervisor.address(), "/env");
    // What was removed from the file is gone.
    assert!(env.contains("ONLY_y=1") && !env.contains("ONLY_x"), "{env}");
}

#[test]
fn the_programs_own_file_is_read_by_the_new_generation() {
    let stage = Stage::start(&[], "--version 1");
    stage.next("--version 2");
    stage.upgrade();
    let load = stage.load();
    assert!(load.saw("2", PATIENCE));
    load.stop().assert_clean();
}
