//! The core and the world as one state space, with times relative to now so that it is finite.

use std::hash::{Hash, Hasher};

use stateright::{Model, Property};
use zddsup::core::canary::Wait;
use zddsup::core::stopping::Life;
use zddsup::core::{
    Action, Answer, Canary, End, Event, GenerationId, Machine, Phase, Policy, Request, Source, Stage, Time,
};

use crate::world::{self, Budget, Cause, Process, World};

#[derive(Debug, Clone)]
pub struct Exploration {
    pub policy: Policy,
    pub budget: Budget,
    pub mutation: Option<Mutation>,
    /// What [`Request::Canary`] asks for.
    pub canary: Canary,
}

/// A core that breaks a promise, made by meddling with what goes in and out of the real one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    SwitchesBeforeReady,
    StopsOldFirst,
    FailureTouchesIncumbent,
    LosesRequest,
    TwoCandidates,
    ReleasesEarly,
    RunsTheOldProgram,
    FinishesEarly,
    EndsTheIncumbentInACanary,
    SwitchesInACanary,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    Ask(Request),
    Happen(Event),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    machine: Machine,
    world: World,
    budget: Budget,
    now: Time,
}

impl Hash for State {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let left = |time: Time| time.since(self.now);
        let stable = self.machine.policy().stable_after;
        for (id, generation) in self.machine.generations() {
            id.hash(hasher);
            std::mem::discriminant(&generation.phase).hash(hasher);
            generation.program.hash(hasher);
            generation.deadline().map(left).hash(hasher);
            if let Phase::Canary { since } | Phase::Serving { since } | Phase::Standby { since } = generation.phase {
                self.now.since(since).min(stable).hash(hasher);
            }
        }
        std::mem::discriminant(&self.machine.stage()).hash(hasher);
        match self.machine.stage() {
            Stage::Idle => {}
            Stage::Starting(flight) => flight.hash(hasher),
            Stage::Canary { flight, canary, step, wait, passed } => {
                let wait = match wait {
                    Wait::Until(until) => Wait::Until(Time(left(until))),
                    wait @ (Wait::Check | Wait::Asked) => wait,
                };
                (flight, canary, step, wait, passed).hash(hasher);
            }
            Stage::Baking { flight, standby, until, before } => {
                (flight, standby, left(until), before).hash(hasher);
            }
            Stage::Backoff { until } => left(until).hash(hasher),
        }
        match self.machine.life() {
            Life::LameDuck { until } => left(until).hash(hasher),
            other => other.hash(hasher),
        }
        self.machine.versions().hash(hasher);
        self.machine.pending().hash(hasher);
        let restarts = self.machine.restarts();
        (restarts.lost, restarts.in_a_row, restarts.recent.len()).hash(hasher);
        self.world.hash(hasher);
        self.budget.hash(hasher);
    }
}

impl State {
    fn take(&mut self, mutation: Option<Mutation>, cause: Cause, before: &Machine) {
        while let Some(action) = self.machine.poll_action() {
            let mut actions = vec![action];
            if let Some(mutation) = mutation {
                mutation.on_action(&mut actions, cause.event(), before);
            }
            for action in actions {
                self.world.performs(&action, cause, before, &self.machine);
            }
        }
        self.world.settled(&self.machine, self.now);
    }

    fn spend(&mut self, step: Step) {
        let budget = &mut self.budget;
        match step {
            Step::Ask(Request::Upgrade) => budget.upgrades -= 1,
            Step::Ask(Request::Canary(_)) => budget.canaries -= 1,
            Step::Ask(Request::Promote) => budget.promotes -= 1,
            Step::Ask(Request::Abort) => budget.aborts -= 1,
            Step::Happen(Event::CheckFailed(_)) => budget.bad_checks -= 1,
            Step::Ask(Request::Rollback) => budget.rollbacks -= 1,
            Step::Ask(Request::Restart) => budget.restarts -= 1,
            Step::Ask(Request::Stop) => budget.stops -= 1,
            Step::Ask(Request::Quit) => budget.quits -= 1,
            Step::Happen(Event::Exited { generation, alone, .. }) => {
                if !alone {
                    budget.rude -= 1;
                }
                if !self.world.told_to_end.contains(&generation) {
                    budget.losses -= 1;
                }
            }
            Step::Happen(Event::SpawnFailed(generation)) => {
                if !self.world.told_to_end.contains(&generation) {
                    budget.losses -= 1;
                }
            }
            Step::Happen(Event::WatchdogExpired(_)) => {
                budget.rude -= 1;
                budget.losses -= 1;
            }
            Step::Happen(Event::Drained(_)) => budget.rude -= 1,
            Step::Happen(_) => {}
        }
    }
}

impl Mutation {
    fn on_action(self, actions: &mut Vec<Action>, cause: Option<Event>, before: &Machine) {
        match (self, &actions[0]) {
            (Mutation::StopsOldFirst, Action::Spawn { .. }) => {
                actions.extend(before.serving().map(Action::Drain));
            }
            (Mutation::FailureTouchesIncumbent, Action::Release(_)) if matches!(cause, Some(Event::SpawnFailed(_))) => {
                actions.extend(before.serving().map(Action::Stop));
            }
            (Mutation::RunsTheOldProgram, &Action::Spawn { generation, source: Source::Fresh }) => {
                if let Some(program) = before.versions().current {
                    actions[0] = Action::Spawn { generation, source: Source::Recorded(program) };
                }
            }
            (Mutation::FinishesEarly, &Action::Drain(_)) if !matches!(before.stage(), Stage::Starting(_)) => {
                actions.push(Action::Finish(zddsup::core::Finish::Stopped));
            }
            (Mutation::SwitchesInACanary, &Action::Share { candidate, incumbent, step: 1 }) => {
                actions.push(Action::Switch { from: Some(incumbent), to: candidate });
            }
            (Mutation::EndsTheIncumbentInACanary, &Action::Share { incumbent, .. }) => {
                actions.push(Action::Drain(incumbent));
            }
            (Mutation::TwoCandidates, &Action::Spawn { generation, source }) => {
                actions.push(Action::Spawn { generation, source });
            }
            _ => {}
        }
    }
}

