//! Promise 5: one upgrade at a time, and what arrives meanwhile becomes exactly one more.

use nix::sys::signal::Signal;
use zddsup::control::types::{UpgradeKind, UpgradeResult};

use crate::common::PATIENCE;
use crate::stage::{clean, Stage};

#[test]
fn a_thousand_hangups_in_a_burst_are_few_upgrades_and_the_last_version_wins() {
    let stage = Stage::start(&["--max-draining", "20"], "--version 1");
    let loads = [stage.load(), stage.keep_alive_load()];
    for sent in 0..1000 {
        if sent == 900 {
            stage.next("--version last");
        }
        stage.signal(Signal::SIGHUP);
    }
    for load in &loads {
        assert!(load.saw("last", PATIENCE), "{}", load.so_far());
    }
    let status = stage.wait_settled();
    // The burst is over in milliseconds, a start takes longer: each of these began after the one before had ended.
    let count = status.serving.unwrap().0;
    assert!(count < 100, "{count} generations for a burst");
    clean(loads);
}

#[test]
fn hangups_while_one_starts_are_one_more() {
    let stage = Stage::start(&[], "--version 1");
    stage.next("--version 2 --ready delay-ms=500");
    stage.signal(Signal::SIGHUP);
    stage.wait_until("a candidate starts", |status| status.upgrades[0].to.is_some_and(|to| to.0 == 2));
    stage.next("--version 3");
    for _ in 0..50 {
        stage.signal(Signal::SIGHUP);
    }
    stage.wait_until("the third serves", |status| status.serving.is_some_and(|serving| serving.0 == 3));
    let status = stage.wait_settled();
    let upgrades: Vec<_> = status.upgrades.iter().filter(|report| report.kind == UpgradeKind::Upgrade).collect();
    assert_eq!(upgrades.len(), 2, "{upgrades:#?}");
    assert!(upgrades.iter().all(|report| report.result == Some(UpgradeResult::Succeeded)));
}

#[test]
fn two_clients_at_once_get_the_same_upgrade_or_the_next_one() {
    let stage = Stage::start(&[], "--version 1");
    stage.next("--version 2 --ready delay-ms=300");
    let first = stage.cli_command(&["upgrade"]).spawn().unwrap();
    stage.wait_until("a candidate starts", |status| status.upgrades[0].to.is_some_and(|to| to.0 == 2));
    let clients: Vec<_> = (0..4).map(|_| stage.cli_command(&["upgrade"]).spawn().unwrap()).collect();
    for mut client in clients.into_iter().chain([first]) {
        assert!(client.wait().unwrap().success(), "{}", stage.log());
    }
    let status = stage.wait_settled();
    assert!(status.serving.unwrap().0 <= 6, "{status:#?}");
}

#[test]
fn an_upgrade_waits_for_a_place_while_too_many_drain() {
    let stage = Stage::start(&["--max-draining", "1"], "--version 1 --drain-ms 1500");
    stage.next("--version 2");
    stage.upgrade();
    stage.signal(Signal::SIGHUP);
    let status = stage.wait_until("it waits", |status| status.pending.is_some());
    assert!(status.pending.unwrap().contains("--max-draining"));
    stage.wait_until("it had its turn", |status| status.serving.is_some_and(|serving| serving.0 == 3));
    stage.wait_settled();
}

#[test]
fn three_generations_overlap() {
    let stage = Stage::start(&[], "--version 1 --drain-ms 2000");
    let loads = [stage.load(), stage.keep_alive_load()];
    stage.next("--version 2 --drain-ms 2000");
    stage.upgrade();
    stage.next("--version 3");
    stage.upgrade();
    let alive = stage.status().generations.iter().filter(|generation| generation.pid.is_some()).count();
    assert_eq!(alive, 3, "{:#?}", stage.status());
    for load in &loads {
        assert!(load.saw("3", PATIENCE));
    }
    clean(loads);
    stage.wait_settled();
}
