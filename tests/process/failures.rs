//! Why a process cannot be started, said in a line; and what can still be run.

use std::fs::{self, OpenOptions};
use std::future::Future;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::unistd::{Gid, Uid};
use zddsup::core::End;
use zddsup::process::identity::Identity;
use zddsup::process::reaper::Reaper;
use zddsup::process::spawn::spawn;

use crate::children::{alone, failure, launch, program, shell, stdout_of};

fn executable(path: &Path, content: impl AsRef<[u8]>) -> PathBuf {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    path.to_owned()
}

#[track_caller]
fn says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in {error:?}");
    }
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn a_program_that_is_gone() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let path = executable(&dir.path().join("app"), "#!/bin/sh\n");
        let program = program(&path);
        fs::remove_file(path).unwrap();
        says(&failure(launch(&program, &[])).await, &["there is no program", "/app\""]);
    });
}

#[test]
fn an_interpreter_that_is_missing() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let path = executable(&dir.path().join("app"), "#!/no/such/python -u\n");
        says(&failure(launch(&program(path), &[])).await, &["/app\"", "\"/no/such/python\"", "install it"]);
        let path = executable(&dir.path().join("dos"), "#!/bin/sh\r\nexit\r\n");
        says(&failure(launch(&program(path), &[])).await, &["/dos\"", "CRLF"]);
        let mut binary = fs::read("/bin/sleep").unwrap();
        let start = binary.windows(6).position(|bytes| bytes == b"/lib64" || bytes == b"/lib/l").unwrap();
        binary[start + 1] = b'X';
        let path = executable(&dir.path().join("foreign"), binary);
        says(&failure(launch(&program(path), &[])).await, &["/foreign\"", "\"/Xib", "loader"]);
    });
}

#[test]
fn what_is_no_program() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let path = executable(&dir.path().join("app"), "echo without a first line\n");
        says(&failure(launch(&program(path), &[])).await, &["#! line"]);
    });
}

#[test]
fn a_program_that_is_being_written() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let path = executable(&dir.path().join("app"), fs::read("/bin/true").unwrap());
        let writer = OpenOptions::new().append(true).open(&path).unwrap();
        says(&failure(launch(&program(&path), &[])).await, &["open for writing", "rename"]);
        drop(writer);
        assert_eq!(stdout_of(launch(&program(&path), &[])).await.0, End::Exited(0));
    });
}

#[test]
fn what_its_user_may_not_do() {
    if !Uid::effective().is_root() {
        return;
    }
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let path = executable(&dir.path().join("app"), "#!/bin/sh\n");
        let (uid, gid) = (Uid::from_raw(54321), Gid::from_raw(54321));
        let name = "visitor".to_owned();
        let identity = Identity { uid, gid, groups: vec![gid], name, home: "/".into(), shell: "/bin/sh".into() };
        let mut denied = launch(&program(path), &[]);
        denied.identity = Some(identity.clone());
        says(&failure(denied).await, &["visitor", "may not execute", "/app\"", "x bit"]);
        let mut outside = shell("true");
        outside.identity = Some(identity);
        outside.directory = dir.path().to_owned();
        says(&failure(outside).await, &["visitor", "cannot enter directory"]);
    });
}

#[test]
fn a_directory_that_is_gone() {
    alone(async {
        let mut launch = shell("true");
        launch.directory = "/no/such/directory".into();
        says(&failure(launch).await, &["cannot enter directory \"/no/such/directory\""]);
    });
}

#[test]
fn settings_that_are_not_possible() {
    alone(async {
        let mut score = shell("true");
        score.oom_score_adj = Some(5000);
        says(&failure(score).await, &["OOM score 5000", "-1000 to 1000"]);
        let mut limits = shell("true");
        // Above fs.nr_open, which holds for root too.
        limits.limits = vec!["core=0".parse().unwrap(), "nofile=99999999999".parse().unwrap()];
        says(&failure(limits).await, &["nofile=99999999999"]);
        let mut nul = shell("true");
        nul.args.push("a\0b".into());
        says(&failure(nul).await, &["argument", "NUL byte"]);
        let mut long = shell("true");
        long.args.push("x".repeat(300_000).into());
        says(&failure(long).await, &["too long"]);
    });
}

#[test]
fn more_fds_than_may_be_open() {
    alone(async {
        let mut launch = shell("true");
        let fd = Arc::new(fs::File::open("/dev/null").unwrap().into());
        launch.fds = vec![fd; 600_000];
        says(&failure(launch).await, &["open files are to be handed over", "ulimit -n"]);
    });
}

#[test]
fn a_recorded_program_runs_after_its_file_was_replaced() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let path = executable(&dir.path().join("app"), fs::read("/bin/echo").unwrap());
        let program = program(&path);
        let next = executable(&dir.path().join("next"), "#!/bin/sh\necho the new one\n");
        fs::rename(next, &path).unwrap();
        let mut recorded = launch(&program, &["the old one"]);
        recorded.recorded = true;
        recorded.fds = (0..20).map(|_| Arc::new(fs::File::open("/dev/null").unwrap().into())).collect();
        assert_eq!(stdout_of(recorded).await, (End::Exited(0), "the old one\n".to_owned()));
        assert_eq!(stdout_of(launch(&program, &[])).await.1, "the new one\n");
        fs::remove_file(&path).unwrap();
        let mut recorded = launch(&program, &["removed altogether"]);
        recorded.recorded = true;
        assert_eq!(stdout_of(recorded).await.1, "removed altogether\n");
    });
}

#[test]
fn a_recorded_script_needs_its_file() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        executable(&one, "#!/bin/sh\necho one\n");
        executable(&two, "#!/bin/sh\necho two\n");
        let (current, next) = (dir.path().join("current"), dir.path().join("next"));
        symlink(&one, &current).unwrap();
        let program = program(&current);
        symlink(&two, &next).unwrap();
        fs::rename(&next, &current).unwrap();
        let mut recorded = launch(&program, &[]);
        recorded.recorded = true;
        assert_eq!(stdout_of(recorded).await.1, "one\n");
        fs::rename(&two, &one).unwrap();
        let mut recorded = launch(&program, &[]);
        recorded.recorded = true;
        says(&failure(recorded).await, &["a script cannot be run without its file", "symbolic link"]);
    });
}

#[test]
fn what_is_forgotten_half_way_is_killed() {
    alone(async {
        let reaper = Reaper::new();
        {
            let starting = spawn(shell("sleep 60"), &reaper);
            tokio::pin!(starting);
            // One poll: it forks, and the program cannot have been executed before the first look at the pipe.
            let first = std::future::poll_fn(|context| std::task::Poll::Ready(starting.as_mut().poll(context)));
            assert!(first.await.is_pending());
        }
        let status = nix::sys::wait::waitpid(None, None).unwrap();
        assert!(matches!(status, nix::sys::wait::WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGKILL, _)));
    });
}
