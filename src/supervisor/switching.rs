//! The switch, with the sockets and what is kept that go with it.

use std::time::Instant;

use nix::fcntl::OFlag;

use super::driver::Driver;
use crate::core::GenerationId;
use crate::handoff::channel::Outgoing;
use crate::listener::Repair;
use crate::proto::handoff::ToGeneration;

impl Driver {
    pub(super) fn switch(&mut self, from: Option<GenerationId>, to: GenerationId) {
        let switched_back = self.running.get(&to).is_some_and(|running| running.ready);
        if let (true, Some(from)) = (switched_back, from) {
            self.restore_flags(from);
        }
        self.steer_to(to, from);
        if let Some(from) = from {
            self.prove_switch(from);
        }
        self.end_canary();
        self.store.commit(to);
        // It has called listen(2) by now, if it does so with a backlog of its own.
        self.repair_listeners();
        if let Some(running) = self.running.get_mut(&to) {
            running.ready = true;
            running.watchdog.fed(Instant::now());
            running.why_not = None;
        }
        if let Some(from) = from {
            tracing::info!(generation = %to, from = %from, "serves in the place of generation {from}");
        } else {
            tracing::info!(generation = %to, "serves");
        }
        self.tell_of_unseen(to);
        self.pass_on_kept();
        self.upward.ready(Instant::now());
        self.record();
        self.news_of(to);
        if let Some(from) = from {
            self.news_of(from);
        }
    }

    /// Sends on what generations passed on.
    pub(super) fn pass_on_kept(&mut self) {
        let Some(receiver) = self.receiver() else { return };
        let channel = self.running.get(&receiver).and_then(|running| running.channel.as_ref());
        let Some(channel) = channel.filter(|channel| channel.has_spoken()) else { return };
        for item in self.kept.send_to(receiver) {
            let message = ToGeneration::Kept { id: item.id, name: item.name, state: item.state };
            channel.send(Outgoing { message, fds: item.fds });
        }
    }

    /// Puts right what a generation may have done to the sockets for all: shutdown(2), listen(2) with its own backlog.
    pub(super) fn repair_listeners(&mut self) {
        self.repair_declared();
        for listener in self.listeners.iter().filter(|listener| !listener.is_steered()) {
            match listener.repair() {
                Ok(Repair::Untouched) => {}
                Ok(Repair::Relistened) => {
                    tracing::error!(
                        listener = listener.name(),
                        "a generation called shutdown(2) on the shared socket: listening again; connections that \
                         waited in its queue were reset by that call"
                    );
                }
                Err(error) => tracing::error!(listener = listener.name(), "cannot listen again: {error}"),
            }
        }
    }

    pub(super) fn flags(&self) -> Vec<OFlag> {
        self.listeners.iter().map(|listener| listener.status_flags().unwrap_or(OFlag::empty())).collect()
    }

    /// A generation that never served set flags again while it was being ended, after they were restored. A later
    /// candidate has flags of its own.
    pub(super) fn restore_flags_once_gone(&self, id: GenerationId) {
        let never_served = self.running.get(&id).is_some_and(|running| !running.ready);
        if never_served && self.running.keys().next_back() == Some(&id) {
            self.restore_flags(id);
        }
    }

    /// The sockets' status flags as they were before a candidate touched them.
    pub(super) fn restore_flags(&self, candidate: GenerationId) {
        let Some(running) = self.running.get(&candidate) else { return };
        for (listener, flags) in self.listeners.iter().zip(&running.flags_before) {
            // Where each has its own, they are its own too.
            if !listener.is_steered() {
                listener.restore_flags(*flags);
            }
        }
    }
}
