//! What is true outside of the core, kept beside it: which processes live, who was ready, what was promised to whom.

use std::collections::{BTreeMap, BTreeSet};

use zddsup::core::canary::Wait;
use zddsup::core::stopping::Life;
use zddsup::core::upgrade::Pending;
use zddsup::core::{
    Action, Answer, Event, Finish, GenerationId, Kind, Machine, Notice, Outcome, Phase, Request, RestartWhen, Source,
    Stage, Time, UpgradeId,
};

/// How many of each may still happen.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Budget {
    pub upgrades: u8,
    pub rollbacks: u8,
    pub restarts: u8,
    pub stops: u8,
    pub quits: u8,
    /// Upgrades by a canary.
    pub canaries: u8,
    pub promotes: u8,
    pub aborts: u8,
    /// Checks of a canary that fail.
    pub bad_checks: u8,
    /// Exits that leave other processes of the generation behind, stale messages, watchdogs.
    pub rude: u8,
    /// Exits and failed spawns of generations that were not told to end.
    pub losses: u8,
}

/// A generation's processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Process {
    Asked,
    Running,
    MainGone,
    Gone,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    pub processes: BTreeMap<GenerationId, Process>,
    pub ready: BTreeSet<GenerationId>,
    pub told_to_end: BTreeSet<GenerationId>,
    pub open: BTreeSet<UpgradeId>,
    pub ever_ready: bool,
    pub stop_asked: bool,
    pub fresh_owed: bool,
    pub finished: Option<Finish>,
    pub broken: BTreeSet<&'static str>,
}

pub const QUEUE: &str = "1 never refused, 2 never lost";
pub const READY_FIRST: &str = "3 ready first";
pub const UNCHANGED: &str = "4 a failed upgrade changes nothing";
pub const ONE: &str = "5 one at a time";
pub const NOTHING_LEFT: &str = "6 nothing left behind";
pub const FRESH: &str = "7 fresh every time";
pub const CANARY: &str = "a canary takes nothing from the incumbent but its share, and ends";
pub const ALIVE: &str = "nothing is forgotten";

impl World {
    pub fn new(first: UpgradeId) -> Self {
        World {
            processes: BTreeMap::new(),
            ready: BTreeSet::new(),
            told_to_end: BTreeSet::new(),
            open: BTreeSet::from([first]),
            ever_ready: false,
            stop_asked: false,
            fresh_owed: false,
            finished: None,
            broken: BTreeSet::new(),
        }
    }

    pub fn require(&mut self, promise: &'static str, holds: bool) {
        if !holds {
            self.broken.insert(promise);
        }
    }

    pub fn keeps(&self, promise: &'static str) -> bool {
        !self.broken.contains(promise)
    }

    fn lives(&self, id: GenerationId) -> bool {
        self.processes.get(&id).is_some_and(|process| matches!(process, Process::Asked | Process::Running))
    }

    /// The world's side of an event, before the core hears of it.
    pub fn happens(&mut self, event: Event) {
        match event {
            Event::Spawned(id) => drop(self.processes.insert(id, Process::Running)),
            Event::SpawnFailed(id) | Event::Emptied(id) => drop(self.processes.insert(id, Process::Gone)),
            Event::Ready(id) => {
                if self.processes.get(&id).is_some_and(|process| matches!(process, Process::Asked | Process::Running)) {
                    self.ready.insert(id);
                }
            }
            Event::Exited { generation, alone, .. } => {
                let left = if alone { Process::Gone } else { Process::MainGone };
                self.processes.insert(generation, left);
            }
            Event::Drained(_)
            | Event::Extended(..)
            | Event::WatchdogExpired(_)
            | Event::Checked(..)
            | Event::CheckFailed(_)
            | Event::Timeout => {}
        }
    }

    pub fn asked(&mut self, request: Request, answer: Answer, before: &Machine, after: &Machine) {
        match (request, answer) {
            (Request::Stop | Request::Quit, _) => self.stop_asked = true,
            (_, Answer::Accepted(id)) => {
                if matches!(request, Request::Promote | Request::Abort) {
                    return self.answered(request, id, before, after);
                }
                self.open.insert(id);
                if matches!(request, Request::Upgrade | Request::Canary(_)) {
                    self.fresh_owed = true;
                    let canary = match request {
                        Request::Canary(canary) => Some(canary),
                        _ => None,
                    };
                    let same = |pending: &Pending| pending.kind == Kind::Upgrade && pending.canary == canary;
                    if let Some(pending) = before.pending().filter(same) {
                        self.require(ONE, id == pending.upgrade);
                    }
                }
            }
            (_, Answer::Refused(_)) => {
                let same = before.serving() == after.serving() && before.stage() == after.stage();
                self.require(UNCHANGED, same);
            }
            (_, Answer::Stopping) => self.require(ALIVE, false),
        }
    }

