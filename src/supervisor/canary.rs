//! A canary's shares and checks: what of it the core does not know.
//!
//! ```text
//!  request  ─> refused where connections cannot be steered, before anything is spawned
//!  share    ─> one setsockopt(2) an address: weights, and networks that are diverted; the check runs again and again
//!  unshare  ─> everything to the incumbent; what the candidate has it keeps, until it has drained
//!  switch   ─> everything to the candidate, as ever
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::adopting::Adopted;
use super::driver::{Driver, Input};
use super::ending::describe;
use super::running::Tasks;
use crate::config::canary::{Canary, Share};
use crate::config::ready::Probe;
use crate::config::Ready;
use crate::control::types::{CanaryReport, Refusal};
use crate::core::{self, Abort, Event, GenerationId, Request, Stage, UpgradeId};
use crate::listener::steering::{Origin, SteerError};
use crate::ready::probe::{self, WhyNot};

/// A check follows the one before after a quarter of a step, but within these.
const SOONEST: Duration = Duration::from_millis(100);
const LATEST: Duration = Duration::from_secs(5);

/// What was asked for, and what is checked now.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Canaries {
    plans: BTreeMap<u32, Canary>,
    last: u32,
    #[serde(skip)]
    checking: Option<Checking>,
    /// Why the check failed.
    failure: Option<String>,
}

/// Ends with it.
#[derive(Debug)]
struct Checking {
    step: watch::Sender<u16>,
    _tasks: Tasks,
}

/// What is asked in each round, and how it is called.
struct Ask {
    what: String,
    probe: Probe,
    context: probe::Context,
}

impl Driver {
    /// What an upgrade is that says no more.
    pub(super) fn usual_upgrade(&mut self) -> Result<Request, Refusal> {
        let canary = self.config.canary.clone();
        self.upgrade_by(canary)
    }

    /// An upgrade by a canary, or at once.
    pub(super) fn upgrade_by(&mut self, canary: Option<Canary>) -> Result<Request, Refusal> {
        let Some(canary) = canary else { return Ok(Request::Upgrade) };
        if !self.steers_all() {
            return Err(Refusal {
                reason: "all generations share one socket, and a canary needs one for each: new connections cannot be \
                         shared out"
                    .to_owned(),
                remedy:
                    "start it with `zddsup run --switch steered` and TCP listeners alone, or let the program bind for \
                         itself (`--handoff adopt`), or upgrade without a canary (`zddsup upgrade --no-canary`)"
                        .to_owned(),
            });
        }
        if self.machine.serving().is_some_and(|serving| self.adopted.addresses(serving).is_empty()) {
            return Err(Refusal {
                reason: "no socket of the generation that serves is known, so that nothing can be shared out"
                    .to_owned(),
                remedy: "upgrade without a canary (`zddsup upgrade --no-canary`)".to_owned(),
            });
        }
        let steps = u16::try_from(canary.shares.len()).unwrap_or(u16::MAX);
        let (interval, switches) = (canary.interval, canary.switches);
        let checked = canary.check.is_some() || matches!(self.config.ready, Ready::Probe(_));
        let plan = self.plan(canary);
        Ok(Request::Canary(core::Canary { plan, steps, interval, switches, checked }))
    }

    /// A number for it: the same for the same. Those that nobody needs are forgotten.
    fn plan(&mut self, canary: Canary) -> u32 {
        let flight = match self.machine.stage() {
            Stage::Starting(flight) | Stage::Canary { flight, .. } => flight.canary,
            Stage::Idle | Stage::Baking { .. } | Stage::Backoff { .. } => None,
        };
        let waits = self.machine.pending().and_then(|pending| pending.canary);
        let needed = |plan: &u32| [flight, waits].iter().flatten().any(|canary| canary.plan == *plan);
        let Canaries { plans, last, .. } = &mut self.canaries;
        plans.retain(|number, _| needed(number));
        if let Some((&number, _)) = plans.iter().find(|(_, known)| **known == canary) {
            return number;
        }
        *last += 1;
        plans.insert(*last, canary);
        *last
    }

