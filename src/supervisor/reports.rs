//! The history of transactions, for the status, the log and whoever waits.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::control::types::{CanaryReport, PhaseTime, Proof, UpgradeKind, UpgradePhase, UpgradeReport, UpgradeResult};
use crate::core::{GenerationId, Kind, Outcome, UpgradeId};

/// How many are remembered.
const REMEMBERED: usize = 10;

/// One transaction, with the clock of the phase that it is in.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    report: UpgradeReport,
    phase: Option<Running>,
    /// Generations that leave because of it.
    leaving: Vec<GenerationId>,
}

/// The phase that it is in.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Running {
    phase: UpgradePhase,
    #[serde(with = "crate::state::with::moment")]
    since: Instant,
}

/// The last transactions, newest first.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Reports {
    entries: VecDeque<Entry>,
    changed: BTreeSet<u64>,
    counts: BTreeMap<UpgradeResult, u64>,
}

/// What is known when a transaction is over.
#[derive(Debug)]
pub struct Ending {
    /// How.
    pub outcome: Outcome,
    /// Why it did not succeed.
    pub reason: Option<String>,
    /// The candidate's last words.
    pub stderr: Vec<String>,
    /// Whether the generation from before serves on.
    pub old_serves: bool,
}

impl Reports {
    /// It waits for its turn.
    pub fn queued(&mut self, id: UpgradeId, kind: Kind, now: Instant) {
        self.entry(id, kind, now);
    }

    /// Its candidate is being spawned.
    pub fn started(&mut self, id: UpgradeId, kind: Kind, from: Option<GenerationId>, to: GenerationId, now: Instant) {
        let entry = self.entry(id, kind, now);
        entry.enter(UpgradePhase::Spawning, now);
        entry.report.from = from;
        entry.report.to = Some(to);
    }

    /// Its candidate runs and is waited for.
    pub fn spawned(&mut self, candidate: GenerationId, now: Instant) {
        self.change(
            |entry| entry.is_open() && entry.report.to == Some(candidate),
            |entry| {
                entry.enter(UpgradePhase::WaitingReady, now);
            },
        );
    }

    /// Its candidate is ready, and has come to this step of its canary.
    pub fn canary(&mut self, id: UpgradeId, canary: CanaryReport, now: Instant) {
        self.change(
            |entry| entry.report.id == id.0,
            |entry| {
                // One phase, for all of its steps.
                if entry.report.canary.replace(canary).is_none() {
                    entry.enter(UpgradePhase::Canary, now);
                }
            },
        );
    }

    /// It was switched to its candidate, and bakes.
    pub fn baking(&mut self, id: UpgradeId, now: Instant) {
        self.change(|entry| entry.report.id == id.0, |entry| entry.enter(UpgradePhase::Baking, now));
    }

    /// It is over; what it left behind may still drain.
    pub fn ended(&mut self, id: UpgradeId, ending: Ending, now: Instant) {
        let result = match ending.outcome {
            Outcome::Succeeded => UpgradeResult::Succeeded,
            Outcome::Failed(_) => UpgradeResult::Failed,
            Outcome::Aborted(_) => UpgradeResult::Aborted,
            Outcome::RolledBack => UpgradeResult::RolledBack,
            Outcome::Superseded => UpgradeResult::Superseded,
            Outcome::Cancelled => UpgradeResult::Cancelled,
        };
        *self.counts.entry(result).or_default() += 1;
        self.change(
            |entry| entry.report.id == id.0,
            |entry| {
                entry.close(now);
                if !entry.leaving.is_empty() {
                    entry.enter(UpgradePhase::Draining, now);
                }
                let report = &mut entry.report;
                report.result = Some(result);
                report.reason = ending.reason;
                report.stderr = ending.stderr;
                report.old_kept_serving = ending.old_serves;
                report.retired = entry.leaving.is_empty();
            },
        );
    }

    /// A generation leaves because of the newest transaction that has to do with it.
    pub fn leaves(&mut self, generation: GenerationId, now: Instant) {
        let concerns = |entry: &Entry| [entry.report.from, entry.report.to].contains(&Some(generation));
        self.change(concerns, |entry| {
            if entry.leaving.contains(&generation) {
                return;
            }
            entry.leaving.push(generation);
            entry.report.retired = false;
            if !entry.is_open() {
                entry.enter(UpgradePhase::Draining, now);
            }
        });
    }

    /// A generation is gone, to its last process and socket.
    pub fn released(&mut self, generation: GenerationId, now: Instant) {
        self.change(
            |entry| entry.leaving.contains(&generation),
            |entry| {
                entry.leaving.retain(|&leaving| leaving != generation);
                if entry.leaving.is_empty() && !entry.is_open() {
                    entry.report.retired = true;
                    entry.report.connections_left = entry.report.connections_left.map(|_| 0);
                    entry.close(now);
                }
            },
        );
    }

