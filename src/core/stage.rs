//! What the service as a whole is doing: the transaction that is in flight, if one is.

use serde::{Deserialize, Serialize};

use super::canary::Wait;
use super::generation::InFlight;
use super::upgrade::Versions;
use super::{Canary, GenerationId, Time};

/// What the service as a whole is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Stage {
    /// Nothing is in flight.
    Idle,
    /// A candidate is being started.
    Starting(InFlight),
    /// The candidate gets a share, the incumbent the rest.
    Canary {
        /// The transaction.
        flight: InFlight,
        /// How it is tried.
        canary: Canary,
        /// Number of the step, from 0.
        step: u16,
        /// What the next one waits for.
        wait: Wait,
        /// Whether the check succeeded in this step.
        passed: bool,
    },
    /// The candidate serves, the one before is on standby.
    Baking {
        /// The transaction; its candidate is the incumbent now.
        flight: InFlight,
        /// What can be switched back to at once.
        standby: GenerationId,
        /// When the bake is over.
        until: Time,
        /// The versions to go back to with it.
        before: Versions,
    },
    /// No generation serves; the next start is due.
    Backoff {
        /// At that time.
        until: Time,
    },
}

impl Stage {
    /// When something is due.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        match *self {
            Stage::Canary { wait: Wait::Until(until), .. } | Stage::Baking { until, .. } | Stage::Backoff { until } => {
                Some(until)
            }
            Stage::Idle | Stage::Starting(_) | Stage::Canary { wait: Wait::Check | Wait::Asked, .. } => None,
        }
    }
}
