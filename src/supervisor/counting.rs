//! Counting connections: when the status is asked for, and again and again while a generation leaves. Never otherwise.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::driver::{Driver, Input};
use super::spawning::LOOK_AGAIN;
use crate::control::types::Reply;
use crate::drain::connections;

/// A count takes time that grows with the connections: at most one part in this many is spent on it.
const SHARE: u32 = 20;

/// Who waits for a count, and when the next one is due.
#[derive(Debug, Default)]
pub struct Counting {
    due: Option<Instant>,
    began: Option<Instant>,
    waiting: Vec<oneshot::Sender<Reply>>,
}

impl Counting {
    /// When to count again.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        if self.began.is_some() {
            None
        } else {
            self.due
        }
    }

    /// Whether one is under way, or somebody waits for one.
    #[must_use]
    pub fn is_under_way(&self) -> bool {
        self.began.is_some() || !self.waiting.is_empty()
    }

    /// A generation leaves: count soon.
    pub fn wanted(&mut self) {
        self.due.get_or_insert_with(Instant::now);
    }
}

impl Driver {
    /// Answers with the status once connections are counted.
    pub(super) fn reply_with_status(&mut self, reply: oneshot::Sender<Reply>) {
        self.counting.waiting.push(reply);
        if self.counting.began.is_none() {
            self.count();
        }
    }

    /// Begins a count, beside the loop.
    pub(super) fn count(&mut self) {
        self.counting.began = Some(Instant::now());
        let places = self.places();
        let groups: Vec<_> = self
            .running
            .values()
            .filter_map(|running| Some((running.id, Arc::clone(running.group.as_ref()?))))
            .collect();
        let inbox = self.inbox.clone();
        tokio::task::spawn_blocking(move || {
            let of = groups.iter().filter_map(|(id, group)| Some((*id, group.pids().ok()?))).collect();
            let counts = connections::count(&places, of).unwrap_or_else(|error| {
                tracing::debug!("cannot count connections: {error}");
                BTreeMap::new()
            });
            let _loop_is_gone = inbox.send(Input::Counted(counts));
        });
    }

    /// A count is over: whoever waits is answered, and the next one is planned while a generation leaves.
    pub(super) fn count_over(&mut self) {
        let took = self.counting.began.take().map_or(Duration::ZERO, |began| began.elapsed());
        let leaving = self.machine.generations().any(|(_, generation)| generation.is_leaving());
        self.counting.due = leaving.then(|| Instant::now() + LOOK_AGAIN.max(took * SHARE));
        for reply in std::mem::take(&mut self.counting.waiting) {
            let _gone = reply.send(Reply::Status(Box::new(self.status())));
        }
    }
}