    /// Counts something for the newest transaction that a generation has to do with.
    pub fn prove(&mut self, generation: GenerationId, count: impl FnOnce(&mut Proof)) {
        let concerns = |entry: &Entry| [entry.report.from, entry.report.to].contains(&Some(generation));
        self.change(concerns, |entry| count(&mut entry.report.proof));
    }

    /// How many connections the generations that leave still have.
    pub fn connections(&mut self, of: &BTreeMap<GenerationId, u64>) {
        for entry in &mut self.entries {
            let left: Option<u64> = entry.leaving.iter().map(|generation| of.get(generation)).sum();
            if !entry.leaving.is_empty() && left.is_some() && entry.report.connections_left != left {
                entry.report.connections_left = left;
                entry.report.proof.drained = entry.report.proof.drained.max(left.unwrap_or(0));
                self.changed.insert(entry.report.id);
            }
        }
    }

    /// Those that changed since this was asked last, oldest first.
    pub fn take_changed(&mut self, now: Instant) -> Vec<UpgradeReport> {
        let changed = std::mem::take(&mut self.changed);
        self.entries
            .iter()
            .rev()
            .filter(|entry| changed.contains(&entry.report.id))
            .map(|entry| entry.so_far(now))
            .collect()
    }

    /// The candidate of a transaction.
    #[must_use]
    pub fn candidate(&self, id: UpgradeId) -> Option<GenerationId> {
        self.entries.iter().find(|entry| entry.report.id == id.0)?.report.to
    }

    /// Who served when it began, if its candidate is in its canary.
    #[must_use]
    pub fn in_canary(&self, id: UpgradeId) -> Option<GenerationId> {
        let entry = self.entries.iter().find(|entry| entry.report.id == id.0)?;
        entry.report.from.filter(|_| entry.phase.is_some_and(|running| running.phase == UpgradePhase::Canary))
    }

    /// How many ended how.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<UpgradeResult, u64> {
        self.counts.clone()
    }

    /// All of them, newest first, with the running phases' times so far.
    #[must_use]
    pub fn list(&self, now: Instant) -> Vec<UpgradeReport> {
        self.entries.iter().map(|entry| entry.so_far(now)).collect()
    }

    fn entry(&mut self, id: UpgradeId, kind: Kind, now: Instant) -> &mut Entry {
        self.changed.insert(id.0);
        if let Some(at) = self.entries.iter().position(|entry| entry.report.id == id.0) {
            return &mut self.entries[at];
        }
        self.entries.push_front(Entry {
            report: UpgradeReport {
                id: id.0,
                kind: kind.into(),
                from: None,
                to: None,
                result: None,
                reason: None,
                stderr: Vec::new(),
                old_kept_serving: false,
                canary: None,
                phases: Vec::new(),
                connections_left: None,
                proof: Proof::default(),
                retired: false,
            },
            phase: Some(Running { phase: UpgradePhase::Waiting, since: now }),
            leaving: Vec::new(),
        });
        // What is still under way is never forgotten.
        while self.entries.len() > REMEMBERED && self.entries.back().is_some_and(Entry::is_settled) {
            self.entries.pop_back();
        }
        &mut self.entries[0]
    }

    /// Changes the newest transaction that is meant.
    fn change(&mut self, meant: impl Fn(&Entry) -> bool, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.entries.iter_mut().find(|entry| meant(entry)) {
            change(entry);
            self.changed.insert(entry.report.id);
        }
    }
}

impl From<Kind> for UpgradeKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Start => UpgradeKind::Start,
            Kind::Upgrade => UpgradeKind::Upgrade,
            Kind::Rollback => UpgradeKind::Rollback,
            Kind::Restart => UpgradeKind::Restart,
            Kind::Recovery => UpgradeKind::Recovery,
        }
    }
}

impl Entry {
    fn is_open(&self) -> bool {
        self.report.result.is_none()
    }

    fn so_far(&self, now: Instant) -> UpgradeReport {
        let mut report = self.report.clone();
        if let Some(Running { phase, since }) = self.phase {
            report.phases.push(PhaseTime { phase, ms: millis(now - since) });
        }
        report
    }

    fn is_settled(&self) -> bool {
        !self.is_open() && self.leaving.is_empty()
    }

    fn enter(&mut self, phase: UpgradePhase, now: Instant) {
        self.close(now);
        self.phase = Some(Running { phase, since: now });
    }

    fn close(&mut self, now: Instant) {
        if let Some(Running { phase, since }) = self.phase.take() {
            self.report.phases.push(PhaseTime { phase, ms: millis(now - since) });
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