    /// A canary was promoted, or something was aborted: the transaction that was under way, and its incumbent as told.
    fn answered(&mut self, request: Request, id: UpgradeId, before: &Machine, after: &Machine) {
        let (upgrade, candidate) = match before.stage() {
            Stage::Canary { flight, .. } => (flight.upgrade, flight.candidate),
            Stage::Starting(flight) if request == Request::Abort => (flight.upgrade, flight.candidate),
            _ => return self.require(CANARY, false),
        };
        let serves = if request == Request::Promote { Some(candidate) } else { before.serving() };
        self.require(CANARY, id == upgrade && after.serving() == serves);
    }

    /// The core's answer to an event (`cause`) or request.
    pub fn performs(&mut self, action: &Action, cause: Cause, before: &Machine, after: &Machine) {
        self.require(QUEUE, self.finished.is_none());
        match *action {
            Action::Spawn { generation, source } => {
                self.require(ONE, !self.processes.contains_key(&generation));
                self.processes.insert(generation, Process::Asked);
                if source == Source::Fresh {
                    self.fresh_owed = false;
                }
            }
            Action::Switch { to, .. } => {
                self.ever_ready = true;
                self.require(READY_FIRST, self.ready.contains(&to) && self.lives(to));
                self.require(CANARY, may_switch(cause, before));
            }
            Action::Share { candidate, incumbent, step } => {
                self.require(READY_FIRST, self.ready.contains(&candidate) && self.lives(candidate));
                self.require(CANARY, self.lives(incumbent) && before.serving() == Some(incumbent));
                // One step after the other, each once, and none without the check of the one before.
                let follows = match before.stage() {
                    Stage::Canary { step: last, .. } if cause == Cause::Event(Event::Timeout) => {
                        step == last + 1 && matches!(before.stage(), Stage::Canary { passed: true, .. })
                    }
                    Stage::Canary { step: last, .. } => {
                        step == last + 1 && cause == Cause::Event(Event::Checked(candidate, last))
                    }
                    _ => step == 0,
                };
                self.require(CANARY, follows);
            }
            Action::Unshare { candidate, incumbent } => {
                self.require(CANARY, before.serving() == Some(incumbent) && candidate != incumbent);
            }
            Action::Drain(id) | Action::Stop(id) | Action::Abort(id) | Action::Kill(id) => {
                self.told_to_end.insert(id);
                self.may_be_told_to_end(id, cause.event(), before, after);
                let exists = self.processes.get(&id).is_some_and(|&process| process != Process::Gone);
                self.require(NOTHING_LEFT, exists);
            }
            Action::Release(id) => self.require(NOTHING_LEFT, self.processes.get(&id) == Some(&Process::Gone)),
            Action::Notice(notice) => self.told(notice, before, after),
            Action::Finish(finish) => {
                let gone = self.processes.values().all(|&process| process == Process::Gone);
                self.require(NOTHING_LEFT, gone);
                self.require(QUEUE, gone);
                self.require(ALIVE, self.open.is_empty());
                self.require(QUEUE, self.may_finish(finish, after));
                self.finished = Some(finish);
            }
        }
    }

    /// Whoever served is told to end only when another is ready, when everything ends, or when it is lost itself.
    fn may_be_told_to_end(&mut self, id: GenerationId, cause: Option<Event>, before: &Machine, after: &Machine) {
        let wanted =
            before.serving() == Some(id) || matches!(before.stage(), Stage::Baking { standby, .. } if standby == id);
        if !wanted {
            return;
        }
        let replaced = after.serving().is_some_and(|serving| serving != id && self.ready.contains(&serving));
        let ending = !matches!(after.life(), Life::Running);
        let lost = match cause {
            Some(Event::Exited { generation, .. } | Event::WatchdogExpired(generation)) => generation == id,
            _ => false,
        };
        self.require(READY_FIRST, replaced || ending || lost);
        let failed = matches!(cause, Some(Event::SpawnFailed(_)));
        self.require(UNCHANGED, !failed || ending);
    }

    fn told(&mut self, notice: Notice, before: &Machine, after: &Machine) {
        match notice {
            Notice::Queued(id, _) | Notice::Started { upgrade: id, .. } => drop(self.open.insert(id)),
            Notice::Ended(id, outcome) => {
                let was_open = self.open.remove(&id);
                self.require(ALIVE, was_open);
                if matches!(outcome, Outcome::Aborted(_)) {
                    let same = before.serving().is_some_and(|id| phase(before, id) == phase(after, id));
                    self.require(CANARY, same && after.serving() == before.serving());
                }
                if matches!(outcome, Outcome::Superseded | Outcome::Cancelled)
                    && before.pending().is_none_or(|pending| pending.upgrade == id)
                    && after.pending().is_none_or(|pending| pending.kind != Kind::Upgrade)
                {
                    self.fresh_owed = false;
                }
                if matches!(outcome, Outcome::Failed(_)) && matches!(before.stage(), Stage::Starting(_)) {
                    // What served goes on: same generation, same phase.
                    let same = before
                        .serving()
                        .is_none_or(|id| after.serving() == Some(id) && phase(before, id) == phase(after, id));
                    self.require(UNCHANGED, same || after.life() != Life::Running);
                }
            }
            Notice::Canary(..) | Notice::Baking(_) | Notice::Backoff(_) | Notice::LameDuck(_) | Notice::Stopping => {}
        }
    }

