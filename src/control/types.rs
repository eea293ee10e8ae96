//! What travels on the control socket.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tokio::sync::{broadcast, mpsc, oneshot};

use crate::config::canary::{CanaryFlags, Share};
use crate::core::GenerationId;

/// The whole state of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its name.
    pub service: String,
    /// Who supervises it.
    pub supervisor: Supervisor,
    /// What it is doing.
    pub phase: ServicePhase,
    /// The incumbent.
    pub serving: Option<GenerationId>,
    /// Those that live, and the last that ended.
    pub generations: Vec<Generation>,
    /// Its sockets.
    pub listeners: Vec<Listener>,
    /// The last transactions, newest first.
    pub upgrades: Vec<UpgradeReport>,
    /// What waits for its turn, and why.
    pub pending: Option<String>,
    /// Starts after a loss, since the supervisor's own start.
    pub restarts: u64,
    /// Fds in the store.
    pub stored_fds: usize,
    /// How many transactions ended how, since the supervisor's own start.
    #[serde(default)]
    pub ended: BTreeMap<UpgradeResult, u64>,
}

/// The supervisor itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Supervisor {
    /// Its pid.
    pub pid: i32,
    /// Its version.
    pub version: String,
    /// When it was started, in milliseconds since 1970.
    pub started_unix_ms: u64,
    /// How often its program was replaced (`zddsup self-upgrade`).
    #[serde(default)]
    pub replaced: u64,
}

/// What a service is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServicePhase {
    /// The first generation is not ready yet.
    Starting,
    /// All is well.
    Serving,
    /// A candidate is being started.
    Upgrading,
    /// A candidate gets a share of new connections.
    Canary,
    /// Switched; the old generation is on standby.
    Baking,
    /// No generation serves; connections wait in the queue.
    Restarting,
    /// Stopping was asked for; it serves on for a while.
    LameDuck,
    /// It is being stopped.
    Stopping,
}

/// One generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    /// Its number.
    pub number: GenerationId,
    /// Its main process.
    pub pid: Option<i32>,
    /// Where it stands.
    pub phase: GenerationPhase,
    /// What it runs.
    pub program: Program,
    /// Its cgroup, where it has one of its own.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
    /// Since its spawn.
    pub age_ms: u64,
    /// Its connections, where they could be counted.
    pub connections: Option<u64>,
    /// What it last said of itself (STATUS=).
    pub status: Option<String>,
    /// Why it is not ready yet: what its probe got last, or what is waited for.
    #[serde(default)]
    pub waiting_for: Option<String>,
    /// Why it ended.
    pub end: Option<String>,
}

/// Where a generation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GenerationPhase {
    /// The candidate.
    Starting,
    /// The candidate, ready, gets a share.
    Canary,
    /// The incumbent.
    Serving,
    /// Warm, to be switched back to.
    Standby,
    /// It finishes what it has.
    Draining,
    /// It was sent the stop signal.
    Stopping,
    /// It was sent SIGKILL.
    Killing,
    /// Its main process is gone, others are being ended.
    Sweeping,
    /// Gone to its last process.
    Retired,
}

/// What a generation runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Resolved path.
    pub path: PathBuf,
    /// Digest of the executable, once computed.
    pub sha256: Option<String>,
}

/// A socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    /// Its name.
    pub name: String,
    /// Where it is bound.
    pub address: String,
}

/// What became of a transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeReport {
    /// Its number.
    pub id: u64,
    /// Its kind.
    pub kind: UpgradeKind,
    /// The incumbent at its begin.
    pub from: Option<GenerationId>,
    /// Its candidate.
    pub to: Option<GenerationId>,
    /// None while it is under way.
    pub result: Option<UpgradeResult>,
    /// Why it did not succeed.
    pub reason: Option<String>,
    /// The candidate's last lines of stderr, where it failed.
    pub stderr: Vec<String>,
    /// Whether the generation from before serves on.
    pub old_kept_serving: bool,
    /// How its candidate was tried before the switch.
    #[serde(default)]
    pub canary: Option<CanaryReport>,
    /// Time of each phase so far.
    pub phases: Vec<PhaseTime>,
    /// Connections of the generations that leave because of it.
    pub connections_left: Option<u64>,
    /// What it did to connections, counted so far.
    #[serde(default)]
    pub proof: Proof,
    /// Whether it is over and all that left because of it is gone.
    pub retired: bool,
}

/// What a transaction did to connections of the generations that left because of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Proof {
    /// Waited in the queue at the switch, not accepted yet.
    pub queued_at_switch: u64,
    /// Most that they had at a time while they drained.
    pub drained: u64,
    /// Left when the drain time was over.
    pub cut: u64,
    /// Waited in the queue when the generation was gone, and were …
    pub queued_when_gone: u64,
    /// … moved to the queue of the one that serves,
    pub moved: u64,
    /// … kept for the next generation,
    pub kept: u64,
    /// … reset.
    pub reset: u64,
}

impl Proof {
    /// Whether every connection was served, or will be.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        (self.cut, self.kept, self.reset) == (0, 0, 0)
    }
}

/// How far a canary is, or came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanaryReport {
    /// The share of new connections that the candidate gets, or got last.
    pub share: Share,
    /// Networks from which it gets all of them.
    pub from: Vec<String>,
    /// Which step this is, from 1.
    pub step: usize,
    /// How many there are before the switch.
    pub steps: usize,
    /// Whether it is over only when somebody says so: this is the last step, and no switch follows by itself.
    pub by_hand: bool,
}

