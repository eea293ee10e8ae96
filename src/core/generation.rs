//! The phases that a generation goes through.
//!
//! ```text
//! Spawning ─> Starting ─> (Canary ─>) Serving <─> Standby
//!    │            │           └────┬─────┴──────────┘
//!    ▼            │                ▼
//! Aborting        │            Draining
//!    └────────────┴─────┬──────────┘
//!                       ▼
//!                   Stopping ─> Killing          the main process was reaped, others live:
//!                       └──────────┴──────────>  Sweeping ─> Clearing ─> (released)
//! ```

use serde::{Deserialize, Serialize};

use super::{Canary, Kind, Time, UpgradeId};

/// Number of a generation: from 1, counted up with each spawn, never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GenerationId(pub u32);

impl std::fmt::Display for GenerationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// How a process ended (wait(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// It called exit with this code.
    Exited(i32),
    /// This signal killed it; `core` when a core was dumped.
    Killed {
        /// Number of the signal.
        signal: i32,
        /// Whether a core was dumped.
        core: bool,
    },
    /// It was no child of ours (taken over from a supervisor that died): its status is unknown.
    Unknown,
}

impl End {
    /// Exit code 0.
    #[must_use]
    pub fn is_success(self) -> bool {
        self == End::Exited(0)
    }
}

/// Where a generation stands. A released one is no longer in the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// The driver was told to spawn it and has not answered.
    Spawning {
        /// When it counts as failed.
        deadline: Option<Time>,
    },
    /// It runs and is not ready.
    Starting {
        /// When it counts as failed.
        deadline: Option<Time>,
    },
    /// It is ready and gets a share, beside the incumbent.
    Canary {
        /// Since it was ready.
        since: Time,
    },
    /// The incumbent.
    Serving {
        /// Since it was ready.
        since: Time,
    },
    /// Switched away from, warm.
    Standby {
        /// Since it was ready.
        since: Time,
    },
    /// Unwanted before the driver's answer: stopped as soon as it runs.
    Aborting,
    /// Asked to finish what it has.
    Draining {
        /// When that ends.
        deadline: Option<Time>,
    },
    /// The stop signal was sent to all of it.
    Stopping {
        /// When SIGKILL follows.
        kill_at: Time,
    },
    /// SIGKILL was sent; it is not gone until it is reaped.
    Killing {
        /// When SIGKILL is sent again, to what was forked meanwhile.
        again_at: Time,
    },
    /// Its main process is gone, others live and were sent the stop signal.
    Sweeping {
        /// When SIGKILL follows; none where a drain has no limit.
        kill_at: Option<Time>,
    },
    /// Its main process is gone, others live and were sent SIGKILL.
    Clearing {
        /// When SIGKILL is sent again.
        again_at: Time,
    },
}

/// One spawn of the service's command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Generation {
    /// Where it stands.
    pub phase: Phase,
    /// The generation that resolved what it runs: itself, or an earlier one.
    pub program: GenerationId,
}

impl Generation {
    /// When something is due for it.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        match self.phase {
            Phase::Spawning { deadline } | Phase::Starting { deadline } | Phase::Draining { deadline } => deadline,
            Phase::Sweeping { kill_at } => kill_at,
            Phase::Stopping { kill_at } => Some(kill_at),
            Phase::Killing { again_at } | Phase::Clearing { again_at } => Some(again_at),
            Phase::Canary { .. } | Phase::Serving { .. } | Phase::Standby { .. } | Phase::Aborting => None,
        }
    }

    /// Whether it is on its way out.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        match self.phase {
            Phase::Spawning { .. }
            | Phase::Starting { .. }
            | Phase::Canary { .. }
            | Phase::Serving { .. }
            | Phase::Standby { .. } => false,
            Phase::Aborting
            | Phase::Draining { .. }
            | Phase::Stopping { .. }
            | Phase::Killing { .. }
            | Phase::Sweeping { .. }
            | Phase::Clearing { .. } => true,
        }
    }
}

/// A transaction under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct InFlight {
    /// Its number.
    pub upgrade: UpgradeId,
    /// Its kind.
    pub kind: Kind,
    /// The generation that it puts in place.
    pub candidate: GenerationId,
    /// How it is tried before the switch.
    pub canary: Option<Canary>,
}