    fn may_finish(&self, finish: Finish, after: &Machine) -> bool {
        match finish {
            Finish::Stopped => self.stop_asked,
            Finish::StartFailed(_) => !self.ever_ready,
            Finish::ServiceEnded(_) => after.policy().restart != RestartWhen::Always,
            Finish::RestartLimit => after.policy().restart_limit.is_some(),
        }
    }

    /// After each step: what must hold in every state.
    pub fn settled(&mut self, machine: &Machine, now: Time) {
        let candidates = machine
            .generations()
            .filter(|(_, generation)| matches!(generation.phase, Phase::Spawning { .. } | Phase::Starting { .. }))
            .count();
        self.require(ONE, candidates <= 1);
        let sharing: Vec<_> = machine
            .generations()
            .filter(|(_, generation)| matches!(generation.phase, Phase::Canary { .. }))
            .map(|(id, _)| id)
            .collect();
        if let Stage::Canary { flight, canary, step, wait, passed } = machine.stage() {
            self.require(CANARY, sharing == [flight.candidate] && machine.serving().is_some());
            self.require(ONE, candidates == 0);
            // It ends: by its steps, by a check that is under way, or by somebody who was told that he has to.
            let ends = match wait {
                Wait::Until(until) => until > now,
                Wait::Check => canary.checked && !passed,
                Wait::Asked => !canary.switches && step + 1 == canary.steps,
            };
            self.require(CANARY, ends);
        } else {
            self.require(CANARY, sharing.is_empty());
        }
        let serving: Vec<_> = machine
            .generations()
            .filter(|(_, generation)| matches!(generation.phase, Phase::Serving { .. }))
            .map(|(id, _)| id)
            .collect();
        self.require(ONE, serving == Vec::from_iter(machine.serving()));
        if self.fresh_owed {
            let waits = machine.pending().is_some_and(|pending| pending.kind == Kind::Upgrade);
            self.require(FRESH, waits);
        }
        for (id, generation) in machine.generations() {
            // Whatever is on its way out has an end in sight, or waits for the driver's answer.
            let ends = generation.deadline().is_some() || generation.phase == Phase::Aborting;
            self.require(NOTHING_LEFT, !generation.is_leaving() || ends);
            self.require(NOTHING_LEFT, self.processes.get(&id).is_some_and(|&process| process != Process::Gone));
        }
        if machine.life() == Life::Running {
            let idle = matches!(machine.stage(), Stage::Idle);
            self.require(ALIVE, !(idle && machine.serving().is_none()));
            let leaving = machine.generations().filter(|(_, generation)| generation.is_leaving()).count();
            let free = matches!(machine.stage(), Stage::Idle | Stage::Backoff { .. });
            let waits = leaving >= machine.policy().max_draining && machine.serving().is_some();
            self.require(ALIVE, machine.pending().is_none() || !free || waits);
        } else if !matches!(machine.life(), Life::LameDuck { .. }) {
            self.require(ALIVE, machine.generations().count() > 0 || self.finished.is_some());
        }
        self.require(ALIVE, machine.poll_timeout().is_none_or(|due| due > now));
    }
}

/// Why something is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    Start,
    Request(Request),
    Event(Event),
}

impl Cause {
    pub fn event(self) -> Option<Event> {
        match self {
            Cause::Event(event) => Some(event),
            Cause::Start | Cause::Request(_) => None,
        }
    }
}

/// From a canary: because it was asked for, at the end of the last step, or in the place of an incumbent that was lost.
fn may_switch(cause: Cause, before: &Machine) -> bool {
    let Stage::Canary { canary, step, passed, .. } = before.stage() else { return true };
    let last = canary.switches && step + 1 == canary.steps;
    match cause {
        Cause::Request(request) => request == Request::Promote,
        Cause::Event(Event::Timeout) => last && passed,
        Cause::Event(Event::Checked(..)) => last,
        Cause::Event(Event::Exited { generation, .. } | Event::WatchdogExpired(generation)) => {
            before.serving() == Some(generation)
        }
        Cause::Event(_) | Cause::Start => false,
    }
}

fn phase(machine: &Machine, id: GenerationId) -> Option<Phase> {
    machine.generations().find(|(other, _)| *other == id).map(|(_, generation)| generation.phase)
}