    /// The canary that is under way, and its step.
    fn under_way(&self) -> Option<(&Canary, u16)> {
        let Stage::Canary { canary, step, .. } = self.machine.stage() else { return None };
        Some((self.canaries.plans.get(&canary.plan)?, step))
    }

    /// Performs `Action::Share`.
    pub(super) fn share(&mut self, candidate: GenerationId, incumbent: GenerationId, step: u16) {
        let Some((canary, _)) = self.under_way() else { return };
        let share = canary.shares.get(usize::from(step)).copied().unwrap_or_default();
        let from: Vec<_> = canary.from.iter().map(|network| Origin::network(network.address, network.bits)).collect();
        let networks: Vec<_> = canary.from.iter().map(|network| format!(", all from {network}")).collect();
        if let Err(error) = self.adopted.share(candidate, incumbent, share, &from) {
            return self.canary_failed(candidate, error.to_string());
        }
        tracing::info!(generation = %candidate, incumbent = %incumbent, "canary: gets {share} of new connections{}", networks.concat());
        if let Some(running) = self.running.get_mut(&candidate).filter(|_| step == 0) {
            running.why_not = None;
            running.watchdog.fed(std::time::Instant::now());
        }
        match &self.canaries.checking {
            Some(checking) => drop(checking.step.send_replace(step)),
            None => self.begin_checks(candidate, step),
        }
        self.record();
        self.news_of(candidate);
    }

    /// Performs `Action::Unshare`.
    pub(super) fn unshare(&mut self, candidate: GenerationId, incumbent: GenerationId) {
        tracing::info!(generation = %candidate, incumbent = %incumbent, "canary: gets no new connections any more");
        self.end_canary();
        self.steer_to(incumbent, Some(candidate));
        self.record();
        self.news_of(candidate);
    }

    /// Its networks are as all others again, and nothing is checked any more.
    pub(super) fn end_canary(&mut self) {
        self.canaries.checking = None;
        self.adopted.end_diverts();
    }

    /// Nothing is checked until it is begun again.
    pub(super) fn end_checks(&mut self) {
        self.canaries.checking = None;
    }

    /// Its processes are known: one that was ready before that is checked from now on.
    pub(super) fn check_canary(&mut self, id: GenerationId) {
        match self.machine.stage() {
            Stage::Canary { flight, step, .. } if flight.candidate == id && self.canaries.checking.is_none() => {
                self.begin_checks(id, step);
            }
            Stage::Canary { .. } | Stage::Idle | Stage::Starting(_) | Stage::Baking { .. } | Stage::Backoff { .. } => {}
        }
    }

    fn begin_checks(&mut self, candidate: GenerationId, step: u16) {
        let Some((canary, _)) = self.under_way() else { return };
        let every = if canary.switches || canary.shares.len() > 1 { canary.interval / 4 } else { LATEST };
        let ready = match &self.config.ready {
            Ready::Probe(probe) => Some(("its probe", probe.clone(), false)),
            Ready::Auto | Ready::Notify | Ready::Listen | Ready::Delay(_) => None,
        };
        // Whoever answers: what knows how the canary does is seldom the canary.
        let check = canary.check.clone().map(|check| ("its check", check, true));
        let asks: Vec<_> = ready
            .into_iter()
            .chain(check)
            .filter_map(|(what, probe, anybody)| {
                let context = self.probe_context(candidate)?;
                // That of --ready-host is the service's own.
                let host = context.host.clone().filter(|_| !anybody);
                let context = probe::Context { host, anybody, ..context };
                Some(Ask { what: format!("{what} {probe}"), probe, context })
            })
            .collect();
        if asks.is_empty() {
            return;
        }
        let (sender, steps) = watch::channel(step);
        let inbox = self.inbox.clone();
        let report = move |step, result| {
            let _loop_is_gone = inbox.send(Input::Checked(candidate, step, result));
        };
        let mut tasks = Tasks::default();
        tasks.add(&tokio::spawn(check_again(asks, steps, every.clamp(SOONEST, LATEST), report)));
        self.canaries.checking = Some(Checking { step: sender, _tasks: tasks });
    }

