//! The transaction: start a candidate, switch, bake, fall back; and the request that waits for its turn.

use super::generation::InFlight;
use super::stopping::Life;
use super::{
    Abort, Action, Answer, Canary, Failure, GenerationId, Kind, Machine, Notice, Outcome, Phase, Refusal, Source,
    Stage, Time, UpgradeId,
};
use serde::{Deserialize, Serialize};

/// Whose programs serve, named by the generation that resolved each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Versions {
    /// What a restart and a recovery run: the newest that became ready and was not rolled back.
    pub current: Option<GenerationId>,
    /// What a rollback runs.
    pub previous: Option<GenerationId>,
}

impl Versions {
    fn switched_to(self, program: GenerationId) -> Self {
        if self.current == Some(program) {
            return self;
        }
        Versions { current: Some(program), previous: self.current }
    }
}

/// The one request that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Pending {
    /// Its transaction.
    pub upgrade: UpgradeId,
    /// Its kind.
    pub kind: Kind,
    /// How its candidate is tried before the switch.
    pub canary: Option<Canary>,
    /// Whether its waiting was told.
    pub told: bool,
}

impl Machine {
    /// Accepts a request. The last one wins: of the same kind it joins the one that waits, else it takes its place.
    pub(super) fn ask(&mut self, kind: Kind, canary: Option<Canary>) -> Answer {
        if self.life != Life::Running {
            return Answer::Refused(Refusal::Stopping);
        }
        if let Some(pending) = self.pending {
            if pending.kind == kind && pending.canary == canary {
                return Answer::Accepted(pending.upgrade);
            }
            self.notice(Notice::Ended(pending.upgrade, Outcome::Superseded));
        }
        let upgrade = self.new_upgrade();
        self.pending = Some(Pending { upgrade, kind, canary, told: false });
        Answer::Accepted(upgrade)
    }

    pub(super) fn ask_restart(&mut self) -> Answer {
        if self.versions.current.is_none() {
            return Answer::Refused(Refusal::NothingServed);
        }
        self.ask(Kind::Restart, None)
    }

    /// In a bake a switch back; before the switch, in a canary too, the candidate's end; otherwise a new generation.
    pub(super) fn ask_rollback(&mut self, now: Time) -> Answer {
        if self.life != Life::Running {
            return Answer::Refused(Refusal::Stopping);
        }
        match self.stage {
            Stage::Baking { flight, .. } => {
                let answer = self.rolled_back_at_once();
                self.switch_back(Outcome::RolledBack);
                self.drain(flight.candidate, now);
                answer
            }
            Stage::Canary { flight, .. } => {
                let answer = self.rolled_back_at_once();
                self.end_canary(Outcome::Aborted(Abort::Asked));
                self.drain(flight.candidate, now);
                answer
            }
            Stage::Starting(flight) if self.serving.is_some() => {
                let answer = self.rolled_back_at_once();
                self.stage = Stage::Idle;
                self.notice(Notice::Ended(flight.upgrade, Outcome::Cancelled));
                self.discard(flight.candidate, now);
                answer
            }
            Stage::Idle | Stage::Starting(_) | Stage::Backoff { .. } => {
                if self.versions.previous.is_none() {
                    return Answer::Refused(Refusal::NothingBefore);
                }
                self.ask(Kind::Rollback, None)
            }
        }
    }

    fn rolled_back_at_once(&mut self) -> Answer {
        self.cancel_pending(Outcome::Superseded);
        let upgrade = self.new_upgrade();
        self.notice(Notice::Queued(upgrade, Kind::Rollback));
        self.notice(Notice::Ended(upgrade, Outcome::Succeeded));
        Answer::Accepted(upgrade)
    }

    pub(super) fn cancel_pending(&mut self, outcome: Outcome) {
        if let Some(pending) = self.pending.take() {
            self.notice(Notice::Ended(pending.upgrade, outcome));
        }
    }

    /// Gives the request that waits its turn, if this is it.
    pub(super) fn next_in_line(&mut self, now: Time) {
        let Some(pending) = self.pending else { return };
        let free = match self.stage {
            Stage::Idle | Stage::Backoff { .. } => true,
            Stage::Starting(_) | Stage::Canary { .. } | Stage::Baking { .. } => false,
        };
        // No upgrade cuts a connection: past the limit it waits until a generation is gone, unless nobody serves.
        let leaving = self.generations.values().filter(|generation| generation.is_leaving()).count();
        if free && (leaving < self.policy.max_draining || self.serving.is_none()) {
            self.pending = None;
            self.begin(pending.upgrade, pending.kind, pending.canary, now);
        } else if !pending.told {
            self.pending = Some(Pending { told: true, ..pending });
            self.notice(Notice::Queued(pending.upgrade, pending.kind));
        }
    }

