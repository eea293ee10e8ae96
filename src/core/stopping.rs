//! How generations and the service end: drain, stop, kill, sweep; lame duck, graceful stop, quick stop.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Action, Answer, Finish, GenerationId, Machine, Notice, Outcome, Phase, Stage, Time};

/// How long after a SIGKILL the next one follows, for what was forked meanwhile.
const KILL_AGAIN: Duration = Duration::from_secs(1);

/// Whether the service runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Life {
    /// It does.
    Running,
    /// Stopping was asked for; it serves on for load balancers that take a while to notice.
    LameDuck {
        /// When the drain begins.
        until: Time,
    },
    /// Every generation is on its way out.
    Stopping {
        /// Why.
        finish: Finish,
        /// Whether draining was cut short.
        quick: bool,
    },
    /// Everything is gone, [`Action::Finish`] was given.
    Over,
}

/// How long what is left of a generation, after its main process, is waited for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Patience {
    /// The stop time.
    StopTime,
    /// Until the end of its drain, or the stop time if that is longer; none is no end.
    RestOfDrain(Option<Time>),
}

impl Life {
    pub(super) fn deadline(self) -> Option<Time> {
        match self {
            Life::LameDuck { until } => Some(until),
            Life::Running | Life::Stopping { .. } | Life::Over => None,
        }
    }
}

impl Machine {
    pub(super) fn ask_stop(&mut self, now: Time) -> Answer {
        match self.life {
            Life::Running if self.serving.is_some() && !self.policy.lame_duck.is_zero() => {
                let until = now + self.policy.lame_duck;
                self.life = Life::LameDuck { until };
                self.cancel_transactions(now);
                self.notice(Notice::LameDuck(until));
                Answer::Stopping
            }
            Life::Running => {
                self.wind_up(Finish::Stopped, now);
                Answer::Stopping
            }
            Life::LameDuck { .. } | Life::Stopping { .. } | Life::Over => self.ask_quit(now),
        }
    }

    pub(super) fn ask_quit(&mut self, now: Time) -> Answer {
        let again = matches!(self.life, Life::Stopping { quick: true, .. });
        match self.life {
            Life::Running | Life::LameDuck { .. } => self.wind_up(Finish::Stopped, now),
            Life::Stopping { .. } | Life::Over => {}
        }
        if let Life::Stopping { finish, .. } = self.life {
            self.life = Life::Stopping { finish, quick: true };
        }
        let all: Vec<_> = self.generations.iter().map(|(&id, generation)| (id, generation.phase)).collect();
        for (id, phase) in all {
            match phase {
                Phase::Spawning { .. } => self.enter(id, Phase::Aborting),
                Phase::Starting { .. }
                | Phase::Canary { .. }
                | Phase::Serving { .. }
                | Phase::Standby { .. }
                | Phase::Draining { .. }
                | Phase::Stopping { .. }
                    if again =>
                {
                    self.kill(id, now);
                }
                Phase::Starting { .. }
                | Phase::Canary { .. }
                | Phase::Serving { .. }
                | Phase::Standby { .. }
                | Phase::Draining { .. } => {
                    self.stop(id, now);
                }
                Phase::Sweeping { .. } if again => self.clear(id, now),
                Phase::Sweeping { .. } => self.sweep_quickly(id, now),
                Phase::Aborting | Phase::Stopping { .. } | Phase::Killing { .. } | Phase::Clearing { .. } => {}
            }
        }
        Answer::Stopping
    }

    pub(super) fn lame_duck_over(&mut self, now: Time) {
        self.wind_up(Finish::Stopped, now);
    }

    /// Drains whoever serves, stops whoever does not yet; the end comes when the last one is gone.
    pub(super) fn wind_up(&mut self, finish: Finish, now: Time) {
        self.life = Life::Stopping { finish, quick: false };
        self.cancel_transactions(now);
        self.notice(Notice::Stopping);
        if let Some(serving) = self.serving.take() {
            self.drain(serving, now);
        }
    }

    /// Ends what is in flight and what waits. In a canary the incumbent stays it, in a bake the candidate stays the incumbent.
    fn cancel_transactions(&mut self, now: Time) {
        self.cancel_pending(Outcome::Cancelled);
        match self.stage {
            Stage::Idle | Stage::Backoff { .. } => self.stage = Stage::Idle,
            Stage::Canary { flight, .. } => {
                self.end_canary(Outcome::Cancelled);
                self.drain(flight.candidate, now);
            }
            Stage::Starting(flight) => {
                self.stage = Stage::Idle;
                self.notice(Notice::Ended(flight.upgrade, Outcome::Cancelled));
                self.discard(flight.candidate, now);
            }
            Stage::Baking { flight, standby, .. } => {
                self.stage = Stage::Idle;
                self.notice(Notice::Ended(flight.upgrade, Outcome::Cancelled));
                self.drain(standby, now);
            }
        }
    }

    /// After each event and request: whose turn it is, or the end.
    pub(super) fn settle(&mut self, now: Time) {
        match self.life {
            Life::Running => self.next_in_line(now),
            Life::Stopping { finish, .. } if self.generations.is_empty() => {
                self.life = Life::Over;
                self.act(Action::Finish(finish));
            }
            Life::LameDuck { .. } | Life::Stopping { .. } | Life::Over => {}
        }
    }

    pub(super) fn drain(&mut self, id: GenerationId, now: Time) {
        let deadline = self.policy.drain_timeout.map(|limit| now + limit);
        self.enter(id, Phase::Draining { deadline });
        self.act(Action::Drain(id));
    }

    pub(super) fn stop(&mut self, id: GenerationId, now: Time) {
        let kill_at = now + self.policy.stop_timeout;
        self.enter(id, Phase::Stopping { kill_at });
        self.act(Action::Stop(id));
    }

    pub(super) fn abort(&mut self, id: GenerationId, now: Time) {
        let kill_at = now + self.policy.stop_timeout;
        self.enter(id, Phase::Stopping { kill_at });
        self.act(Action::Abort(id));
    }

    pub(super) fn kill(&mut self, id: GenerationId, now: Time) {
        self.enter(id, Phase::Killing { again_at: now + KILL_AGAIN });
        self.act(Action::Kill(id));
    }

    pub(super) fn clear(&mut self, id: GenerationId, now: Time) {
        self.enter(id, Phase::Clearing { again_at: now + KILL_AGAIN });
        self.act(Action::Kill(id));
    }

    /// The main process was reaped. What is left of it gets the stop signal, and the rest of a drain's time.
    pub(super) fn sweep(&mut self, id: GenerationId, alone: bool, patience: Patience, now: Time) {
        if alone {
            return self.release(id);
        }
        let stop_by = now + self.policy.stop_timeout;
        let kill_at = match patience {
            Patience::StopTime => Some(stop_by),
            Patience::RestOfDrain(deadline) => deadline.map(|deadline| deadline.max(stop_by)),
        };
        self.enter(id, Phase::Sweeping { kill_at });
        self.act(Action::Stop(id));
    }

    fn sweep_quickly(&mut self, id: GenerationId, now: Time) {
        let kill_at = Some(now + self.policy.stop_timeout);
        self.enter(id, Phase::Sweeping { kill_at });
        self.act(Action::Stop(id));
    }

    pub(super) fn release(&mut self, id: GenerationId) {
        self.generations.remove(&id);
        self.act(Action::Release(id));
    }
}
