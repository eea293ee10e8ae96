//! Upgrades under load: promises 1, 2 and 3.

use nix::sys::signal::Signal;

use crate::common::PATIENCE;
use crate::stage::{clean, Stage};

#[test]
fn ten_upgrades_fail_no_request() {
    let stage = Stage::start(&[], "--version 1");
    let loads = [stage.load(), stage.keep_alive_load()];
    for version in 2..=11 {
        let version = version.to_string();
        stage.next(&format!("--version {version}"));
        stage.upgrade();
        for load in &loads {
            assert!(load.saw(&version, PATIENCE), "{}", load.so_far());
        }
    }
    for summary in clean(loads) {
        assert_eq!(summary.order(), ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11"]);
    }
    stage.wait_settled();
}

#[test]
fn hangup_upgrades_too() {
    let stage = Stage::start(&[], "--version 1");
    let loads = [stage.load(), stage.keep_alive_load()];
    stage.next("--version 2");
    stage.signal(Signal::SIGHUP);
    for load in &loads {
        assert!(load.saw("2", PATIENCE), "{}", load.so_far());
    }
    clean(loads);
}

#[test]
fn a_slow_new_version_delays_nobody() {
    let stage = Stage::start(&[], "--version 1");
    let loads = [stage.load(), stage.keep_alive_load()];
    stage.next("--version 2 --ready delay-ms=700");
    stage.upgrade();
    for load in &loads {
        assert!(load.saw("2", PATIENCE), "{}", load.so_far());
    }
    clean(loads);
}

#[test]
fn a_slow_request_is_finished_by_the_version_that_took_it() {
    let stage = Stage::start(&[], "--version 1");
    let address = stage.address();
    let slow = std::thread::spawn(move || crate::common::request(address, "/slow?ms=1500"));
    stage.wait_until("the request is under way", |status| {
        status.generations.iter().any(|generation| generation.connections.unwrap_or(0) > 0)
    });
    stage.next("--version 2");
    stage.upgrade();
    assert!(slow.join().unwrap().contains("version=1 "));
    stage.wait_settled();
}

#[test]
fn the_queue_outlives_a_crash() {
    let stage = Stage::start(&["--restart", "always"], "--version 1");
    let load = stage.load();
    let before = stage.serving();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(before.pid.unwrap()), Signal::SIGKILL).unwrap();
    stage.wait_until("another generation serves", |status| {
        status.serving.is_some_and(|serving| serving > before.number)
    });
    assert!(load.more(20, PATIENCE));
    // Requests that the dead process had accepted died with it; nobody was refused.
    let summary = load.stop();
    assert!(!summary.failures.contains_key(&crate::common::load::Failure::Refused), "{summary}");
    assert_eq!(stage.status().restarts, 1);
}
