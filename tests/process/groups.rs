//! All processes of a generation, those too that try to get away.

use std::os::fd::OwnedFd;

use nix::sys::signal::Signal;
use nix::unistd::read;
use zddsup::core::End;
use zddsup::process::group::{signal_main, Group, Member, MARKER_VAR};
use zddsup::process::reaper::Reaper;
use zddsup::process::spawn::{spawn, Spawned};

use crate::children::{alone, end, shell};

/// Runs a script that says "up" on its stdout once all is there. Reads of the pipe end when all of it is gone.
async fn started(script: &str, marker: &str, reaper: &Reaper) -> (Spawned, Group, OwnedFd) {
    let (pipe, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let mut launch = shell(script);
    launch.env.push((MARKER_VAR.into(), marker.into()));
    launch.stdout = Some(write);
    let spawned = spawn(launch, reaper).await.unwrap();
    let group = Group::new(spawned.member, marker);
    let mut said = String::new();
    while !said.contains("up") {
        let mut bytes = [0; 64];
        let count = read(&pipe, &mut bytes).unwrap();
        assert_ne!(count, 0, "it ended early");
        said += std::str::from_utf8(&bytes[..count]).unwrap();
    }
    (spawned, group, pipe)
}

/// Comes back when nobody has the pipe any more.
fn all_are_gone(pipe: &OwnedFd) {
    while read(pipe, &mut [0; 64]).unwrap() > 0 {}
}

/// What got away twice over and has neither parent nor group nor session in common, with the marker only.
const ESCAPEE: &str = "setsid sh -c '(setsid sleep 60 & echo up) & wait' & wait; ";

#[test]
fn those_that_got_away_are_found_and_killed() {
    alone(async {
        let reaper = Reaper::new();
        reaper.become_subreaper().unwrap();
        let script = format!("{ESCAPEE} sleep 60 & sleep 60 & wait");
        let (spawned, group, pipe) = started(&script, "escape", &reaper).await;
        let other = started("echo up; exec sleep 60", "other", &reaper).await;
        assert!(group.pids().unwrap().contains(&spawned.member.pid));
        assert!(!group.pids().unwrap().contains(&other.0.member.pid));
        assert!(!group.pids().unwrap().contains(&nix::unistd::Pid::this().as_raw()));
        // The main process alone …
        signal_main(&spawned.pidfd, Signal::SIGKILL).unwrap();
        assert_eq!(end(spawned, &reaper).await, End::Killed { signal: libc::SIGKILL, core: false });
        // … leaves others.
        assert!(!group.is_empty().unwrap());
        assert!(group.signal_all(Signal::SIGKILL).unwrap() > 0);
        all_are_gone(&pipe);
        // A process closes its files a moment before it is dead.
        emptied(&group).await;
        assert_eq!(group.signal_all(Signal::SIGKILL).unwrap(), 0);
        assert!(!other.1.is_empty().unwrap());
        other.1.signal_all(Signal::SIGTERM).unwrap();
        end(other.0, &reaper).await;
        // Orphans are ours, and no zombie is left of them.
        reap_all(&reaper);
    });
}

#[test]
fn one_signal_reaches_all() {
    alone(async {
        let reaper = Reaper::new();
        reaper.become_subreaper().unwrap();
        let (spawned, group, pipe) =
            started("for i in 1 2 3 4 5; do sleep 60 & done; echo up; wait", "all", &reaper).await;
        assert_eq!(group.pids().unwrap().len(), 6);
        assert_eq!(group.signal_all(Signal::SIGTERM).unwrap(), 6);
        all_are_gone(&pipe);
        assert_eq!(end(spawned, &reaper).await, End::Killed { signal: libc::SIGTERM, core: false });
        reap_all(&reaper);
    });
}

#[test]
fn what_forks_while_it_is_killed_is_killed_too() {
    alone(async {
        let reaper = Reaper::new();
        reaper.become_subreaper().unwrap();
        // Each one starts the next and ends: always one step ahead.
        let script = "f() { sleep 0.01; f & }; f & f & f & echo up; wait; sleep 60";
        let (spawned, group, pipe) = started(script, "forks", &reaper).await;
        while !group.is_empty().unwrap() {
            group.signal_all(Signal::SIGKILL).unwrap();
        }
        all_are_gone(&pipe);
        end(spawned, &reaper).await;
        reap_all(&reaper);
    });
}

#[test]
fn a_stopped_main_process_is_woken_for_its_signal() {
    alone(async {
        let reaper = Reaper::new();
        let (spawned, _, _pipe) = started("echo up; exec sleep 60", "stopped", &reaper).await;
        spawned.pidfd.signal(Signal::SIGSTOP).unwrap();
        signal_main(&spawned.pidfd, Signal::SIGTERM).unwrap();
        assert_eq!(end(spawned, &reaper).await, End::Killed { signal: libc::SIGTERM, core: false });
    });
}

#[test]
fn a_zombie_is_not_alive() {
    alone(async {
        let reaper = Reaper::new();
        let (spawned, group, _pipe) = started("echo up; exec sleep 60", "zombie", &reaper).await;
        let leader = group.leader();
        group.signal_all(Signal::SIGKILL).unwrap();
        spawned.pidfd.exited().await.unwrap();
        emptied(&group).await;
        assert_eq!(Member::of(nix::unistd::Pid::from_raw(spawned.member.pid)).unwrap(), leader);
        assert_eq!(end(spawned, &reaper).await, End::Killed { signal: libc::SIGKILL, core: false });
        assert_eq!(leader.open().unwrap_err().raw_os_error(), Some(libc::ESRCH));
    });
}

async fn emptied(group: &Group) {
    while !group.is_empty().unwrap() {
        tokio::task::yield_now().await;
    }
}

/// Reaps until no child is left.
pub fn reap_all(reaper: &Reaper) {
    let peek = nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT;
    while nix::sys::wait::waitid(nix::sys::wait::Id::All, peek).is_ok() {
        reaper.reap();
    }
}
