//! Promise 6: nothing is left behind by a generation, by a thousand of them, or by zddsup.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::common::{processes_with, request, wait_for};
use crate::stage::Stage;
use crate::watched::{lives, Rest};

/// How many upgrades are made, unless that takes too long.
const MANY: u32 = 1000;
const LONG: Duration = Duration::from_secs(60);
/// Fewer than that would show no leak.
const FEW: u32 = 100;

/// The process that a puppet left in a session of its own.
fn grandchild(stage: &Stage) -> i32 {
    let pid = request(stage.address(), "/grandchild").parse().expect("the puppet has a grandchild");
    let session = procfs::process::Process::new(pid).unwrap().stat().unwrap().session;
    assert_ne!(session, stage.serving().pid.unwrap(), "it did not get away in the first place");
    pid
}

/// The test's processes: zddsup, and whatever it or a generation of it started. Each look may miss one that forks and
/// exits.
fn of(stage: &Stage) -> BTreeSet<i32> {
    let marker = format!("XDG_RUNTIME_DIR={}\0", stage.dir.path().display());
    (0..5).flat_map(|_| processes_with(&marker)).collect()
}

/// Nothing is left but zddsup and one process that serves.
fn one_is_left(stage: &Stage) {
    stage.wait_settled();
    let left = of(stage);
    assert_eq!(left.len(), 2, "{left:?}\n{}", stage.log());
}

#[test]
fn a_daemon_of_a_generation_goes_with_it() {
    let stage = Stage::start(&[], "--version 1 --spawn-grandchild");
    let left = grandchild(&stage);
    stage.next("--version 2");
    stage.upgrade();
    one_is_left(&stage);
    assert!(!lives(left));
}

#[test]
fn one_that_ignores_term_is_killed_after_the_stop_timeout() {
    let flags = ["--drain-timeout", "100ms", "--stop-timeout", "700ms"];
    let stage = Stage::start(&flags, "--version 1 --spawn-stubborn-grandchild");
    let left = grandchild(&stage);
    stage.next("--version 2");
    stage.upgrade();
    let begin = Instant::now();
    wait_for("it is killed", || !lives(left));
    assert!(begin.elapsed() > Duration::from_millis(300), "it had no time: {:?}", begin.elapsed());
    assert!(stage.log().contains("SIGKILL to all"), "{}", stage.log());
    one_is_left(&stage);
}

#[test]
fn a_drain_that_overruns_ends_with_the_whole_group() {
    let flags = ["--drain-timeout", "300ms", "--stop-timeout", "300ms"];
    let stage = Stage::start(&flags, "--version 1 --ignore-term --spawn-stubborn-grandchild");
    let (main, left) = (stage.serving().pid.unwrap(), grandchild(&stage));
    stage.next("--version 2");
    stage.upgrade();
    wait_for("both are killed", || !lives(main) && !lives(left));
    one_is_left(&stage);
    let retired = stage.status().generations.into_iter().find(|generation| generation.number.0 == 1).unwrap();
    assert!(retired.end.unwrap().contains("SIGKILL"));
}

#[test]
fn the_daemons_of_a_version_that_failed_go_too() {
    let stage = Stage::start(&["--stop-timeout", "300ms", "--start-timeout", "700ms"], "--version 1");
    for flags in ["--exit-after-ms 100:3 --ready none", "--ready none"] {
        stage.next(&format!("--version 2 --spawn-stubborn-grandchild {flags}"));
        assert_eq!(stage.cli(&["upgrade"]).status.code(), Some(3));
        one_is_left(&stage);
    }
}

#[test]
fn what_a_killed_main_process_leaves_is_swept() {
    let stage = Stage::start(&["--stop-timeout", "300ms"], "--version 1 --spawn-stubborn-grandchild");
    let (main, left) = (stage.serving().pid.unwrap(), grandchild(&stage));
    stage.next("--version 2");
    kill(Pid::from_raw(main), Signal::SIGKILL).unwrap();
    stage.wait_until("another one serves", |status| status.serving.is_some_and(|serving| serving.0 == 2));
    wait_for("its grandchild is killed", || !lives(left));
    one_is_left(&stage);
}

/// Their pids are others at each look: what is forked after the look is found by the next one.
#[test]
fn processes_that_fork_and_exit_all_the_time_are_ended() {
    let stage = Stage::start(&["--stop-timeout", "300ms"], "--version 1 --fork-chains 4");
    wait_for("the chains run", || of(&stage).len() >= 6);
    stage.next("--version 2");
    stage.upgrade();
    one_is_left(&stage);
}

#[test]
fn with_zddsup_everything_ends() {
    let flags = ["--drain-timeout", "60s", "--stop-timeout", "300ms"];
    let mut stage = Stage::start(&flags, "--version 1 --drain-ms 60000 --spawn-stubborn-grandchild");
    stage.next("--version 2 --drain-ms 60000 --spawn-grandchild --fork-chains 2");
    stage.upgrade();
    stage.next("--version 3 --ready none --spawn-grandchild");
    stage.signal(Signal::SIGHUP);
    stage.wait_until("three run", |status| status.generations.iter().filter(|one| one.pid.is_some()).count() == 3);
    stage.signal(Signal::SIGQUIT);
    assert!(stage.supervisor.wait().success(), "{}", stage.log());
    assert_eq!(of(&stage), BTreeSet::new(), "{}", stage.log());
    assert!(!stage.control().exists());
}

#[test]
fn many_upgrades_leave_no_fd_no_zombie_and_no_memory() {
    let stage = Stage::start(&[], "--version 1 --spawn-grandchild");
    let rest = Rest::of(&stage);
    let begin = Instant::now();
    let mut made = 0;
    while made < MANY && (begin.elapsed() < LONG || made < FEW) {
        stage.upgrade();
        made += 1;
    }
    println!("{made} upgrades in {:.1?}", begin.elapsed());
    stage.wait_settled();
    // zddsup, the last generation and its grandchild.
    assert_eq!(of(&stage).len(), 3, "{}", stage.log());
    rest.is_back();

    let inherited = request(stage.address(), "/inherited");
    let fds: Vec<_> = inherited.lines().filter_map(|line| line.strip_prefix("fd ")).collect();
    let numbers: Vec<_> = fds.iter().map(|line| line.split(' ').next().unwrap()).collect();
    // 3 is the listener, 4 the handoff socket; 5 is how it looked.
    assert_eq!(numbers, ["0", "1", "2", "3", "4"], "{fds:?}");
    assert!(fds[3..].iter().all(|line| line.contains("socket:")), "{fds:?}");
}
