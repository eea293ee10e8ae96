//! What the machine decides by, and its measure of time.

use std::{ops::Add, time::Duration};

use serde::{Deserialize, Serialize};

/// A moment: monotonic time since the supervisor's start. The core is told it and never reads a clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Time(pub Duration);

impl Add<Duration> for Time {
    type Output = Time;
    fn add(self, duration: Duration) -> Time {
        Time(self.0.saturating_add(duration))
    }
}

impl Time {
    /// Time passed since `earlier`; zero when that lies ahead.
    #[must_use]
    pub fn since(self, earlier: Time) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// When a service that ended by itself is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RestartWhen {
    /// Whatever its exit status.
    Always,
    /// Unless it exited with code 0.
    OnFailure,
    /// Never: the supervisor ends with it.
    Never,
}

/// At most `count` restarts within `within`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RestartLimit {
    /// Restarts allowed.
    pub count: usize,
    /// The window in which they are counted.
    pub within: Duration,
}

/// A service's policies, as far as the core goes by them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Policy {
    /// From the spawn until ready; none is no limit.
    pub start_timeout: Option<Duration>,
    /// How long the old generation stays on standby after the switch.
    pub bake: Duration,
    /// From the drain's begin to the stop signal for all; none is no limit.
    pub drain_timeout: Option<Duration>,
    /// From the stop signal to SIGKILL.
    pub stop_timeout: Duration,
    /// How long a stop keeps serving first.
    pub lame_duck: Duration,
    /// Generations that may be on their way out while an upgrade begins.
    pub max_draining: usize,
    /// When a service that ended by itself is started again.
    pub restart: RestartWhen,
    /// Past which the supervisor gives up; none is never.
    pub restart_limit: Option<RestartLimit>,
    /// A generation that served this long has its crash treated as a first one.
    pub stable_after: Duration,
    /// The second restart in a row waits this long, each further one twice as long …
    pub backoff_first: Duration,
    /// … up to this.
    pub backoff_most: Duration,
    /// Spreads the waits of many supervisors by up to a quarter either way.
    pub jitter_seed: u64,
}

impl Policy {
    /// How long to wait before restart number `attempt` (from 0) in a row: the first is at once.
    #[must_use]
    pub fn backoff(&self, attempt: u32) -> Duration {
        let Some(doublings) = attempt.checked_sub(1) else {
            return Duration::ZERO;
        };
        let wait = self.backoff_first.saturating_mul(2u32.saturating_pow(doublings)).min(self.backoff_most);
        let spread = fastrand::Rng::with_seed(self.jitter_seed.wrapping_add(u64::from(attempt))).f64();
        wait.mul_f64(0.75 + spread / 2.0)
    }
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            start_timeout: Some(Duration::from_secs(90)),
            bake: Duration::ZERO,
            drain_timeout: Some(Duration::from_secs(300)),
            stop_timeout: Duration::from_secs(10),
            lame_duck: Duration::ZERO,
            max_draining: 3,
            restart: RestartWhen::Always,
            restart_limit: Some(RestartLimit { count: 10, within: Duration::from_secs(60) }),
            stable_after: Duration::from_secs(10),
            backoff_first: Duration::from_millis(100),
            backoff_most: Duration::from_secs(30),
            jitter_seed: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_starts_at_once_doubles_and_is_bounded() {
        let policy = Policy::default();
        assert_eq!(policy.backoff(0), Duration::ZERO);
        for attempt in 1..40 {
            let ideal = policy.backoff_first.saturating_mul(2u32.saturating_pow(attempt - 1)).min(policy.backoff_most);
            let wait = policy.backoff(attempt);
            assert!(wait >= ideal.mul_f64(0.75) && wait <= ideal.mul_f64(1.25), "{attempt}: {wait:?}");
        }
    }

    #[test]
    fn jitter_differs_between_supervisors() {
        let wait = |jitter_seed| Policy { jitter_seed, ..Policy::default() }.backoff(3);
        assert_ne!(wait(1), wait(2));
    }
}
