//! How the supervisor learns that a candidate can serve.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::adopting::GIVEN_UP;
use super::driver::{Driver, Input};
use crate::config::Ready;
use crate::core::{Event, GenerationId};
use crate::ready::probe;

/// `--ready auto`: a service that never said anything counts as ready when it has run this long.
pub const SETTLES_AFTER: Duration = Duration::from_secs(1);

impl Driver {
    /// A candidate runs: waits for what shows that it is ready.
    pub(super) fn await_ready(&mut self, id: GenerationId) {
        let inbox = self.inbox.clone();
        let Some(running) = self.running.get(&id) else { return };
        let since = running.executed.unwrap_or_else(Instant::now);
        let settles = since + self.settles_after();
        let task = match &self.config.ready {
            // It says so itself.
            Ready::Notify | Ready::Listen => return,
            Ready::Auto if self.speaks => return,
            Ready::Auto => tokio::spawn(async move {
                tokio::time::sleep_until(settles.into()).await;
                let _loop_is_gone = inbox.send(Input::Settled(id));
            }),
            Ready::Delay(delay) => {
                let over = since + *delay;
                tokio::spawn(async move {
                    tokio::time::sleep_until(over.into()).await;
                    let _loop_is_gone = inbox.send(Input::Probed(id));
                })
            }
            Ready::Probe(target) => {
                let Some(context) = self.probe_context(id) else { return };
                let target = target.clone();
                tokio::spawn(async move {
                    let why_not = inbox.clone();
                    probe::until_ready(&target, &context, |why| {
                        let _loop_is_gone = why_not.send(Input::WhyNot(id, why));
                    })
                    .await;
                    let _loop_is_gone = inbox.send(Input::Probed(id));
                })
            }
        };
        if let Some(running) = self.running.get_mut(&id) {
            running.tasks.add(&task);
        }
    }

    /// A probe succeeded, or the delay is over. Whoever binds for itself is to listen as well, wherever the one before does.
    pub(super) fn probed(&mut self, id: GenerationId) {
        let nothing_expected = self.expected().is_empty();
        let Some(running) = self.running.get_mut(&id) else { return };
        running.probed = true;
        let waits = matches!(self.config.ready, Ready::Probe(_)) && !running.has_listened && !nothing_expected;
        if !waits {
            self.happened(Event::Ready(id));
        }
    }

    /// For probes of this generation.
    pub(super) fn probe_context(&self, id: GenerationId) -> Option<probe::Context> {
        let (group, wishes) = (self.running.get(&id)?.group.clone()?, self.inbox.clone());
        Some(probe::Context {
            service: self.config.name.clone(),
            generation: id.0,
            pid: group.leader().pid,
            pids: Arc::new(move || group.pids()),
            steering: Arc::new(move |wish| drop(wishes.send(Input::Wished(id, wish)))),
            tls: self.tls.clone(),
            host: self.config.ready_host.clone(),
            anybody: false,
            reaper: self.reaper.clone(),
            timeout: self.config.probe_timeout,
        })
    }

    /// One that may still bind for itself is given more time for it.
    fn settles_after(&self) -> Duration {
        if self.adopts() && !self.cannot_trap {
            GIVEN_UP
        } else {
            SETTLES_AFTER
        }
    }

    /// It said that it is ready: by a notify or a handoff message.
    pub(super) fn says_ready(&mut self, id: GenerationId) {
        match self.config.ready {
            Ready::Auto | Ready::Notify => {
                self.speaks = true;
                self.happened(Event::Ready(id));
            }
            Ready::Delay(_) | Ready::Probe(_) | Ready::Listen => {}
        }
    }

    /// It ran for [`SETTLES_AFTER`] and may be one that says nothing.
    pub(super) fn settled_in(&mut self, id: GenerationId) {
        let Some(running) = self.running.get(&id) else { return };
        let has_spoken = running.said.anything
            || running.channel.as_ref().is_some_and(super::super::handoff::channel::Channel::has_spoken);
        // One that makes its own sockets shows by them that it is there.
        let listens = running.listens > 0 || !self.expected().is_empty() || self.serves_locals();
        if running.ready || self.speaks || has_spoken || listens {
            return;
        }
        tracing::warn!(
            generation = %id,
            "ran for {:?} and said nothing: taken as ready; a probe (--ready http://…, exec:…) or READY=1 knows better",
            self.settles_after()
        );
        self.happened(Event::Ready(id));
    }
}
