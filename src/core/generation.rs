//! What the core knows of a generation.

use serde::{Deserialize, Serialize};

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
