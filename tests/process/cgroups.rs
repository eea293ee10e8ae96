//! A generation's cgroup: who is in it, whatever that does to get out.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use nix::unistd::read;
use zddsup::process::cgroup::Cgroup;
use zddsup::process::group::{Group, MARKER_VAR};
use zddsup::process::reaper::Reaper;
use zddsup::process::spawn::{spawn, Launch, Spawned};

use crate::cgroup::made;
use crate::children::{alone, end, program, shell};
use crate::groups::reap_all;

struct Started {
    spawned: Spawned,
    group: Group,
    path: PathBuf,
    pipe: OwnedFd,
}

/// Runs a script in a cgroup, which says "up" on its stdout once all is there.
async fn started(script: &str, name: &str, reaper: &Reaper) -> Option<Started> {
    let cgroup = made(name)?;
    let (pipe, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let mut launch = Launch { cgroup: Some(cgroup.entrance().unwrap()), stdout: Some(write), ..shell(script) };
    launch.env.extend([(MARKER_VAR.into(), name.into()), ("CGROUP".into(), cgroup.path().into())]);
    let spawned = spawn(launch, reaper).await.unwrap();
    let path = cgroup.path().to_owned();
    let group = Group::new(spawned.member, name).within(Some(cgroup));
    let mut said = String::new();
    while !said.contains("up\n") {
        let mut bytes = [0; 512];
        let count = read(&pipe, &mut bytes).unwrap();
        assert_ne!(count, 0, "it ended early: {said}");
        said += std::str::from_utf8(&bytes[..count]).unwrap();
    }
    Some(Started { spawned, group, path, pipe })
}

impl Started {
    /// Kills all of it, and sees that nothing is left.
    async fn ends(self, reaper: &Reaper) {
        let Started { spawned, group, path, pipe } = self;
        assert!(group.signal_all(Signal::SIGKILL).unwrap() > 0);
        while read(&pipe, &mut [0; 64]).unwrap() > 0 {}
        end(spawned, reaper).await;
        while !group.is_empty().unwrap() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        assert!(path.exists());
        drop(group);
        assert!(!path.exists());
        reap_all(reaper);
    }
}

#[test]
fn a_process_is_in_it_from_its_first_instruction_on() {
    alone(async {
        let reaper = Reaper::new();
        let Some(cgroup) = made("first") else { return };
        let (pipe, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let cat = crate::children::launch(&program("/bin/cat"), &["/proc/self/cgroup"]);
        let launch = Launch { cgroup: Some(cgroup.entrance().unwrap()), stdout: Some(write), ..cat };
        let spawned = spawn(launch, &reaper).await.unwrap();
        let mut bytes = [0; 4096];
        let count = read(&pipe, &mut bytes).unwrap();
        let said = std::str::from_utf8(&bytes[..count]).unwrap();
        let name = cgroup.path().file_name().unwrap().to_str().unwrap();
        assert!(said.lines().any(|line| line.starts_with("0::/") && line.ends_with(name)), "{said}");
        end(spawned, &reaper).await;
        assert!(cgroup.is_empty() && cgroup.pids().is_empty());
    });
}

/// No marker, no parent, no session in common: its own parent has gone before anybody looked.
const WITHOUT_A_TRACE: &str = "env -i /usr/bin/setsid sh -c '(/usr/bin/setsid sleep 60 & echo up)' & wait";

#[test]
fn what_left_no_trace_is_found_and_killed_all_the_same() {
    alone(async {
        let reaper = Reaper::new();
        reaper.become_subreaper().unwrap();
        let script = format!("{WITHOUT_A_TRACE}; exec sleep 60");
        let Some(started) = started(&script, "trace", &reaper).await else { return };
        // The first one, and the last, once those in between are gone.
        let main = started.spawned.member;
        while started.group.pids().unwrap().len() != 2 {
            reaper.reap();
            tokio::task::yield_now().await;
        }
        // By what it looks like it is nobody's.
        assert_eq!(Group::new(main, "trace").pids().unwrap(), [main.pid]);
        let escaped = started.group.pids().unwrap().into_iter().find(|&pid| pid != main.pid).unwrap();
        assert!(started.group.contains(nix::unistd::Pid::from_raw(escaped)).unwrap());
        assert!(!started.group.is_empty().unwrap());
        started.ends(&reaper).await;
    });
}

#[test]
fn what_is_in_cgroups_that_it_made_below_is_of_it_too() {
    alone(async {
        let reaper = Reaper::new();
        reaper.become_subreaper().unwrap();
        let script = format!(
            "mkdir -p $CGROUP/a/b $CGROUP/c && echo 0 > $CGROUP/a/b/cgroup.procs && {WITHOUT_A_TRACE}; \
             echo 0 > $CGROUP/cgroup.procs; exec sleep 60"
        );
        let Some(started) = started(&script, "below", &reaper).await else { return };
        assert!(started.path.join("a/b").is_dir());
        assert!(started.group.pids().unwrap().len() > 1);
        started.ends(&reaper).await;
    });
}

#[test]
fn what_forks_as_fast_as_it_can_is_ended_at_once() {
    alone(async {
        let reaper = Reaper::new();
        reaper.become_subreaper().unwrap();
        // It comes to an end by itself, if nobody ends it.
        let script = "f() { [ $1 = 0 ] || f $(($1 - 1)) & }; f 30000; f 30000; f 30000; echo up; wait; exec sleep 60";
        let Some(started) = started(script, "forks", &reaper).await else { return };
        if !started.path.join("cgroup.kill").exists() {
            eprintln!("skipped: no cgroup.kill before Linux 5.14");
            while !started.group.is_empty().unwrap() {
                started.group.signal_all(Signal::SIGKILL).unwrap();
            }
            return;
        }
        started.group.cgroup().unwrap().kill().unwrap();
        let Started { spawned, group, pipe, .. } = started;
        // Nobody has the pipe any more, though it was asked for once.
        while read(&pipe, &mut [0; 64]).unwrap() > 0 {}
        end(spawned, &reaper).await;
        while !group.is_empty().unwrap() {
            reaper.reap();
        }
        reap_all(&reaper);
    });
}

#[test]
fn it_is_found_again_by_its_record_and_only_it() {
    alone(async {
        let reaper = Reaper::new();
        let Some(started) = started("echo up; exec sleep 60", "record", &reaper).await else { return };
        let record = started.group.cgroup().unwrap().record();
        let found = Cgroup::recorded(record.clone()).unwrap();
        assert_eq!(found.pids(), [started.spawned.member.pid].into());
        // It is not empty.
        drop(found);
        assert!(started.path.exists());
        started.ends(&reaper).await;
        assert!(Cgroup::recorded(record.clone()).is_none());
        let another = Cgroup::make(record.path.clone()).unwrap();
        assert!(Cgroup::recorded(record).is_none());
        drop(another);
    });
}
