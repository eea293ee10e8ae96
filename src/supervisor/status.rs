//! The state, for people and programs.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::driver::Driver;
use super::ending::describe;
use super::running::Running;
use crate::control::types::{
    Event, Generation, GenerationPhase, Listener, Program, ServicePhase, Status, Supervisor, UpgradeKind,
};
use crate::core::stopping::Life;
use crate::core::{End, Failure, GenerationId, Kind, Phase, Stage};
use crate::drain::connections::Count;
use crate::listener::steering::Protocol;

impl Driver {
    /// All of it.
    pub(super) fn status(&self) -> Status {
        let now = Instant::now();
        let living = self.running.values().rev().map(|running| self.describe(running, self.phase_of(running.id)));
        Status {
            service: self.config.name.clone(),
            supervisor: Supervisor {
                pid: i32::try_from(std::process::id()).unwrap_or(0),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                started_unix_ms: unix_ms(self.started),
                replaced: self.replacements,
            },
            phase: self.service_phase(),
            serving: self.machine.serving(),
            generations: living.chain(self.retired.iter().cloned()).collect(),
            listeners: self
                .listeners
                .iter()
                .map(|listener| Listener { name: listener.name().to_owned(), address: listener.address() })
                .chain(self.adopted.keys().filter(|key| !self.adopted.declared.contains_key(key)).map(|key| Listener {
                    name: "adopted".to_owned(),
                    address: match key.protocol() {
                        Protocol::Tcp => format!("tcp://{}", key.local()),
                        Protocol::Udp => format!("udp://{}", key.local()),
                    },
                }))
                .chain(
                    self.adopted
                        .locals
                        .addresses()
                        .into_iter()
                        .map(|address| Listener { name: "adopted".to_owned(), address }),
                )
                .collect(),
            upgrades: self.reports.list(now),
            pending: self.machine.pending().map(|pending| self.why_waiting(pending.kind)),
            restarts: self.restarts,
            stored_fds: self.store.len(),
            ended: self.reports.counts(),
        }
    }

    fn why_waiting(&self, kind: Kind) -> String {
        let kind = UpgradeKind::from(kind);
        match self.machine.stage() {
            Stage::Starting(flight) => format!("{kind}: waits until generation {} is ready or fails", flight.candidate),
            Stage::Canary { flight, .. } => format!(
                "{kind}: waits for the canary of generation {} (`zddsup promote` or `abort` end it)",
                flight.candidate
            ),
            Stage::Baking { flight, .. } => format!("{kind}: waits for the bake of generation {}", flight.candidate),
            Stage::Idle | Stage::Backoff { .. } => format!(
                "{kind}: {} generations are still draining (--max-draining): waits until one is gone",
                self.machine.policy().max_draining
            ),
        }
    }

    /// What the service is doing.
    pub(super) fn service_phase(&self) -> ServicePhase {
        match (self.machine.life(), self.machine.stage(), self.machine.serving()) {
            (Life::LameDuck { .. }, ..) => ServicePhase::LameDuck,
            (Life::Stopping { .. } | Life::Over, ..) => ServicePhase::Stopping,
            (Life::Running, Stage::Canary { .. }, _) => ServicePhase::Canary,
            (Life::Running, Stage::Baking { .. }, _) => ServicePhase::Baking,
            (Life::Running, Stage::Starting(_), Some(_)) => ServicePhase::Upgrading,
            (Life::Running, Stage::Starting(flight), None) if flight.kind == Kind::Start => ServicePhase::Starting,
            (Life::Running, Stage::Idle, Some(_)) => ServicePhase::Serving,
            (Life::Running, Stage::Starting(_) | Stage::Backoff { .. } | Stage::Idle, _) => ServicePhase::Restarting,
        }
    }

    fn phase_of(&self, id: GenerationId) -> GenerationPhase {
        let phase = self.machine.generations().find(|(other, _)| *other == id).map(|(_, generation)| generation.phase);
        match phase {
            Some(Phase::Spawning { .. } | Phase::Starting { .. }) => GenerationPhase::Starting,
            Some(Phase::Canary { .. }) => GenerationPhase::Canary,
            Some(Phase::Serving { .. }) => GenerationPhase::Serving,
            Some(Phase::Standby { .. }) => GenerationPhase::Standby,
            Some(Phase::Draining { .. }) => GenerationPhase::Draining,
            Some(Phase::Aborting | Phase::Stopping { .. }) => GenerationPhase::Stopping,
            Some(Phase::Killing { .. }) => GenerationPhase::Killing,
            Some(Phase::Sweeping { .. } | Phase::Clearing { .. }) => GenerationPhase::Sweeping,
            None => GenerationPhase::Retired,
        }
    }

