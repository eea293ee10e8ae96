//! The canary: a candidate that is ready gets a share of what is new, in steps, before it is switched to.
//!
//! ```text
//! Starting ──ready──> Canary: step 0 ──time, check──> step 1 ─ … ─> the last ──time, check | promote──> switch
//!                       └─ abort, rollback, its check fails, it dies ─> the incumbent gets everything; the candidate drains
//! ```
//!
//! The incumbent serves all the while and hears of nothing. If it is lost, the candidate is there already, and is switched to.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::generation::InFlight;
use super::stopping::Life;
use super::{Abort, Action, Answer, GenerationId, Machine, Notice, Outcome, Phase, Refusal, Stage, Time};

/// A canary, as far as the core goes by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Canary {
    /// The driver's number for the rest of it: shares, networks, check. Two requests with the same one are the same.
    pub plan: u32,
    /// How many shares there are, one after the other; at least one.
    pub steps: u16,
    /// How long each of them lasts.
    pub interval: Duration,
    /// Whether the switch follows the last one by itself. Otherwise somebody asks for it.
    pub switches: bool,
    /// Whether there is a check, which has to succeed in each step before the next.
    pub checked: bool,
}

/// What the next step waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Wait {
    /// The end of this one's time.
    Until(Time),
    /// Its time is over: its check.
    Check,
    /// Somebody who asks.
    Asked,
}

impl Canary {
    fn wait(&self, step: u16, now: Time) -> Wait {
        if self.switches || step + 1 < self.steps {
            Wait::Until(now + self.interval)
        } else {
            Wait::Asked
        }
    }
}

impl Machine {
    /// A candidate is ready, and shares with the incumbent first.
    pub(super) fn begin_canary(&mut self, flight: InFlight, canary: Canary, now: Time) {
        self.enter(flight.candidate, Phase::Canary { since: now });
        self.enter_step(flight, canary, 0, now);
    }

    fn enter_step(&mut self, flight: InFlight, canary: Canary, step: u16, now: Time) {
        let Some(incumbent) = self.serving else { return };
        self.stage = Stage::Canary { flight, canary, step, wait: canary.wait(step, now), passed: !canary.checked };
        self.act(Action::Share { candidate: flight.candidate, incumbent, step });
        self.notice(Notice::Canary(flight.upgrade, step));
    }

    /// The time of a step is over.
    pub(super) fn step_due(&mut self, now: Time) {
        let Stage::Canary { flight, canary, step, passed, .. } = self.stage else { return };
        if passed {
            self.next_step(now);
        } else {
            self.stage = Stage::Canary { flight, canary, step, wait: Wait::Check, passed };
        }
    }

    fn next_step(&mut self, now: Time) {
        let Stage::Canary { flight, canary, step, .. } = self.stage else { return };
        if step + 1 < canary.steps {
            self.enter_step(flight, canary, step + 1, now);
        } else {
            self.switch_to(flight, now);
        }
    }

    /// The check of a step succeeded.
    pub(super) fn checked(&mut self, id: GenerationId, of: u16, now: Time) {
        match self.stage {
            Stage::Canary { flight, canary, step, wait, .. } if flight.candidate == id && step == of => {
                self.stage = Stage::Canary { flight, canary, step, wait, passed: true };
                match wait {
                    Wait::Check => self.next_step(now),
                    Wait::Until(_) | Wait::Asked => {}
                }
            }
            // Of an earlier step, or of a canary that is over.
            Stage::Canary { .. } | Stage::Idle | Stage::Starting(_) | Stage::Baking { .. } | Stage::Backoff { .. } => {}
        }
    }

    /// It failed, or the share could not be given.
    pub(super) fn check_failed(&mut self, id: GenerationId, now: Time) {
        match self.stage {
            Stage::Canary { flight, .. } if flight.candidate == id => {
                self.end_canary(Outcome::Aborted(Abort::Check));
                self.drain(id, now);
            }
            Stage::Canary { .. } | Stage::Idle | Stage::Starting(_) | Stage::Baking { .. } | Stage::Backoff { .. } => {}
        }
    }

    /// The candidate gets nothing new any more, and the incumbent everything. What becomes of the candidate is the caller's.
    pub(super) fn end_canary(&mut self, outcome: Outcome) {
        let Stage::Canary { flight, .. } = self.stage else { return };
        self.stage = Stage::Idle;
        if let Some(incumbent) = self.serving {
            self.act(Action::Unshare { candidate: flight.candidate, incumbent });
        }
        self.notice(Notice::Ended(flight.upgrade, outcome));
    }

    /// The switch now, whatever the step.
    pub(super) fn ask_promote(&mut self, now: Time) -> Answer {
        match (self.life, self.stage) {
            (Life::LameDuck { .. } | Life::Stopping { .. } | Life::Over, _) => Answer::Refused(Refusal::Stopping),
            (Life::Running, Stage::Canary { flight, .. }) => {
                self.switch_to(flight, now);
                Answer::Accepted(flight.upgrade)
            }
            (Life::Running, Stage::Idle | Stage::Starting(_) | Stage::Baking { .. } | Stage::Backoff { .. }) => {
                Answer::Refused(Refusal::NoCanary)
            }
        }
    }

    /// The end of a candidate before its switch. What waits for its turn has it then.
    pub(super) fn ask_abort(&mut self, now: Time) -> Answer {
        match (self.life, self.stage) {
            (Life::LameDuck { .. } | Life::Stopping { .. } | Life::Over, _) => Answer::Refused(Refusal::Stopping),
            (Life::Running, Stage::Canary { flight, .. }) => {
                self.end_canary(Outcome::Aborted(Abort::Asked));
                self.drain(flight.candidate, now);
                Answer::Accepted(flight.upgrade)
            }
            (Life::Running, Stage::Starting(flight)) if self.serving.is_some() => {
                self.stage = Stage::Idle;
                self.notice(Notice::Ended(flight.upgrade, Outcome::Aborted(Abort::Asked)));
                self.discard(flight.candidate, now);
                Answer::Accepted(flight.upgrade)
            }
            (Life::Running, Stage::Idle | Stage::Starting(_) | Stage::Baking { .. } | Stage::Backoff { .. }) => {
                Answer::Refused(Refusal::NothingToAbort)
            }
        }
    }
}
