//! Every interleaving of the pure core: requests, ends, readiness, time-outs, failed spawns, across two overlapping
//! upgrades and recoveries. The promises are invariants over all of them; broken variants show that the checker sees.

mod model;
mod world;

use std::time::Duration;

use model::{Exploration, Mutation};
use stateright::{Checker, Model};
use world::Budget;
use zddsup::core::{Canary, Policy, RestartLimit, RestartWhen};

fn policy() -> Policy {
    Policy {
        start_timeout: Some(Duration::from_secs(3)),
        bake: Duration::from_secs(5),
        drain_timeout: Some(Duration::from_secs(7)),
        stop_timeout: Duration::from_secs(2),
        lame_duck: Duration::ZERO,
        max_draining: 2,
        restart: RestartWhen::Always,
        restart_limit: Some(RestartLimit { count: 1, within: Duration::from_secs(1000) }),
        stable_after: Duration::from_secs(4),
        backoff_first: Duration::from_secs(1),
        backoff_most: Duration::from_secs(1),
        jitter_seed: 1,
    }
}

fn budget() -> Budget {
    Budget {
        upgrades: 2,
        rollbacks: 0,
        restarts: 0,
        stops: 0,
        quits: 0,
        canaries: 0,
        promotes: 0,
        aborts: 0,
        bad_checks: 0,
        rude: 1,
        losses: 2,
    }
}

#[track_caller]
fn explore(policy: Policy, budget: Budget) {
    explore_with(STEPS, policy, budget);
}

/// Two shares, each with a check, then the switch.
const STEPS: Canary = Canary { plan: 1, steps: 2, interval: Duration::from_secs(6), switches: true, checked: true };
/// One share, until somebody decides.
const BY_HAND: Canary = Canary { plan: 2, steps: 1, interval: Duration::from_secs(6), switches: false, checked: false };

#[track_caller]
fn explore_with(canary: Canary, policy: Policy, budget: Budget) {
    let exploration = Exploration { policy, budget, mutation: None, canary };
    let checker = exploration.checker().threads(2).spawn_bfs().join();
    println!(
        "{} states, {} unique, depth {}",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth()
    );
    assert!(checker.is_done(), "the exploration was cut short");
    checker.assert_properties();
}

#[test]
fn two_overlapping_upgrades() {
    explore(policy(), budget());
}

#[test]
fn without_a_bake() {
    explore(Policy { bake: Duration::ZERO, ..policy() }, Budget { upgrades: 3, losses: 1, rude: 0, ..budget() });
}

#[test]
fn stop_and_quit_in_every_phase() {
    explore(policy(), Budget { upgrades: 1, stops: 2, quits: 1, ..budget() });
}

#[test]
fn lame_duck_in_every_phase() {
    let policy = Policy { lame_duck: Duration::from_secs(6), ..policy() };
    explore(policy, Budget { upgrades: 1, stops: 2, losses: 1, ..budget() });
}

#[test]
fn rollback_and_restart_in_every_phase() {
    explore(policy(), Budget { upgrades: 1, rollbacks: 1, restarts: 1, rude: 0, losses: 1, ..budget() });
}

#[test]
fn restart_policies() {
    for restart in [RestartWhen::OnFailure, RestartWhen::Never] {
        explore(Policy { restart, ..policy() }, Budget { upgrades: 1, stops: 1, ..budget() });
    }
}

#[test]
fn a_canary_in_steps() {
    let budget = Budget { upgrades: 0, canaries: 1, bad_checks: 1, promotes: 1, aborts: 1, losses: 1, ..budget() };
    explore(policy(), budget);
}

#[test]
fn an_upgrade_that_waits_for_a_canary_and_a_canary_for_an_upgrade() {
    let budget = Budget { upgrades: 1, canaries: 1, bad_checks: 1, aborts: 1, losses: 1, rude: 0, ..budget() };
    explore(Policy { bake: Duration::ZERO, ..policy() }, budget);
}

#[test]
fn a_canary_by_hand() {
    let budget =
        Budget { canaries: 1, promotes: 1, aborts: 1, rollbacks: 1, losses: 1, rude: 0, upgrades: 0, ..budget() };
    explore_with(BY_HAND, policy(), budget);
}

#[test]
fn stop_and_quit_in_a_canary() {
    let budget = Budget { upgrades: 0, canaries: 1, stops: 2, quits: 1, losses: 1, ..budget() };
    explore(policy(), budget.clone());
    let lame_duck = Policy { lame_duck: Duration::from_secs(6), ..policy() };
    explore_with(BY_HAND, lame_duck, budget);
}

#[test]
fn a_broken_core_is_seen() {
    for (mutation, promise) in [
        (Mutation::SwitchesBeforeReady, "3 ready first"),
        (Mutation::StopsOldFirst, "3 ready first"),
        (Mutation::FailureTouchesIncumbent, "4 a failed upgrade changes nothing"),
        (Mutation::LosesRequest, "7 fresh every time"),
        (Mutation::TwoCandidates, "5 one at a time"),
        (Mutation::ReleasesEarly, "6 nothing left behind"),
        (Mutation::RunsTheOldProgram, "7 fresh every time"),
        (Mutation::FinishesEarly, "1 never refused, 2 never lost"),
        (Mutation::EndsTheIncumbentInACanary, "3 ready first"),
        (Mutation::SwitchesInACanary, world::CANARY),
    ] {
        let budget = Budget { stops: 1, canaries: 1, ..budget() };
        let exploration = Exploration { policy: policy(), budget, mutation: Some(mutation), canary: STEPS };
        let checker = exploration.checker().threads(2).target_max_depth(9).spawn_bfs().join();
        assert!(checker.discovery(promise).is_some(), "{mutation:?} was not seen to break promise {promise}");
    }
}
