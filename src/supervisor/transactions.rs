//! News of transactions: into the log, the reports, and up to a supervisor above.

use std::time::Instant;

use super::driver::Driver;
use super::reports::Ending;
use super::running::Running;
use crate::core::stopping::Life;
use crate::core::{Abort, Kind, Notice, Outcome, UpgradeId};

impl Driver {
    pub(super) fn noticed(&mut self, notice: Notice) {
        let now = Instant::now();
        match notice {
            Notice::Queued(id, kind) => self.reports.queued(id, kind, now),
            Notice::Started { upgrade, kind, from, to } => {
                if kind == Kind::Recovery {
                    self.restarts += 1;
                }
                self.reports.started(upgrade, kind, from, to, now);
                match kind {
                    Kind::Upgrade | Kind::Rollback | Kind::Restart => self.upward.reloading(upgrade, now),
                    // Nobody asked for these.
                    Kind::Start | Kind::Recovery => {}
                }
            }
            Notice::Canary(id, step) => self.canary_moved(id, step),
            Notice::Baking(id) => {
                tracing::info!(upgrade = %id, "bakes for {:?}; the old generation is on standby", self.config.bake);
                self.reports.baking(id, now);
            }
            Notice::Ended(id, outcome) => self.transaction_ended(id, outcome, now),
            Notice::Backoff(until) => {
                let wait = until.since(self.now());
                tracing::warn!(?wait, "no generation serves: connections wait in the queue until the next start");
            }
            Notice::LameDuck(until) => {
                let time = until.since(self.now());
                tracing::info!(?time, "stopping was asked for: serves on for that long first");
                self.upward.stopping(now);
            }
            Notice::Stopping => {
                tracing::info!("stopping: waiting for the last generation to finish");
                self.upward.stopping(now);
                self.nobody_follows();
            }
        }
        self.upward.status(&self.one_line());
    }

    fn transaction_ended(&mut self, id: UpgradeId, outcome: Outcome, now: Instant) {
        let candidate = self.reports.candidate(id);
        let old_serves = self.machine.serving().is_some() && outcome != Outcome::Succeeded;
        let (reason, stderr) = match outcome {
            Outcome::Failed(failure) => {
                let candidate = candidate.and_then(|candidate| self.running.get(&candidate));
                let reason = self.explain(failure, candidate);
                let stderr = candidate.map(Running::last_words).unwrap_or_default();
                tracing::error!(upgrade = %id, old_serves, "failed: {reason}");
                if let Some(candidate) = candidate {
                    self.restore_flags(candidate.id);
                }
                self.last_failure = Some(reason.clone());
                (Some(reason), stderr)
            }
            Outcome::Aborted(abort) => {
                let reason = self.explain_abort(abort, candidate);
                tracing::warn!(upgrade = %id, "aborted: {reason}");
                let candidate = candidate.and_then(|candidate| self.running.get(&candidate));
                let stderr = candidate.filter(|_| abort != Abort::Asked).map(Running::last_words).unwrap_or_default();
                if let Some(candidate) = candidate {
                    self.restore_flags(candidate.id);
                }
                (Some(reason), stderr)
            }
            Outcome::RolledBack => (Some("rolled back in its bake".to_owned()), Vec::new()),
            Outcome::Superseded => (Some("a later request took its place".to_owned()), Vec::new()),
            Outcome::Cancelled => {
                if let Some(candidate) = candidate {
                    self.restore_flags(candidate);
                }
                let reason = match self.machine.life() {
                    Life::Running => "rolled back before the switch",
                    _ => "the supervisor is being stopped",
                };
                (Some(reason.to_owned()), Vec::new())
            }
            Outcome::Succeeded => {
                let lost = self.lost_beside_a_canary(id);
                tracing::info!(upgrade = %id, "succeeded");
                (lost, Vec::new())
            }
        };
        match outcome {
            Outcome::Failed(_) | Outcome::Aborted(_) | Outcome::RolledBack | Outcome::Succeeded => {
                self.upward.reloaded(id, reason.clone().filter(|_| old_serves), now);
            }
            // Of one that never began, or whose end something else is told of.
            Outcome::Superseded | Outcome::Cancelled => self.upward.reloaded(id, None, now),
        }
        if old_serves {
            // Taken over from a supervisor that was killed, and it stays.
            self.upward.ready(now);
        }
        self.reports.ended(id, Ending { outcome, reason, stderr, old_serves }, now);
        self.forget_programs();
    }
}