    /// Spawns the candidate of a transaction.
    pub(super) fn begin(&mut self, upgrade: UpgradeId, kind: Kind, canary: Option<Canary>, now: Time) {
        let recorded = match kind {
            Kind::Start | Kind::Upgrade => None,
            Kind::Rollback => self.versions.previous,
            Kind::Restart | Kind::Recovery => self.versions.current,
        };
        let from = self.serving;
        let candidate = self.spawn(recorded.map_or(Source::Fresh, Source::Recorded), now);
        self.stage = Stage::Starting(InFlight { upgrade, kind, candidate, canary });
        self.notice(Notice::Started { upgrade, kind, from, to: candidate });
    }

    /// The switch, or a canary before it, where there is somebody to share with.
    pub(super) fn candidate_ready(&mut self, id: GenerationId, now: Time) {
        let Stage::Starting(flight) = self.stage else {
            return;
        };
        if flight.candidate != id {
            return;
        }
        match flight.canary.filter(|_| self.serving.is_some()) {
            Some(canary) => self.begin_canary(flight, canary, now),
            None => self.switch_to(flight, now),
        }
    }

    /// The switch.
    pub(super) fn switch_to(&mut self, flight: InFlight, now: Time) {
        let id = flight.candidate;
        let from = self.serving.replace(id);
        self.enter(id, Phase::Serving { since: now });
        self.act(Action::Switch { from, to: id });
        let before = self.versions;
        if let Some(generation) = self.generations.get(&id) {
            self.versions = before.switched_to(generation.program);
        }
        self.restarts.lost = None;
        match from {
            Some(old) if !self.policy.bake.is_zero() => {
                if let Some(Phase::Serving { since }) = self.phase(old) {
                    self.enter(old, Phase::Standby { since });
                }
                self.stage = Stage::Baking { flight, standby: old, until: now + self.policy.bake, before };
                self.notice(Notice::Baking(flight.upgrade));
            }
            Some(_) | None => {
                self.stage = Stage::Idle;
                self.notice(Notice::Ended(flight.upgrade, Outcome::Succeeded));
                if let Some(old) = from {
                    self.drain(old, now);
                }
            }
        }
    }

    pub(super) fn bake_over(&mut self, now: Time) {
        let Stage::Baking { flight, standby, .. } = self.stage else {
            return;
        };
        self.stage = Stage::Idle;
        self.notice(Notice::Ended(flight.upgrade, Outcome::Succeeded));
        self.drain(standby, now);
    }

    /// Nothing is left to go back to: the bake has lost its sense.
    pub(super) fn standby_lost(&mut self) {
        let Stage::Baking { flight, .. } = self.stage else {
            return;
        };
        self.stage = Stage::Idle;
        self.notice(Notice::Ended(flight.upgrade, Outcome::Succeeded));
    }

    /// In a bake: the standby is the incumbent again, with its version.
    pub(super) fn switch_back(&mut self, outcome: Outcome) {
        let Stage::Baking { flight, standby, before, .. } = self.stage else {
            return;
        };
        self.stage = Stage::Idle;
        self.versions = before;
        self.serving = Some(standby);
        if let Some(Phase::Standby { since }) = self.phase(standby) {
            self.enter(standby, Phase::Serving { since });
        }
        self.act(Action::Switch { from: Some(flight.candidate), to: standby });
        self.notice(Notice::Ended(flight.upgrade, outcome));
    }

    /// The candidate is gone or on its way out; whoever serves goes on.
    pub(super) fn candidate_failed(&mut self, id: GenerationId, failure: Failure, now: Time) {
        let Stage::Starting(flight) = self.stage else {
            return;
        };
        if flight.candidate != id {
            return;
        }
        self.stage = Stage::Idle;
        self.notice(Notice::Ended(flight.upgrade, Outcome::Failed(failure)));
        if self.serving.is_none() {
            self.nobody_serves(failure, now);
        }
    }

    /// Ends a candidate that nobody wants any more.
    pub(super) fn discard(&mut self, id: GenerationId, now: Time) {
        match self.phase(id) {
            Some(Phase::Spawning { .. }) => self.enter(id, Phase::Aborting),
            Some(_) => self.stop(id, now),
            None => {}
        }
    }
}