    /// One generation.
    pub(super) fn describe(&self, running: &Running, phase: GenerationPhase) -> Generation {
        let path = running.program.as_ref().map(|program| program.path().to_owned());
        Generation {
            number: running.id,
            pid: running.pid(),
            phase,
            program: Program {
                path: path.unwrap_or_else(|| self.config.command[0].clone().into()),
                sha256: running.program.as_ref().and_then(|program| program.sha256()),
            },
            cgroup: running
                .cgroup()
                .filter(|_| phase != GenerationPhase::Retired)
                .map(|cgroup| cgroup.path().to_owned()),
            age_ms: u64::try_from(running.since.elapsed().as_millis()).unwrap_or(u64::MAX),
            connections: running.connections,
            status: running.said.status.clone(),
            waiting_for: running.why_not.clone(),
            end: running.end.map(describe).or_else(|| running.spawn_error.clone()),
        }
    }

    /// One line for people.
    pub(super) fn one_line(&self) -> String {
        let mut line = match (self.machine.serving(), self.machine.stage()) {
            (Some(serving), Stage::Idle | Stage::Backoff { .. }) => format!("generation {serving} serves"),
            (Some(serving), Stage::Starting(flight)) => {
                format!("generation {serving} serves, generation {} is being started", flight.candidate)
            }
            (Some(serving), Stage::Canary { flight, .. }) => {
                format!("generation {serving} serves, generation {} gets a share", flight.candidate)
            }
            (Some(serving), Stage::Baking { standby, .. }) => {
                format!("generation {serving} serves and bakes, generation {standby} is on standby")
            }
            (None, Stage::Starting(flight)) => format!("generation {} is being started", flight.candidate),
            (None, Stage::Idle | Stage::Backoff { .. } | Stage::Canary { .. } | Stage::Baking { .. }) => {
                "no generation serves".to_owned()
            }
        };
        let leaving = self.machine.generations().filter(|(_, generation)| generation.is_leaving()).count();
        if leaving > 0 {
            let _fits = write!(line, ", {leaving} draining");
        }
        match self.machine.life() {
            Life::Running => {}
            Life::LameDuck { .. } => line += "; lame duck",
            Life::Stopping { .. } | Life::Over => line += "; stopping",
        }
        line
    }

    /// Tells whoever follows the events how a generation is now.
    pub(super) fn news_of(&self, id: GenerationId) {
        if let Some(running) = self.running.get(&id) {
            let _nobody_listens = self.events.send(Event::Generation(self.describe(running, self.phase_of(id))));
        }
    }

    /// Tells whoever follows the events what has changed since the last time.
    pub(super) fn tell(&mut self) {
        for report in self.reports.take_changed(Instant::now()) {
            let _nobody_listens = self.events.send(Event::Upgrade(report));
        }
        let phase = self.service_phase();
        if self.told != Some(phase) {
            self.told = Some(phase);
            let _nobody_listens = self.events.send(Event::Service { phase });
        }
    }

    /// Keeps what was counted.
    pub(super) fn counted(&mut self, counts: &BTreeMap<GenerationId, Count>) {
        for (id, &count) in counts {
            if let Some(running) = self.running.get_mut(id) {
                running.connections = Some(count.all);
            }
            self.observed(*id, count);
        }
        self.reports.connections(&counts.iter().map(|(id, count)| (*id, count.all)).collect());
        self.count_over();
    }

    /// Why a candidate failed, in a line.
    pub(super) fn explain(&self, failure: Failure, candidate: Option<&Running>) -> String {
        let who =
            candidate.map_or_else(|| "the new generation".to_owned(), |running| format!("generation {}", running.id));
        let mut why = match failure {
            Failure::Spawn => {
                let error = candidate.and_then(|running| running.spawn_error.clone());
                return format!("{who} could not be started: {}", error.unwrap_or_else(|| "unknown reason".to_owned()));
            }
            Failure::Exited(end) => format!("{who} {} before it was ready", describe(end)),
            Failure::StartTimeout => {
                let limit = humantime::format_duration(self.config.start_timeout.unwrap_or_default());
                format!("{who} was not ready within {limit} (--start-timeout)")
            }
            Failure::DiedInBake(end) => format!("{who} {} in its bake", describe(end)),
            Failure::HungInBake => format!("{who} missed its watchdog's time in its bake"),
        };
        let Some(running) = candidate else { return why };
        let errno = running.said.errno.map(|errno| std::io::Error::from_raw_os_error(errno).to_string());
        let said: Vec<_> = running.said.status.iter().chain(&errno).map(String::as_str).collect();
        if !said.is_empty() {
            let _fits = write!(why, "; it said: {}", said.join(": "));
        }
        if let (Failure::StartTimeout, Some(why_not)) = (failure, &running.why_not) {
            let _fits = write!(why, "; its probe: {why_not}");
        }
        match failure {
            Failure::Exited(End::Exited(0)) => why.push_str("; let it stay in the foreground"),
            Failure::StartTimeout if self.adopts() && running.listens == 0 => {
                why.push_str("; it never called listen(2)");
            }
            _ => {}
        }
        why
    }
}

fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
