//! What is said to a supervisor above this one, by `sd_notify(3)`. Nothing where there is none.

use sd_notify::NotifyState;

/// The one above, if `NOTIFY_SOCKET` named one.
#[derive(Debug, Default)]
pub struct Upward {
    ready: bool,
    stopping: bool,
}

impl Upward {
    /// The first generation serves.
    pub fn ready(&mut self) {
        if !self.ready {
            self.ready = true;
            say(&[NotifyState::Ready]);
        }
    }

    /// The end has begun.
    pub fn stopping(&mut self) {
        if !self.stopping {
            self.stopping = true;
            say(&[NotifyState::Stopping]);
        }
    }

    /// One line for people.
    pub fn status(&self, line: &str) {
        say(&[NotifyState::Status(line)]);
    }
}

fn say(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("cannot notify: {error}");
    }
}
