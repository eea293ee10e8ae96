//! What a child is, has, and does not have.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use nix::sys::resource::{getrlimit, Resource};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::Mode;
use nix::unistd::{getpgrp, Gid, Uid};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use zddsup::core::End;
use zddsup::process::identity::Identity;
use zddsup::process::reaper::Reaper;
use zddsup::process::spawn::spawn;

use crate::children::{alone, end, launch, program, read_all, shell, stdout_of};

/// `NAME:  value` lines as in /proc/PID/status.
fn status(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(|line| line.split_once(':')).map(|(name, value)| (name, value.trim())).collect()
}

#[test]
fn the_end_of_each_kind_is_reported() {
    alone(async {
        assert_eq!(stdout_of(shell("exit 0")).await.0, End::Exited(0));
        assert_eq!(stdout_of(shell("exit 7")).await.0, End::Exited(7));
        let killed = |signal| End::Killed { signal, core: false };
        assert_eq!(stdout_of(shell("ulimit -c 0; kill -TERM $$")).await.0, killed(libc::SIGTERM));
        // A real-time signal, which many a library cannot name.
        assert_eq!(stdout_of(shell("kill -40 $$")).await.0, killed(40));
    });
}

#[test]
fn dispositions_are_default_and_nothing_is_blocked() {
    alone(async {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGUSR1);
        mask.add(Signal::SIGTERM);
        let before = mask.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK).unwrap();
        let (end, text) = stdout_of(launch(&program("/bin/cat"), &["/proc/self/status"])).await;
        before.thread_set_mask().unwrap();
        assert_eq!(end, End::Exited(0));
        let status = status(&text);
        // Rust ignores SIGPIPE in this process.
        for set in ["SigIgn", "SigBlk", "SigCgt", "ShdPnd", "SigPnd"] {
            assert_eq!(status[set], "0000000000000000", "{set}");
        }
    });
}

#[test]
fn it_has_0_1_2_and_what_was_handed_over() {
    alone(async {
        // Inheritable, and so to be closed by hand.
        let stray: Vec<OwnedFd> = (0..20).map(|_| inheritable()).collect();
        let mut launch = shell("ls -l /proc/$$/fd; cat <&3; cat <&4");
        launch.fds = vec![Arc::new(file_with("three").into()), Arc::new(file_with("four").into())];
        let (_, text) = stdout_of(launch).await;
        let numbers: Vec<_> =
            text.lines().filter_map(|line| line.split_once(" -> ")?.0.rsplit_once(' ').map(|(_, fd)| fd)).collect();
        assert_eq!(numbers, ["0", "1", "2", "3", "4"], "{text}");
        assert!(text.contains("0 -> /dev/null") && text.ends_with("threefour"), "{text}");
        drop(stray);
    });
}

#[test]
fn it_leads_a_group_of_its_own_in_the_same_session() {
    alone(async {
        let (_, text) = stdout_of(shell("echo $$; cut -d' ' -f5,6 /proc/$$/stat; echo $LISTEN_PID")).await;
        let mut lines = text.lines();
        let pid = lines.next().unwrap();
        let session = nix::unistd::getsid(None).unwrap();
        assert_eq!(lines.next(), Some(format!("{pid} {session}").as_str()));
        assert_ne!(pid, getpgrp().to_string());
        assert_eq!(lines.next(), Some(""));
    });
}

#[test]
fn listen_pid_is_its_own() {
    alone(async {
        let mut launch = shell("echo $$ $LISTEN_PID; env | grep -c ^LISTEN_PID=");
        launch.env.push(("LISTEN_PID".into(), "1".into()));
        launch.listen_pid = true;
        let (_, text) = stdout_of(launch).await;
        let words: Vec<_> = text.split_whitespace().collect();
        assert_eq!(words[0], words[1], "{text}");
        assert_eq!(words[2], "1");
    });
}

