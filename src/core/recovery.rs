//! The incumbent was lost: restart policy, backoff, limit.

use serde::{Deserialize, Serialize};

use super::policy::RestartWhen;
use super::stopping::Life;
use super::{End, Failure, Finish, GenerationId, Kind, Machine, Notice, Outcome, Stage, Time};

/// What is remembered of losses.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Restarts {
    /// How the last incumbent ended, while nobody has taken its place.
    pub lost: Option<End>,
    /// Restarts in a row, without a stable time between.
    pub in_a_row: u32,
    /// When restarts happened, as far as the limit looks back.
    pub recent: Vec<Time>,
}

impl Machine {
    /// The incumbent ended or hangs. In a bake the standby is back at once.
    pub(super) fn incumbent_lost(&mut self, id: GenerationId, end: End, in_bake: Failure, since: Time, now: Time) {
        match self.stage {
            Stage::Baking { .. } => return self.switch_back(Outcome::Failed(in_bake)),
            // The candidate is ready: nobody has to wait.
            Stage::Canary { flight, .. } => {
                self.serving = None;
                return self.switch_to(flight, now);
            }
            Stage::Idle | Stage::Starting(_) | Stage::Backoff { .. } => {}
        }
        debug_assert_eq!(self.serving, Some(id));
        self.serving = None;
        self.restarts.lost = Some(end);
        if now.since(since) >= self.policy.stable_after {
            self.restarts.in_a_row = 0;
        }
        match self.stage {
            // The candidate may take its place; what follows if it fails is decided then.
            Stage::Starting(_) => {}
            Stage::Idle | Stage::Canary { .. } | Stage::Baking { .. } | Stage::Backoff { .. } => {
                self.service_ended(end, now);
            }
        }
    }

    /// A candidate failed and nobody serves.
    pub(super) fn nobody_serves(&mut self, failure: Failure, now: Time) {
        if self.versions.current.is_none() {
            if self.pending.is_none() {
                self.wind_up(Finish::StartFailed(failure), now);
            }
            return;
        }
        let end = match (self.restarts.lost, failure) {
            (Some(end), _) | (None, Failure::Exited(end) | Failure::DiedInBake(end)) => end,
            (None, Failure::Spawn | Failure::StartTimeout | Failure::HungInBake) => End::Unknown,
        };
        self.service_ended(end, now);
    }

    fn service_ended(&mut self, end: End, now: Time) {
        match self.life {
            Life::Running => {}
            Life::LameDuck { .. } => return self.wind_up(Finish::Stopped, now),
            Life::Stopping { .. } | Life::Over => return,
        }
        // A new version that waits is what everybody wants now.
        if self.pending.is_some() {
            return;
        }
        let wanted = match self.policy.restart {
            RestartWhen::Always => true,
            RestartWhen::OnFailure => !end.is_success(),
            RestartWhen::Never => false,
        };
        if !wanted {
            return self.wind_up(Finish::ServiceEnded(end), now);
        }
        if self.limit_reached(now) {
            return self.wind_up(Finish::RestartLimit, now);
        }
        let until = now + self.policy.backoff(self.restarts.in_a_row);
        self.restarts.in_a_row = self.restarts.in_a_row.saturating_add(1);
        self.stage = Stage::Backoff { until };
        self.notice(Notice::Backoff(until));
        if until <= now {
            self.recover(now);
        }
    }

    fn limit_reached(&mut self, now: Time) -> bool {
        let Some(limit) = self.policy.restart_limit else {
            return false;
        };
        self.restarts.recent.retain(|&at| now.since(at) < limit.within);
        let reached = self.restarts.recent.len() >= limit.count;
        self.restarts.recent.push(now);
        reached
    }

    pub(super) fn recover(&mut self, now: Time) {
        let upgrade = self.new_upgrade();
        self.begin(upgrade, Kind::Recovery, None, now);
    }
}
