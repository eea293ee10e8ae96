//! The HTTP servers: five upgrades under both kinds of load, nothing fails.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use crate::common::load::{Config, Load, Target};
use crate::common::{example, Setup, Supervisor, PATIENCE};
use crate::{program, source};

/// A supervised server that answers with the `VERSION` of its environment.
struct Deployed {
    supervisor: Supervisor,
    env_file: std::path::PathBuf,
}

impl Deployed {
    fn start(flags: &[&str], command: &[&str]) -> Deployed {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let env_file = dir.path().join("env");
        write(&env_file, 1);
        let path = env_file.display().to_string();
        let mut args = vec!["--listen", "http=127.0.0.1:0", "--env-file", &path];
        args.extend(flags.iter().chain(&["--"]).chain(command));
        Deployed { supervisor: Setup::within(dir, args).start(), env_file }
    }

    fn upgrade(&self, version: u32) {
        write(&self.env_file, version);
        self.supervisor.upgrade();
    }

    fn begin(&self, config: impl FnOnce(Config) -> Config) -> Load {
        let load = Load::start(Config { workers: 2, ..config(Config::new(Target::Tcp(self.supervisor.address()))) });
        assert!(load.more(20, PATIENCE), "no answers: {}", load.so_far());
        load
    }
}

fn write(env_file: &Path, version: u32) {
    let beside = env_file.with_extension("new");
    std::fs::write(&beside, format!("VERSION={version}\n")).unwrap();
    std::fs::rename(beside, env_file).unwrap();
}

/// Every version answers, in order, on connections of both kinds; nothing fails, and nobody is left behind.
fn five_upgrades(flags: &[&str], command: &[&str]) {
    let server = Deployed::start(flags, command);
    let loads = [server.begin(|config| config), server.begin(Config::keep_alive)];
    for version in 2..=6 {
        server.upgrade(version);
        for load in &loads {
            assert!(load.saw(&version.to_string(), PATIENCE), "version {version} does not answer: {}", load.so_far());
            assert!(load.more(20, PATIENCE), "{}", load.so_far());
        }
    }
    for load in loads {
        let summary = load.stop();
        summary.assert_clean();
        assert_eq!(summary.order(), ["1", "2", "3", "4", "5", "6"], "{summary}");
    }
    let status = server.supervisor.wait_settled();
    assert_eq!(status.restarts, 0);
}

fn rust(name: &str) -> String {
    example(name).display().to_string()
}

#[test]
fn axum_by_both_protocols() {
    five_upgrades(&[], &[&rust("axum_hello")]);
}

#[test]
fn axum_by_the_handoff_socket_alone() {
    five_upgrades(&["--handoff", "socket", "--ready", "notify"], &[&rust("axum_hello")]);
}

#[test]
fn axum_by_listen_fds_alone() {
    five_upgrades(&["--handoff", "fds", "--ready", "notify"], &[&rust("axum_hello")]);
}

#[test]
fn threads_by_the_handoff_socket() {
    five_upgrades(&["--handoff", "socket", "--ready", "notify"], &[&rust("threads_hello")]);
}

#[test]
fn threads_by_listen_fds() {
    five_upgrades(&["--handoff", "fds", "--ready", "notify"], &[&rust("threads_hello")]);
}

#[test]
fn python() {
    let Some(python) = program(&["/usr/bin/python3", "python3"], "--version") else { return };
    five_upgrades(&["--ready", "notify"], &[python.to_str().unwrap(), &source("python/server.py")]);
}

#[test]
fn node_by_the_handoff_socket() {
    let Some(node) = program(&["node"], "--version") else { return };
    five_upgrades(&["--ready", "notify"], &[node.to_str().unwrap(), &source("node/server.js")]);
}

/// It can say nothing then: each upgrade waits a second.
#[test]
fn node_by_listen_fds() {
    let Some(node) = program(&["node"], "--version") else { return };
    five_upgrades(&["--handoff", "fds"], &[node.to_str().unwrap(), &source("node/server.js")]);
}

#[test]
fn go() {
    let Some(go) = program(&["go"], "version") else { return };
    let dir = tempfile::tempdir().unwrap();
    let server = dir.path().join("server").display().to_string();
    // What it compiles of Go's own library is kept with what cargo compiles.
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("go");
    let mut build = Command::new(go);
    build.args(["build", "-o", &server, &source("go/main.go")]).current_dir(dir.path());
    build.envs([("CGO_ENABLED", "0"), ("GO111MODULE", "off"), ("GOFLAGS", ""), ("GOTOOLCHAIN", "local")]);
    let output = build.env("GOCACHE", &cache).env("GOPATH", dir.path().join("path")).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    five_upgrades(&["--ready", "notify"], &[&server]);
}