#[test]
fn directory_umask_nice_score_and_limits_are_set() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let mut launch = shell("pwd; umask; nice; cat /proc/self/oom_score_adj; ulimit -n; ulimit -Hn; ulimit -c");
        launch.directory = dir.path().canonicalize().unwrap();
        launch.umask = Some(Mode::from_bits_truncate(0o027));
        launch.nice = Some(7);
        launch.oom_score_adj = Some(321);
        launch.limits = vec!["nofile=16:99".parse().unwrap(), "core=0".parse().unwrap()];
        let (end, text) = stdout_of(launch).await;
        let directory = dir.path().canonicalize().unwrap();
        assert_eq!(text, format!("{}\n0027\n7\n321\n16\n99\n0\n", directory.display()));
        assert_eq!(end, End::Exited(0));
    });
}

#[test]
fn it_runs_as_its_user_who_may_use_its_pipes() {
    if !Uid::effective().is_root() {
        return;
    }
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let mut launch = shell("grep -E '^(Uid|Gid|Groups|CapEff)' /proc/self/status; echo said > /dev/stdout");
        let (uid, gid) = (Uid::from_raw(54321), Gid::from_raw(54322));
        let (name, home, shell_path) = ("nobody".to_owned(), "/".into(), "/bin/sh".into());
        let groups = vec![gid, Gid::from_raw(54323)];
        launch.identity = Some(Identity { uid, gid, groups, name, home, shell: shell_path });
        let (end, text) = stdout_of(launch).await;
        let status = status(&text);
        assert_eq!(status["Uid"], "54321\t54321\t54321\t54321");
        assert_eq!(status["Gid"], "54322\t54322\t54322\t54322");
        assert_eq!(status["Groups"], "54322 54323");
        assert_eq!(status["CapEff"], "0000000000000000");
        assert!(text.ends_with("said\n"), "{text}");
        assert_eq!(end, End::Exited(0));
    });
}

#[test]
fn the_supervisors_own_raised_limit_is_given_back() {
    alone(async {
        let before = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let (soft, hard) = (before.1.min(64), before.1);
        nix::sys::resource::setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        let former = zddsup::process::limits::raise_nofile().unwrap();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
        let mut launch = shell("ulimit -n");
        launch.limits = former.into_iter().collect();
        let (_, text) = stdout_of(launch).await;
        nix::sys::resource::setrlimit(Resource::RLIMIT_NOFILE, before.0, before.1).unwrap();
        assert_eq!(text.trim(), soft.to_string());
    });
}

#[test]
fn what_the_parent_hands_over_it_closes() {
    alone(async {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let mut launch = shell("echo done >&3");
        launch.fds = vec![Arc::new(write)];
        let reaper = Reaper::new();
        let spawned = spawn(launch, &reaper).await.unwrap();
        end(spawned, &reaper).await;
        // Would not come back if the write end were open here.
        assert_eq!(read_all(read), "done\n");
    });
}

/// Sources may have any numbers, those of other ones' targets too, and may be given more than once. The report's pipe is
/// among the targets as well.
#[test]
fn fds_arrive_in_order_wherever_they_come_from() {
    let indices = prop::collection::vec(0..12usize, 0..40);
    let mut runner = TestRunner::new(ProptestConfig { cases: 60, ..ProptestConfig::default() });
    let list = program("/bin/ls");
    let outcome = runner.run(&indices, |indices| {
        let text = alone(async {
            let dir = tempfile::tempdir().unwrap();
            let open = |index: usize| Arc::new(File::create(dir.path().join(index.to_string())).unwrap().into());
            let files: Vec<Arc<OwnedFd>> = (0..12).map(open).collect();
            let mut launch = launch(&list, &["-l", "/proc/self/fd"]);
            launch.fds = indices.iter().map(|&index| files[index].clone()).collect();
            stdout_of(launch).await.1
        });
        for (number, index) in (3..).zip(&indices) {
            let arrived = text
                .lines()
                .any(|line| line.contains(&format!(" {number} -> ")) && line.ends_with(&format!("/{index}")));
            prop_assert!(arrived, "{number} is not {index}:\n{text}");
        }
        // And the directory that ls reads.
        prop_assert_eq!(text.matches(" -> ").count(), 3 + indices.len() + 1);
        Ok(())
    });
    outcome.unwrap();
}

fn file_with(text: &str) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.rewind().unwrap();
    file
}

/// An fd that stays open over execve(2), as a careless library makes it.
fn inheritable() -> OwnedFd {
    let fd: OwnedFd = File::open("/dev/zero").unwrap().into();
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    fd
}
