//! What travels on the control socket.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tokio::sync::{broadcast, mpsc, oneshot};

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
    /// Since its spawn.
    pub age_ms: u64,
    /// Established TCP connections, where they could be counted.
    pub connections: Option<u64>,
    /// What it last said of itself (STATUS=).
    pub status: Option<String>,
    /// Why it ended.
    pub end: Option<String>,
}

/// Where a generation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GenerationPhase {
    /// The candidate.
    Starting,
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
    /// Time of each phase so far.
    pub phases: Vec<PhaseTime>,
    /// Connections of the generations that leave because of it.
    pub connections_left: Option<u64>,
    /// Whether it is over and all that left because of it is gone.
    pub retired: bool,
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpgradeResult {
    /// The new generation serves.
    Succeeded,
    /// It does not.
    Failed,
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
    /// The old generation on standby.
    Baking,
    /// The old generation finishes what it has.
    Draining,
}

/// News for whoever follows the events.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A transaction changed.
    Upgrade(UpgradeReport),
    /// A generation changed.
    Generation(Generation),
    /// The service changed.
    Service {
        /// What it is doing now.
        phase: ServicePhase,
    },
    /// The reader was too slow: so many were left out.
    Lagged {
        /// How many.
        missed: u64,
    },
}

/// What can be asked of a supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Its state.
    Status,
    /// A new generation, resolved anew.
    Upgrade,
    /// Back to the version before.
    Rollback,
    /// A new process of the same version.
    Restart,
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
    /// Nothing was changed.
    Refused(Refusal),
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