impl Model for Exploration {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let mut machine = Machine::new(self.policy.clone());
        let before = machine.clone();
        let now = Time::default();
        let first = machine.start(now);
        let mut state = State { machine, world: World::new(first), budget: self.budget.clone(), now };
        state.take(None, Cause::Start, &before);
        vec![state]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        if state.world.finished.is_some() {
            return;
        }
        let budget = &state.budget;
        for (left, request) in [
            (budget.upgrades, Request::Upgrade),
            (budget.canaries, Request::Canary(self.canary)),
            (budget.promotes, Request::Promote),
            (budget.aborts, Request::Abort),
            (budget.rollbacks, Request::Rollback),
            (budget.restarts, Request::Restart),
            (budget.stops, Request::Stop),
            (budget.quits, Request::Quit),
        ] {
            if left > 0 {
                steps.push(Step::Ask(request));
            }
        }
        if state.machine.poll_timeout().is_some() {
            steps.push(Step::Happen(Event::Timeout));
        }
        for (&id, &process) in &state.world.processes {
            let may_be_lost = budget.losses > 0 || state.world.told_to_end.contains(&id);
            let mut happen = |event| steps.push(Step::Happen(event));
            match process {
                Process::Asked => {
                    happen(Event::Spawned(id));
                    // Its first message may overtake the news that it runs; then it cannot have failed.
                    if !state.world.ready.contains(&id) {
                        happen(Event::Ready(id));
                        if may_be_lost {
                            happen(Event::SpawnFailed(id));
                        }
                    }
                }
                Process::Running => {
                    // Late and repeated ones too.
                    happen(Event::Ready(id));
                    if let Stage::Canary { flight, step, canary, .. } = state.machine.stage() {
                        if flight.candidate == id && canary.checked {
                            happen(Event::Checked(id, step));
                            // Of the step before.
                            happen(Event::Checked(id, step.wrapping_sub(1)));
                            if budget.bad_checks > 0 {
                                happen(Event::CheckFailed(id));
                            }
                        }
                    }
                    if may_be_lost {
                        let killed = End::Killed { signal: 9, core: false };
                        happen(Event::Exited { generation: id, end: End::Exited(0), alone: true });
                        happen(Event::Exited { generation: id, end: killed, alone: true });
                        if budget.rude > 0 {
                            happen(Event::Exited { generation: id, end: killed, alone: false });
                        }
                    }
                    if budget.rude > 0 {
                        happen(Event::Drained(id));
                        if budget.losses > 0 && state.world.ready.contains(&id) {
                            happen(Event::WatchdogExpired(id));
                        }
                    }
                }
                Process::MainGone => happen(Event::Emptied(id)),
                // Messages of the dead.
                Process::Gone => happen(Event::Ready(id)),
            }
        }
        steps.push(Step::Happen(Event::Ready(GenerationId(99))));
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let mut next = last.clone();
        next.spend(step);
        match step {
            Step::Ask(request) => {
                let answer = match (self.mutation, last.machine.stage()) {
                    (Some(Mutation::LosesRequest), Stage::Starting(flight)) => Answer::Accepted(flight.upgrade),
                    _ => next.machine.request(request, next.now),
                };
                next.world.asked(request, answer, &last.machine, &next.machine);
                next.take(self.mutation, Cause::Request(request), &last.machine);
            }
            Step::Happen(event) => {
                if event == Event::Timeout {
                    next.now = next.machine.poll_timeout()?.max(next.now);
                }
                next.world.happens(event);
                let heard = match (self.mutation, event) {
                    (Some(Mutation::SwitchesBeforeReady), Event::Spawned(id)) => Event::Ready(id),
                    (Some(Mutation::ReleasesEarly), Event::Exited { generation, end, .. }) => {
                        Event::Exited { generation, end, alone: true }
                    }
                    _ => event,
                };
                next.machine.handle(heard, next.now);
                next.take(self.mutation, Cause::Event(event), &last.machine);
            }
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::sometimes("an upgrade is baked to its end", |_, state: &State| {
                state.machine.versions().previous.is_some() && matches!(state.machine.stage(), Stage::Idle)
            }),
            Property::sometimes("one leaves while one serves", |_, state: &State| {
                let mut generations = state.machine.generations();
                generations.any(|(_, generation)| generation.is_leaving()) && state.machine.serving().is_some()
            }),
            Property::always(world::CANARY, |_, state: &State| state.world.keeps(world::CANARY)),
            Property::always(world::QUEUE, |_, state: &State| state.world.keeps(world::QUEUE)),
            Property::always(world::READY_FIRST, |_, state: &State| state.world.keeps(world::READY_FIRST)),
            Property::always(world::UNCHANGED, |_, state: &State| state.world.keeps(world::UNCHANGED)),
            Property::always(world::ONE, |_, state: &State| state.world.keeps(world::ONE)),
            Property::always(world::NOTHING_LEFT, |_, state: &State| state.world.keeps(world::NOTHING_LEFT)),
            Property::always(world::FRESH, |_, state: &State| state.world.keeps(world::FRESH)),
            Property::always(world::ALIVE, |_, state: &State| state.world.keeps(world::ALIVE)),
        ]
    }
}
