use std::io;
use std::sync::Arc;

use super::*;
use crate::control::fixture::{self, Fake};
use crate::control::server::Limits;
use crate::control::types::{PhaseTime, Refusal};

const UPGRADE: Asked = Asked { word: "upgrade", wanted: UpgradeResult::Succeeded };

fn waiting(wait: Until) -> Waiting {
    Waiting { wait, timeout: None, json: false }
}

fn step(id: u64, phase: UpgradePhase) -> Event {
    Event::Upgrade(UpgradeReport { phases: vec![PhaseTime { phase, ms: 1 }], ..fixture::report(id) })
}

fn ended(id: u64, result: UpgradeResult, retired: bool) -> Event {
    Event::Upgrade(UpgradeReport { result: Some(result), retired, ..fixture::report(id) })
}

/// A supervisor to which all of this happens as soon as it is asked, before it answers.
fn scripted(script: Vec<Event>) -> Fake {
    let events = Arc::new(std::sync::OnceLock::<tokio::sync::broadcast::Sender<Event>>::new());
    let sender = events.clone();
    let fake = Fake::start(Limits::default(), 64, move |_| {
        for event in &script {
            sender.get().unwrap().send(event.clone()).unwrap();
        }
        Reply::Accepted { upgrade: 5 }
    });
    events.set(fake.events.clone()).unwrap();
    fake
}

async fn ask(fake: &Fake, waiting: &Waiting) -> Result<Outcome, Failure> {
    request(&fake.client, Command::Upgrade, UPGRADE, waiting, &mut Progress::lines(io::sink())).await
}

#[tokio::test]
async fn a_result_that_comes_before_the_answer_is_not_missed() {
    let script = vec![step(5, UpgradePhase::Spawning), ended(5, UpgradeResult::Failed, true)];
    let outcome = ask(&scripted(script), &waiting(Until::Result)).await.unwrap();
    assert!(matches!(outcome, Outcome::Over(report) if report.id == 5 && report.result == Some(UpgradeResult::Failed)));
}

#[tokio::test]
async fn the_results_of_others_are_not_its_own() {
    let fake = scripted(vec![ended(4, UpgradeResult::Succeeded, true), ended(6, UpgradeResult::Succeeded, true)]);
    let waiting = Waiting { timeout: Some(Duration::from_secs(1)), ..waiting(Until::Result) };
    let outcome = ask(&fake, &waiting).await.unwrap();
    assert!(matches!(outcome, Outcome::TimedOut { upgrade: Some(5), last: None }), "{outcome:?}");
}

#[tokio::test]
async fn retired_is_waited_for_and_its_time_out_knows_of_the_success() {
    let fake = scripted(vec![ended(5, UpgradeResult::Succeeded, false)]);
    let outcome = ask(&fake, &waiting(Until::Result)).await.unwrap();
    assert!(matches!(outcome, Outcome::Over(_)));
    let short = Waiting { timeout: Some(Duration::from_secs(1)), ..waiting(Until::Retired) };
    match ask(&fake, &short).await.unwrap() {
        Outcome::TimedOut { upgrade: Some(5), last: Some(last) } => {
            assert_eq!(last.result, Some(UpgradeResult::Succeeded));
        }
        other => panic!("{other:?}"),
    }
    let fake = scripted(vec![ended(5, UpgradeResult::Succeeded, false), ended(5, UpgradeResult::Succeeded, true)]);
    let outcome = ask(&fake, &waiting(Until::Retired)).await.unwrap();
    assert!(matches!(outcome, Outcome::Over(report) if report.retired));
}

#[tokio::test]
async fn accepted_needs_no_events() {
    let outcome = ask(&Fake::accepting(5), &waiting(Until::Accepted)).await.unwrap();
    assert!(matches!(outcome, Outcome::Accepted { upgrade: 5 }));
}

