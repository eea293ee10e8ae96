//! `Delegate=`: a cgroup for each generation.

use std::collections::BTreeSet;
use std::fs;

use crate::common::{wait_for, PATIENCE};
use crate::stage::Systemd;
use crate::{template, HERE};

/// What a daemon does that wants to be found by nobody: no environment, no parent, no session; below it a subreaper
/// (`PR_SET_CHILD_SUBREAPER` is 36), whose orphans zddsup never hears of. It says which processes it is.
const DAEMON: &str = r#"
import ctypes, os, time
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
if not os.fork():
    os.setsid()
    if os.fork(): os._exit(0)
open("/run/stage/daemons/%d" % os.getpid(), "w")
while True: time.sleep(60)
"#;

/// Starts two of them, and then the puppet.
const SERVER: &str = r"#!/bin/sh
env -i /usr/bin/python3 /run/stage/daemon &
exec /run/target/examples/puppet --script /run/stage/script
";

/// `zddsup@web` at port 80, which daemons run along with. None where there is no Python for them.
fn stage(more: &str, flags: &str) -> Option<Systemd> {
    if !crate::common::real::installed("python3", &["/usr/bin/python3", "--version"]) {
        return None;
    }
    let systemd = Systemd::boot(&template(more))?;
    systemd.write("web.env", &format!("COMMAND=/bin/sh /run/stage/server\nFLAGS=--listen 127.0.0.1:8080 {flags}\n"));
    systemd.write("server", SERVER);
    systemd.write("daemon", DAEMON);
    systemd.write("script", "--version 1");
    fs::create_dir(systemd.path("daemons")).unwrap();
    fs::set_permissions(systemd.path("daemons"), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    fs::set_permissions(systemd.path(""), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    Some(systemd)
}

const UNIT: &str = "/sys/fs/cgroup/system.slice/system-zddsup.slice/zddsup@web.service";

/// The output of a shell inside.
fn shell(systemd: &Systemd, script: &str) -> String {
    let output = systemd.command("/bin/sh", &["-c", script]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Names of the cgroups below the unit's.
fn below(systemd: &Systemd) -> BTreeSet<String> {
    let found = shell(systemd, &format!("cd {UNIT} 2>/dev/null && ls -d generation-*"));
    found.lines().map(str::to_owned).collect()
}

/// Who lives in one of them.
fn inside(systemd: &Systemd, name: &str) -> BTreeSet<i32> {
    let found = shell(systemd, &format!("cat {UNIT}/{name}/cgroup.procs"));
    found.lines().map(|line| line.parse().unwrap()).collect()
}

/// Daemons that have said so.
fn daemons(systemd: &Systemd) -> BTreeSet<i32> {
    let entries = fs::read_dir(systemd.path("daemons")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect()
}

/// None of them lives, and the dead are reaped.
fn are_gone(systemd: &Systemd, pids: &BTreeSet<i32>) {
    wait_for("they are gone", || pids.iter().all(|pid| shell(systemd, &format!("cat /proc/{pid}/comm")).is_empty()));
}

fn named(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn upgrades(more: &str, flags: &str) {
    let Some(systemd) = stage(more, flags) else { return };
    systemd.must(&["start", "zddsup@web"]);
    let main: i32 = systemd.show("zddsup@web", "MainPID").parse().unwrap();
    let load = systemd.load(8080);
    let mut before = BTreeSet::new();
    for version in 1..=3 {
        if version > 1 {
            systemd.write("script", &format!("--version {version}"));
            systemd.must(&["reload", "zddsup@web"]);
        }
        let name = format!("generation-{version}-web");
        wait_for("its daemons run", || daemons(&systemd).len() == version * 2);
        let fresh: BTreeSet<_> = daemons(&systemd).difference(&before).copied().collect();
        let living = inside(&systemd, &name);
        assert!(living.is_superset(&fresh) && !living.contains(&main), "{living:?} {fresh:?}\n{}", systemd.log());
        assert!(load.saw(&version.to_string(), PATIENCE), "{}", load.so_far());
        // The one before is ended as a whole, and leaves no directory.
        wait_for("the one before is gone", || below(&systemd) == named(&[&name]));
        are_gone(&systemd, &before);
        before = daemons(&systemd);
    }
    load.stop().assert_clean();
    let own = shell(&systemd, &format!("cat {UNIT}/cgroup.procs"));
    assert_eq!(own.trim(), main.to_string());
    let status = shell(&systemd, "/run/target/zddsup status --control /run/zddsup/web.sock --json");
    assert!(status.contains(&format!("{UNIT}/generation-3-web")), "{status}");
    systemd.must(&["stop", "zddsup@web"]);
    assert_eq!(systemd.show("zddsup@web", "Result"), "success");
    are_gone(&systemd, &daemons(&systemd));
    assert_eq!(below(&systemd), named(&[]));
}

const SHORT: &str = "--drain-timeout 1s --stop-timeout 1s";

#[test]
fn each_version_has_its_own_and_no_daemon_gets_out_of_it() {
    upgrades("", SHORT);
}

#[test]
fn the_same_where_zddsup_is_an_ordinary_user() {
    upgrades("User=nobody\nEnvironment=XDG_RUNTIME_DIR=/run\n", SHORT);
}

#[test]
fn the_same_where_the_service_is_another_user() {
    upgrades("", &format!("{SHORT} --user nobody"));
}

#[test]
fn a_cgroup_that_is_not_delegated_is_left_alone() {
    for (more, flags) in [("Delegate=no\n", ""), ("ProtectControlGroups=yes\n", ""), ("", "--cgroup off")] {
        let Some(systemd) = stage(more, flags) else { return };
        systemd.must(&["start", "zddsup@web"]);
        assert_eq!(shell(&systemd, &format!("cd {UNIT} && find . -mindepth 1 -type d")), "");
        systemd.must(&["stop", "zddsup@web"]);
    }
}

#[test]
fn what_is_required_and_not_there_is_a_failure_to_start() {
    let Some(systemd) = stage("ProtectControlGroups=yes\nRestart=no\n", "--cgroup require") else { return };
    let output = systemd.ctl(&["start", "zddsup@web"]);
    assert!(!output.status.success());
    assert!(systemd.log().contains("ProtectControlGroups="), "{}", systemd.log());
    // Not delegated, but zddsup is told that it is its own.
    systemd.write("web.env", "COMMAND=/bin/sh /run/stage/server\nFLAGS=--listen 127.0.0.1:8080 --cgroup require\n");
    let own = HERE.to_owned() + "Delegate=no\nRestart=no\n";
    systemd.write("units/test.conf", &own);
    shell(&systemd, "cp /run/stage/units/test.conf /run/systemd/system/zddsup@.service.d/test.conf");
    systemd.must(&["daemon-reload"]);
    systemd.must(&["start", "zddsup@web"]);
    assert_eq!(below(&systemd), named(&["generation-1-web"]));
}

#[test]
fn the_next_zddsup_finds_a_killed_ones_version_and_its_daemons() {
    let Some(systemd) = stage("KillMode=process\nRestartSec=0\n", SHORT) else { return };
    systemd.must(&["start", "zddsup@web"]);
    wait_for("its daemons run", || daemons(&systemd).len() == 2);
    let first = daemons(&systemd);
    let main = systemd.show("zddsup@web", "MainPID");
    let load = systemd.load(8080);
    // An empty one, as of a zddsup that was killed before there was a process for it.
    shell(&systemd, &format!("mkdir {UNIT}/generation-9-web {UNIT}/generation-9-other"));
    systemd.write("script", "--version 2");
    systemd.must(&["kill", "--kill-whom=main", "--signal=KILL", "zddsup@web"]);
    assert!(load.saw("2", PATIENCE), "{}\n{}", load.so_far(), systemd.log());
    assert_ne!(systemd.show("zddsup@web", "MainPID"), main);
    wait_for("the first one is gone", || {
        let below = below(&systemd);
        below.contains("generation-2-web") && !below.contains("generation-1-web") && !below.contains("generation-9-web")
    });
    are_gone(&systemd, &first);
    load.stop().assert_clean();
}

#[test]
fn the_doctor_says_whether_there_can_be_any() {
    let unit = |delegate| {
        format!(
            "[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\nDelegate={delegate}\nExecStart=/run/target/zddsup doctor\n\
             StandardOutput=append:/run/stage/log\n"
        )
    };
    let Some(systemd) = Systemd::boot(&[("has.service", unit("yes")), ("has-not.service", unit("no"))]) else { return };
    systemd.must(&["start", "has"]);
    assert!(
        systemd.log().contains("cgroup a generation    in /sys/fs/cgroup/system.slice/has.service"),
        "{}",
        systemd.log()
    );
    assert!(!systemd.log().contains("Delegate="));
    systemd.must(&["start", "has-not"]);
    assert!(
        systemd.log().contains("\"/sys/fs/cgroup/system.slice/has-not.service\" is not marked"),
        "{}",
        systemd.log()
    );
    // From outside, whose cgroup of that name is another one.
    let outside = shell(&systemd, "/run/target/zddsup doctor");
    assert!(outside.contains("/sys/fs/cgroup does not have the cgroup that zddsup is in"), "{outside}");
}
