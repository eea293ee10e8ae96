//! Where zddsup keeps its control socket and state, and what it says where that or something else is missing.

use crate::stage::{Container, Running};

/// The directories that have a control socket.
fn sockets(pod: &Running) -> String {
    let find = ["/tmp", "/run", "/dev/shm", "/mine", "-name", "*.sock", "-printf", "%p %m %U\n"];
    String::from_utf8(pod.command("find", &find).output().unwrap().stdout).unwrap()
}

#[test]
fn a_tmpfs_on_tmp_is_enough() {
    let Some(pod) = Container::new().tmpfs("/tmp").puppet(&[], "--version 1") else { return };
    assert_eq!(sockets(&pod), "/tmp/zddsup-1000680000/puppet.sock 600 1000680000\n");
}

#[test]
fn without_any_volume_there_is_dev_shm() {
    for container in [Container::new(), Container::new().root()] {
        let Some(pod) = container.puppet(&[], "--version 1") else { return };
        let found = sockets(&pod);
        assert!(found.starts_with("/dev/shm/zddsup-") && found.lines().count() == 1, "{found}");
        pod.must(&["upgrade"]);
    }
}

#[test]
fn a_directory_of_the_image_that_is_read_only_is_passed_over() {
    let image = "mkdir -m 755 -p run/zddsup\n";
    let Some(pod) = Container::new().root().mounts(image).tmpfs("/tmp").puppet(&[], "--version 1") else { return };
    assert_eq!(sockets(&pod), "/tmp/zddsup-0/puppet.sock 600 0\n");
}

#[test]
fn a_volume_that_is_named_is_taken_also_one_that_all_may_write_to() {
    // As an emptyDir is.
    let volume = "mkdir mine; mount -t tmpfs -o mode=777 none mine\n";
    let container = Container::new().mounts(volume).env("XDG_RUNTIME_DIR=/mine");
    let Some(pod) = container.puppet(&[], "--version 1") else { return };
    assert_eq!(sockets(&pod), "/mine/zddsup/puppet.sock 600 1000680000\n");
}

#[test]
fn what_a_killed_container_left_on_a_volume_does_not_hinder_the_next_one() {
    use std::os::unix::fs::PermissionsExt;
    let volume = tempfile::tempdir().unwrap();
    std::fs::set_permissions(volume.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let container = || Container::new().mounts(&format!("mount --bind {} tmp\n", volume.path().display()));
    for _ in 0..3 {
        let Some(mut pod) = container().puppet(&[], "--version 1") else { return };
        // Nobody is taken over: whoever had these pids is gone.
        assert!(pod.must(&["status", "--ready"]).contains("generation 1 serves"), "{}", pod.log());
        pod.signal(nix::sys::signal::Signal::SIGKILL);
        assert!(!pod.wait().success());
        let left = volume.path().join("zddsup-1000680000");
        assert!(["sock", "state", "lock"].iter().all(|ending| left.join(format!("puppet.{ending}")).exists()));
    }
}

#[test]
fn a_directory_of_somebody_else_is_not_used() {
    let trap = "mkdir -m 777 tmp/zddsup-1000680000\n";
    let Some(pod) = Container::new().tmpfs("/tmp").mounts(trap).puppet(&[], "--version 1") else { return };
    assert_eq!(sockets(&pod), "/dev/shm/zddsup-1000680000/puppet.sock 600 1000680000\n");
}

/// Does not begin, and says this in one line.
#[track_caller]
fn refused(container: Container, says: &[&str]) {
    let Some(mut pod) = container.run(&["--listen", "127.0.0.1:8080", "--", "/target/examples/puppet"]) else { return };
    assert_eq!(pod.wait().code(), Some(1), "{}", pod.log());
    let log = pod.log();
    assert!(log.lines().count() == 1 && says.iter().all(|text| log.contains(text)), "{log}");
}

#[test]
fn where_nothing_can_be_written_to_it_says_so_and_what_helps() {
    let tried = ["/tmp/zddsup-1000680000: ", "/dev/shm/zddsup-1000680000: ", "Read-only file system"];
    let helps = ["set XDG_RUNTIME_DIR", "mount a tmpfs at /tmp"];
    refused(Container::new().mounts("umount dev/shm\n"), &[&tried[..], &helps].concat());
}

#[test]
fn it_needs_the_proc_of_its_own_pid_namespace() {
    for (mounts, why) in [("touch no-proc\n", "No such file"), ("mount --bind /proc proc\n", "which is process 1")] {
        refused(Container::new().mounts(mounts), &["cannot use /proc", why, "`mount -t proc proc /proc`"]);
    }
}

#[test]
fn a_missing_dev_null_is_named() {
    let Some(mut pod) = Container::new().mounts("umount dev/null; rm dev/null\n").run(&[
        "--restart",
        "never",
        "--listen",
        "127.0.0.1:8080",
        "--",
        "/target/examples/puppet",
    ]) else {
        return;
    };
    assert_eq!(pod.wait().code(), Some(10), "{}", pod.log());
    assert!(pod.log().contains("cannot open /dev/null"), "{}", pod.log());
}