/// Kind of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpgradeKind {
    /// The first generation.
    Start,
    /// New code.
    Upgrade,
    /// Code from before.
    Rollback,
    /// The same code, a new process, on request.
    Restart,
    /// The same code, a new process, after a loss.
    Recovery,
}

/// How a transaction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpgradeResult {
    /// The new generation serves.
    Succeeded,
    /// It does not.
    Failed,
    /// It was ready, and was given no more than its share.
    Aborted,
    /// Switched back in the bake, on request.
    RolledBack,
    /// A later request took its place.
    Superseded,
    /// Called off before the switch.
    Cancelled,
}

/// How long a phase took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseTime {
    /// Which.
    pub phase: UpgradePhase,
    /// In milliseconds.
    pub ms: u64,
}

/// Phase of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpgradePhase {
    /// For its turn.
    Waiting,
    /// Until the program runs.
    Spawning,
    /// Until it is ready.
    WaitingReady,
    /// The candidate gets a share.
    Canary,
    /// The old generation on standby.
    Baking,
    /// The old generation finishes what it has.
    Draining,
}

/// The words that stand in JSON, for people too.
macro_rules! words {
    ($($name:ident { $($variant:ident => $word:literal),+ $(,)? })+) => {$(
        impl $name {
            /// All there are.
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            /// As it stands in JSON.
            #[must_use]
            pub fn word(self) -> &'static str {
                match self { $($name::$variant => $word),+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.word())
            }
        }
    )+};
}

words! {
    ServicePhase {
        Starting => "starting", Serving => "serving", Upgrading => "upgrading", Canary => "canary",
        Baking => "baking",
        Restarting => "restarting", LameDuck => "lame-duck", Stopping => "stopping",
    }
    GenerationPhase {
        Starting => "starting", Canary => "canary", Serving => "serving", Standby => "standby", Draining => "draining",
        Stopping => "stopping", Killing => "killing", Sweeping => "sweeping", Retired => "retired",
    }
    UpgradeKind {
        Start => "start", Upgrade => "upgrade", Rollback => "rollback", Restart => "restart", Recovery => "recovery",
    }
    UpgradeResult {
        Succeeded => "succeeded", Failed => "failed", Aborted => "aborted", RolledBack => "rolled-back", Superseded => "superseded",
        Cancelled => "cancelled",
    }
    UpgradePhase {
        Waiting => "waiting", Spawning => "spawning", WaitingReady => "waiting-ready", Canary => "canary", Baking => "baking",
        Draining => "draining",
    }
}

/// News for whoever follows the events.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The whole state: the first event of every stream, and the one after each [`Event::Lagged`]. Made by the server.
    Status(Box<Status>),
    /// A transaction changed.
    Upgrade(UpgradeReport),
    /// A generation changed.
    Generation(Generation),
    /// The service changed.
    Service {
        /// What it is doing now.
        phase: ServicePhase,
    },
    /// The supervisor's program is being replaced, and the stream ends: to be followed again on the same socket.
    Replacing,
    /// The reader was too slow: so many were left out. Made by the server.
    Lagged {
        /// How many.
        missed: u64,
    },
}

/// What can be asked of a supervisor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Its state.
    Status,
    /// A new generation, resolved anew.
    Upgrade,
    /// The same, tried like this first and not as `run` was told to. Without any option: not at all.
    Canary(Box<CanaryFlags>),
    /// The switch to the generation that is being tried.
    Promote,
    /// The end of the generation that is being tried, or is not ready yet.
    Abort,
    /// Back to the version before.
    Rollback,
    /// A new process of the same version.
    Restart,
    /// Another program in the place of the supervisor's own.
    SelfUpgrade,
    /// The end.
    Stop {
        /// Without draining.
        quick: bool,
    },
}

/// What a supervisor answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Its state.
    Status(Box<Status>),
    /// This transaction will show the result.
    Accepted {
        /// Its number.
        upgrade: u64,
    },
    /// It is stopping.
    Stopping,
    /// Another program takes its place now.
    Replacing,
    /// Nothing was changed.
    Refused(Refusal),
}

/// A transaction was accepted, as it stands in the answer's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// Its number.
    pub upgrade: u64,
}

/// Stopping was accepted, as it stands in the answer's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopping {
    /// Always.
    pub stopping: bool,
}

/// The supervisor's program is being replaced, as it stands in the answer's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replacing {
    /// Always.
    pub replacing: bool,
}

/// Why nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Why.
    pub reason: String,
    /// What to do.
    pub remedy: String,
}

/// A command and where its answer goes.
#[derive(Debug)]
pub struct Request {
    /// What is asked.
    pub command: Command,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Reply>,
}

/// The supervisor, as the control server knows it.
#[derive(Debug, Clone)]
pub struct Handle {
    /// Where commands go.
    pub commands: mpsc::Sender<Request>,
    /// Where news come from.
    pub events: broadcast::Sender<Event>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_json() {
        fn check<T: Serialize + Copy + std::fmt::Display>(all: &[T]) {
            for one in all {
                assert_eq!(serde_json::to_value(one).unwrap(), one.to_string());
            }
        }
        check(ServicePhase::ALL);
        check(GenerationPhase::ALL);
        check(UpgradeKind::ALL);
        check(UpgradeResult::ALL);
        check(UpgradePhase::ALL);
    }
}
