//! The state, and what each event does in each phase.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::canary::Wait;
use super::recovery::Restarts;
use super::stopping::{Life, Patience};
use super::upgrade::{Pending, Versions};
use super::{
    Abort, Action, Answer, End, Event, Failure, Generation, GenerationId, Kind, Notice, Outcome, Phase, Policy,
    Request, Source, Stage, Time, UpgradeId,
};

/// The state machine of one service.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Machine {
    /// The configuration's, whoever goes on with the rest.
    #[serde(skip)]
    pub(super) policy: Policy,
    pub(super) generations: BTreeMap<GenerationId, Generation>,
    pub(super) serving: Option<GenerationId>,
    pub(super) stage: Stage,
    pub(super) life: Life,
    pub(super) versions: Versions,
    pub(super) pending: Option<Pending>,
    pub(super) restarts: Restarts,
    pub(super) next_generation: u32,
    pub(super) next_upgrade: u64,
    /// All were performed whenever the machine is written down.
    #[serde(skip)]
    pub(super) actions: VecDeque<Action>,
}

impl Machine {
    /// A service of which nothing runs. `start` begins.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        Machine {
            policy,
            generations: BTreeMap::new(),
            serving: None,
            stage: Stage::Idle,
            life: Life::Running,
            versions: Versions::default(),
            pending: None,
            restarts: Restarts::default(),
            next_generation: 1,
            next_upgrade: 1,
            actions: VecDeque::new(),
        }
    }

    /// A service that a supervisor before this one left behind: `incumbent` serves, `leaving` were draining.
    #[must_use]
    pub fn resume(policy: Policy, incumbent: Option<GenerationId>, leaving: &[GenerationId], now: Time) -> Self {
        let mut machine = Machine::new(policy);
        for &id in leaving {
            let deadline = machine.policy.drain_timeout.map(|limit| now + limit);
            machine.insert(id, id, Phase::Draining { deadline });
            machine.actions.push_back(Action::Drain(id));
        }
        if let Some(id) = incumbent {
            machine.insert(id, id, Phase::Serving { since: now });
            machine.serving = Some(id);
            machine.versions.current = Some(id);
        }
        machine.next_generation = machine.generations.keys().next_back().map_or(1, |last| last.0 + 1);
        machine
    }

    /// Goes on with a machine that was written down, by the policies of now.
    #[must_use]
    pub fn under(self, policy: Policy) -> Self {
        Machine { policy, ..self }
    }

    /// Starts the first generation.
    pub fn start(&mut self, now: Time) -> UpgradeId {
        let upgrade = self.new_upgrade();
        self.begin(upgrade, Kind::Start, None, now);
        upgrade
    }

    /// Somebody asks for something.
    pub fn request(&mut self, request: Request, now: Time) -> Answer {
        let answer = match request {
            Request::Upgrade => self.ask(Kind::Upgrade, None),
            Request::Canary(canary) => self.ask(Kind::Upgrade, Some(canary)),
            Request::Promote => self.ask_promote(now),
            Request::Abort => self.ask_abort(now),
            Request::Restart => self.ask_restart(),
            Request::Rollback => self.ask_rollback(now),
            Request::Stop => self.ask_stop(now),
            Request::Quit => self.ask_quit(now),
        };
        self.settle(now);
        answer
    }

    /// Something happened.
    pub fn handle(&mut self, event: Event, now: Time) {
        match event {
            Event::Spawned(id) => self.spawned(id, now),
            Event::SpawnFailed(id) => self.spawn_failed(id, now),
            Event::Ready(id) => self.ready(id, now),
            Event::Exited { generation, end, alone } => self.exited(generation, end, alone, now),
            Event::Emptied(id) => self.emptied(id),
            Event::Drained(id) => self.drained(id, now),
            Event::Extended(id, until) => self.extended(id, until),
            Event::WatchdogExpired(id) => self.watchdog_expired(id, now),
            Event::Checked(id, step) => self.checked(id, step, now),
            Event::CheckFailed(id) => self.check_failed(id, now),
            Event::Timeout => self.timeout(now),
        }
        self.settle(now);
    }

    /// The next thing to do, in order.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to report [`Event::Timeout`], if nothing else happens before.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        self.generations
            .values()
            .filter_map(Generation::deadline)
            .chain(self.stage.deadline())
            .chain(self.life.deadline())
            .min()
    }

    /// The incumbent.
    #[must_use]
    pub fn serving(&self) -> Option<GenerationId> {
        self.serving
    }

    /// What the service is doing.
    #[must_use]
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Whether it runs, is a lame duck, is being stopped.
    #[must_use]
    pub fn life(&self) -> Life {
        self.life
    }

    /// The versions that serve, and served before.
    #[must_use]
    pub fn versions(&self) -> Versions {
        self.versions
    }

    /// The request that waits for its turn.
    #[must_use]
    pub fn pending(&self) -> Option<Pending> {
        self.pending
    }

    /// What it decides by.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// What is remembered of losses.
    #[must_use]
    pub fn restarts(&self) -> &Restarts {
        &self.restarts
    }

    /// Every generation that is not released.
    pub fn generations(&self) -> impl Iterator<Item = (GenerationId, &Generation)> {
        self.generations.iter().map(|(&id, generation)| (id, generation))
    }

    /// Whether a recorded program may still be run: by a rollback, a restart or a recovery.
    #[must_use]
    pub fn needs_program(&self, program: GenerationId) -> bool {
        let kept = |versions: Versions| versions.current == Some(program) || versions.previous == Some(program);
        let before = matches!(self.stage, Stage::Baking { before, .. } if kept(before));
        before || kept(self.versions) || self.generations.values().any(|generation| generation.program == program)
    }

    pub(super) fn phase(&self, id: GenerationId) -> Option<Phase> {
        self.generations.get(&id).map(|generation| generation.phase)
    }

    pub(super) fn enter(&mut self, id: GenerationId, phase: Phase) {
        if let Some(generation) = self.generations.get_mut(&id) {
            generation.phase = phase;
        }
    }

    pub(super) fn insert(&mut self, id: GenerationId, program: GenerationId, phase: Phase) {
        self.generations.insert(id, Generation { phase, program });
    }

    pub(super) fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }

    pub(super) fn notice(&mut self, notice: Notice) {
        self.act(Action::Notice(notice));
    }

    pub(super) fn new_upgrade(&mut self) -> UpgradeId {
        let id = UpgradeId(self.next_upgrade);
        self.next_upgrade += 1;
        id
    }

    pub(super) fn spawn(&mut self, source: Source, now: Time) -> GenerationId {
        let generation = GenerationId(self.next_generation);
        self.next_generation += 1;
        let program = match source {
            Source::Fresh => generation,
            Source::Recorded(program) => program,
        };
        let deadline = self.policy.start_timeout.map(|limit| now + limit);
        self.insert(generation, program, Phase::Spawning { deadline });
        self.act(Action::Spawn { generation, source });
        generation
    }

    fn spawned(&mut self, id: GenerationId, now: Time) {
        let Some(phase) = self.phase(id) else { return };
        match phase {
            Phase::Spawning { deadline } => self.enter(id, Phase::Starting { deadline }),
            Phase::Aborting => self.stop(id, now),
            Phase::Starting { .. }
            | Phase::Canary { .. }
            | Phase::Serving { .. }
            | Phase::Standby { .. }
            | Phase::Draining { .. }
            | Phase::Stopping { .. }
            | Phase::Killing { .. }
            | Phase::Sweeping { .. }
            | Phase::Clearing { .. } => {}
        }
    }

    fn spawn_failed(&mut self, id: GenerationId, now: Time) {
        let Some(phase) = self.phase(id) else { return };
        match phase {
            Phase::Spawning { .. } => {
                self.candidate_failed(id, Failure::Spawn, now);
                self.release(id);
            }
            Phase::Aborting => self.release(id),
            Phase::Starting { .. }
            | Phase::Canary { .. }
            | Phase::Serving { .. }
            | Phase::Standby { .. }
            | Phase::Draining { .. }
            | Phase::Stopping { .. }
            | Phase::Killing { .. }
            | Phase::Sweeping { .. }
            | Phase::Clearing { .. } => {}
        }
    }

    fn ready(&mut self, id: GenerationId, now: Time) {
        let Some(phase) = self.phase(id) else { return };
        match phase {
            // Its first message may overtake the driver's own news that it runs.
            Phase::Spawning { .. } | Phase::Starting { .. } => self.candidate_ready(id, now),
            // Late or repeated: it changes nothing.
            Phase::Canary { .. }
            | Phase::Serving { .. }
            | Phase::Standby { .. }
            | Phase::Aborting
            | Phase::Draining { .. }
            | Phase::Stopping { .. }
            | Phase::Killing { .. }
            | Phase::Sweeping { .. }
            | Phase::Clearing { .. } => {}
        }
    }

    // What the loss means is told before the generation is released, while its last words are still at hand.
    fn exited(&mut self, id: GenerationId, end: End, alone: bool, now: Time) {
        let Some(phase) = self.phase(id) else { return };
        match phase {
            Phase::Spawning { .. } | Phase::Starting { .. } => {
                self.candidate_failed(id, Failure::Exited(end), now);
                self.sweep(id, alone, Patience::StopTime, now);
            }
            Phase::Canary { .. } => {
                self.end_canary(Outcome::Aborted(Abort::Died(end)));
                self.sweep(id, alone, Patience::StopTime, now);
            }
            Phase::Serving { since } => {
                self.incumbent_lost(id, end, Failure::DiedInBake(end), since, now);
                self.sweep(id, alone, Patience::StopTime, now);
            }
            Phase::Standby { .. } => {
                self.sweep(id, alone, Patience::StopTime, now);
                self.standby_lost();
            }
            Phase::Draining { deadline } => self.sweep(id, alone, Patience::RestOfDrain(deadline), now),
            Phase::Aborting | Phase::Stopping { .. } => self.sweep(id, alone, Patience::StopTime, now),
            Phase::Killing { .. } => {
                if alone {
                    self.release(id);
                } else {
                    self.clear(id, now);
                }
            }
            Phase::Sweeping { .. } | Phase::Clearing { .. } => {}
        }
    }

    fn emptied(&mut self, id: GenerationId) {
        let Some(phase) = self.phase(id) else { return };
        match phase {
            Phase::Sweeping { .. } | Phase::Clearing { .. } => self.release(id),
            Phase::Spawning { .. }
            | Phase::Starting { .. }
            | Phase::Canary { .. }
            | Phase::Serving { .. }
            | Phase::Standby { .. }
            | Phase::Aborting
            | Phase::Draining { .. }
            | Phase::Stopping { .. }
            | Phase::Killing { .. } => {}
        }
    }

    fn drained(&mut self, id: GenerationId, now: Time) {
        let Some(phase) = self.phase(id) else { return };
        match phase {
            Phase::Draining { .. } => self.stop(id, now),
            Phase::Spawning { .. }
            | Phase::Starting { .. }
            | Phase::Canary { .. }
            | Phase::Serving { .. }
            | Phase::Standby { .. }
            | Phase::Aborting
            | Phase::Stopping { .. }
            | Phase::Killing { .. }
            | Phase::Sweeping { .. }
            | Phase::Clearing { .. } => {}
        }
    }

    fn extended(&mut self, id: GenerationId, until: Time) {
        let Some(generation) = self.generations.get_mut(&id) else {
            return;
        };
        match &mut generation.phase {
            Phase::Spawning { deadline } | Phase::Starting { deadline } | Phase::Draining { deadline } => {
                *deadline = deadline.map(|deadline| deadline.max(until));
            }
            Phase::Stopping { kill_at } => *kill_at = (*kill_at).max(until),
            Phase::Canary { .. }
            | Phase::Serving { .. }
            | Phase::Standby { .. }
            | Phase::Aborting
            | Phase::Killing { .. }
            | Phase::Sweeping { .. }
            | Phase::Clearing { .. } => {}
        }
    }

    fn watchdog_expired(&mut self, id: GenerationId, now: Time) {
        let Some(phase) = self.phase(id) else { return };
        match phase {
            Phase::Canary { .. } => {
                self.end_canary(Outcome::Aborted(Abort::Hung));
                self.abort(id, now);
            }
            Phase::Serving { since } => {
                self.abort(id, now);
                self.incumbent_lost(id, SIGABRT, Failure::HungInBake, since, now);
            }
            Phase::Standby { .. } => {
                self.abort(id, now);
                self.standby_lost();
            }
            // Before it is ready the start time-out watches, in a drain the drain time.
            Phase::Spawning { .. }
            | Phase::Starting { .. }
            | Phase::Aborting
            | Phase::Draining { .. }
            | Phase::Stopping { .. }
            | Phase::Killing { .. }
            | Phase::Sweeping { .. }
            | Phase::Clearing { .. } => {}
        }
    }

    fn timeout(&mut self, now: Time) {
        if self.life.deadline().is_some_and(|until| until <= now) {
            self.lame_duck_over(now);
        }
        match self.stage {
            Stage::Canary { wait: Wait::Until(until), .. } if until <= now => self.step_due(now),
            Stage::Baking { until, .. } if until <= now => self.bake_over(now),
            Stage::Backoff { until } if until <= now => self.recover(now),
            Stage::Idle | Stage::Starting(_) | Stage::Canary { .. } | Stage::Baking { .. } | Stage::Backoff { .. } => {}
        }
        let due: Vec<_> = self
            .generations
            .iter()
            .filter(|(_, generation)| generation.deadline().is_some_and(|deadline| deadline <= now))
            .map(|(&id, generation)| (id, generation.phase))
            .collect();
        for (id, phase) in due {
            self.generation_due(id, phase, now);
        }
    }

    fn generation_due(&mut self, id: GenerationId, phase: Phase, now: Time) {
        match phase {
            Phase::Spawning { .. } => {
                self.enter(id, Phase::Aborting);
                self.candidate_failed(id, Failure::StartTimeout, now);
            }
            Phase::Starting { .. } => {
                self.stop(id, now);
                self.candidate_failed(id, Failure::StartTimeout, now);
            }
            Phase::Draining { .. } => self.stop(id, now),
            Phase::Stopping { .. } | Phase::Killing { .. } => self.kill(id, now),
            Phase::Sweeping { .. } | Phase::Clearing { .. } => self.clear(id, now),
            Phase::Canary { .. } | Phase::Serving { .. } | Phase::Standby { .. } | Phase::Aborting => {}
        }
    }
}

/// What a missed watchdog counts as where an end is asked for.
const SIGABRT: End = End::Killed { signal: 6, core: false };