    /// A round of checks is over.
    pub(super) fn checked(&mut self, candidate: GenerationId, step: u16, result: Result<(), String>) {
        match result {
            Ok(()) => self.happened(Event::Checked(candidate, step)),
            Err(why) => self.canary_failed(candidate, why),
        }
    }

    fn canary_failed(&mut self, candidate: GenerationId, why: String) {
        self.canaries.failure = Some(why);
        self.happened(Event::CheckFailed(candidate));
    }

    /// Why a candidate is not tried any longer, in a line.
    pub(super) fn explain_abort(&mut self, abort: Abort, candidate: Option<GenerationId>) -> String {
        let who = candidate.map_or_else(|| "the new generation".to_owned(), |id| format!("generation {id}"));
        match abort {
            Abort::Asked => "somebody asked for it".to_owned(),
            Abort::Check => self.canaries.failure.take().unwrap_or_else(|| "its check failed".to_owned()),
            Abort::Died(end) => format!("{who} {} in its canary", describe(end)),
            Abort::Hung => format!("{who} missed its watchdog's time in its canary"),
        }
    }

    /// It was switched to because the other one was lost, in a line.
    pub(super) fn lost_beside_a_canary(&self, id: UpgradeId) -> Option<String> {
        let from = self.reports.in_canary(id)?;
        let end = self.running.get(&from)?.end?;
        let why = format!("generation {from} {} beside the canary: switched to it at once", describe(end));
        tracing::warn!(upgrade = %id, "{why}");
        Some(why)
    }

    /// How far a canary is, for the reports.
    pub(super) fn canary_moved(&mut self, id: UpgradeId, step: u16) {
        let Some((canary, _)) = self.under_way() else { return };
        let step = usize::from(step);
        let report = CanaryReport {
            share: canary.shares.get(step).copied().unwrap_or_default(),
            from: canary.from.iter().map(ToString::to_string).collect(),
            step: step + 1,
            steps: canary.shares.len(),
            by_hand: !canary.switches && step + 1 == canary.shares.len(),
        };
        self.reports.canary(id, report, std::time::Instant::now());
    }
}

impl Adopted {
    /// The candidate gets its share wherever the incumbent listens, and it does too: now, or once it does.
    fn share(
        &mut self,
        candidate: GenerationId,
        incumbent: GenerationId,
        share: Share,
        from: &[Origin],
    ) -> Result<(), SteerError> {
        let (part, rest) = share.weights();
        self.diverted = from.to_vec();
        for group in self.groups.values_mut().filter(|group| !group.of(incumbent).is_empty()) {
            group.steer_weighted(&[(candidate, part), (incumbent, rest)])?;
            let from = if group.of(candidate).is_empty() { &[] } else { from };
            for &origin in from {
                group.divert(origin, candidate)?;
            }
        }
        Ok(())
    }

    fn end_diverts(&mut self) {
        for origin in std::mem::take(&mut self.diverted) {
            for group in self.groups.values_mut() {
                if let Err(error) = group.end_divert(origin) {
                    tracing::error!("{error}");
                }
            }
        }
    }
}

/// Asks all, again and again, and at once when a step begins. Ends with the first no.
async fn check_again(
    asks: Vec<Ask>,
    mut steps: watch::Receiver<u16>,
    every: Duration,
    report: impl Fn(u16, Result<(), String>),
) {
    loop {
        let step = *steps.borrow_and_update();
        for Ask { what, probe, context } in &asks {
            match probe::once(probe, context).await {
                // Another generation answered, which says nothing of this one.
                Ok(()) | Err(WhyNot::Other { .. }) => {}
                Err(why) => return report(step, Err(format!("{what}: {why}"))),
            }
        }
        report(step, Ok(()));
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            changed = steps.changed() => if changed.is_err() { return },
        }
    }
}
