//! A cgroup for each generation where no systemd is: in a container that has its own cgroup to itself.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use zddsup::process::cgroup::Cgroup;

use crate::common::cgroup::made;
use crate::common::load::{Config, Load, Target};
use crate::common::{puppet, wait_for, Setup, Supervisor, PATIENCE};

/// $1: the container's cgroup. What is run sees it as the root of all.
const CONTAIN: &str = r#"
echo 0 > "$1/cgroup.procs"
shift
exec unshare --mount --cgroup sh -ec '
    mount --make-rprivate /
    mount -t cgroup2 none /sys/fs/cgroup
    exec "$@"' sh "$@"
"#;

/// The puppet, and a process that nothing shows to be its.
const SERVER: &str = r#"
env -i "$(command -v setsid)" sh -c "($(command -v sleep) 1000 &)"
exec "$@"
"#;

fn zddsup(dir: &Arc<tempfile::TempDir>, cgroup: &Cgroup, version: u32) -> Setup {
    let script = dir.path().join("script");
    fs::write(&script, format!("--version {version}")).unwrap();
    let (puppet, script) = (puppet(), script.display().to_string());
    let mut args = vec!["--cgroup", "require", "--listen", "127.0.0.1:0"];
    args.extend(["--drain-timeout", "1s", "--stop-timeout", "1s"]);
    args.extend(["--", "sh", "-c", SERVER, "sh", &puppet, "--script", &script]);
    let path = cgroup.path().display().to_string();
    Setup::within(Arc::clone(dir), args).through(&["sh", "-ec", CONTAIN, "sh", &path])
}

fn below(cgroup: &Cgroup) -> BTreeSet<String> {
    let entries = fs::read_dir(cgroup.path()).unwrap().flatten().filter(|entry| entry.path().is_dir());
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn inside(path: &Path) -> usize {
    fs::read_to_string(path.join("cgroup.procs")).unwrap().lines().count()
}

/// One generation alone: the puppet and its companion. And zddsup.
fn is_alone(supervisor: &Supervisor, cgroup: &Cgroup, generation: u32) {
    let name = format!("generation-{generation}-web");
    wait_for("it is the only one", || below(cgroup) == [name.clone()].into());
    assert_eq!((cgroup.pids().len(), inside(&cgroup.path().join(&name))), (3, 2), "{}", supervisor.log());
    let path = supervisor.serving().cgroup.expect("the status has it");
    assert_eq!(path, Path::new("/sys/fs/cgroup").join(&name));
}

#[test]
fn a_container_has_its_own_for_each_and_nothing_is_left_in_it() {
    if !nix::unistd::geteuid().is_root() {
        return println!("skipped: only root may make a cgroup namespace with its mount");
    }
    let Some(cgroup) = made("container") else { return };
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let first = zddsup(&dir, &cgroup, 1).start();
    let load = Load::start(Config { workers: 2, ..Config::new(Target::Tcp(first.address())) });
    is_alone(&first, &cgroup, 1);
    fs::write(dir.path().join("script"), "--version 2").unwrap();
    first.upgrade();
    assert!(load.saw("2", PATIENCE), "{}", load.so_far());
    is_alone(&first, &cgroup, 2);
    // The next one of its name finds both processes, one of them by the cgroup alone.
    fs::create_dir(cgroup.path().join("generation-7-web")).unwrap();
    let address = first.address();
    let dir = first.kill_alone();
    let setup = zddsup(&dir, &cgroup, 3);
    let mut second = setup.start();
    assert_eq!(second.address(), address);
    assert!(load.saw("3", PATIENCE), "{}", load.so_far());
    is_alone(&second, &cgroup, 3);
    load.stop().assert_clean();
    assert!(second.cli(&["stop"]).status.success());
    second.wait();
    assert!(cgroup.is_empty() && cgroup.pids().is_empty(), "{}", second.log());
    assert_eq!(below(&cgroup), BTreeSet::new());
}

#[test]
fn without_one_zddsup_does_not_start_where_it_is_required() {
    if !nix::unistd::geteuid().is_root() {
        return println!("skipped: only root may mount");
    }
    // Nothing is mounted there but an empty directory.
    let hidden = "mount --make-rprivate / && mount -t tmpfs none /sys/fs/cgroup && exec \"$@\"";
    let args = ["--cgroup", "require", "--listen", "127.0.0.1:0", "--", "sleep", "60"];
    let mut supervisor = Setup::new(args).through(&["unshare", "--mount", "sh", "-ec", hidden, "sh"]).spawn();
    assert_eq!(supervisor.wait().code(), Some(1), "{}", supervisor.log());
    assert!(supervisor.log().contains("cgroup version 2"), "{}", supervisor.log());
}