#[tokio::test]
async fn a_refusal_is_said_and_changes_nothing() {
    let refusal = Refusal { reason: "no version before".to_owned(), remedy: "upgrade instead".to_owned() };
    let fake = Fake::start(Limits::default(), 4, move |_| Reply::Refused(refusal.clone()));
    let failure = ask(&fake, &waiting(Until::Result)).await.unwrap_err();
    assert_eq!(failure.exit(), Exit::Refused);
    assert_eq!(failure.to_string(), "refused, nothing was changed: no version before; upgrade instead");
}

#[tokio::test]
async fn a_supervisor_that_dies_is_never_a_success() {
    let fake = scripted(vec![step(5, UpgradePhase::WaitingReady)]);
    let client = fake.client.clone();
    let asked = tokio::spawn(async move {
        let mut progress = Progress::lines(io::sink());
        request(&client, Command::Upgrade, UPGRADE, &waiting(Until::Result), &mut progress).await
    });
    while fake.asked.lock().unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    fake.kill();
    match asked.await.unwrap() {
        // Killed while it waited, or before the answer had come.
        Ok(Outcome::Gone { upgrade: 5, .. }) => {}
        Err(failure) => assert_eq!(failure.exit(), Exit::NoSupervisor),
        Ok(other) => panic!("{other:?}"),
    }
    let nobody = Client::new("/nonexistent/web.sock".into());
    let mut progress = Progress::lines(io::sink());
    let failure =
        request(&nobody, Command::Upgrade, UPGRADE, &waiting(Until::Result), &mut progress).await.unwrap_err();
    assert_eq!(failure.exit(), Exit::NoSupervisor);
}

#[tokio::test]
async fn what_was_missed_is_in_the_status() {
    let flood: Vec<_> = (100..300).map(|id| ended(id, UpgradeResult::Succeeded, true)).collect();
    let script = [vec![ended(5, UpgradeResult::RolledBack, true)], flood].concat();
    // Its result is overrun by later events, but the status has it …
    let fake = scripted(script.clone());
    let Event::Upgrade(own) = script[0].clone() else { unreachable!() };
    fake.status.lock().unwrap().upgrades.insert(0, own);
    let outcome = ask(&fake, &waiting(Until::Result)).await.unwrap();
    assert!(matches!(outcome, Outcome::Over(report) if report.result == Some(UpgradeResult::RolledBack)));
    // … or not any more.
    let failure = ask(&scripted(script), &waiting(Until::Result)).await.unwrap_err();
    assert_eq!(failure.exit(), Exit::Failed);
    assert!(failure.to_string().contains("forgotten"), "{failure}");
}

#[test]
fn what_is_over_stays_over() {
    let mut follower = Follower { upgrade: Some(5), ..Follower::default() };
    follower.take(ended(5, UpgradeResult::Succeeded, false));
    follower.take(step(5, UpgradePhase::Baking));
    assert!(follower.over(Until::Result, UpgradeResult::Succeeded).is_some());
    assert!(follower.over(Until::Retired, UpgradeResult::Succeeded).is_none());
}

#[test]
fn it_is_said_where_it_stands_and_what_it_waits_for() {
    let mut follower = Follower { upgrade: Some(5), ..Follower::default() };
    assert_eq!(follower.stand("upgrade").0, "upgrade 5: accepted");
    follower.take(step(5, UpgradePhase::WaitingReady));
    let mut candidate = fixture::generation(4, crate::control::types::GenerationPhase::Starting);
    candidate.waiting_for = Some("READY=1".to_owned());
    follower.take(Event::Generation(candidate));
    assert_eq!(follower.stand("upgrade"), ("upgrade 5: waiting-ready".to_owned(), "generation 4: READY=1".to_owned()));
    let phases = vec![PhaseTime { phase: UpgradePhase::Draining, ms: 1 }];
    follower.take(Event::Upgrade(UpgradeReport { phases, connections_left: Some(1), ..fixture::report(5) }));
    assert_eq!(follower.stand("upgrade").1, "1 connection left");
}
