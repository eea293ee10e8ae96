//! What goes into the core and what comes out.

use serde::{Deserialize, Serialize};

use super::{Canary, End, GenerationId, Time};

/// Number of a transaction: an upgrade, a rollback, a restart, a start. Counted up, never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct UpgradeId(pub u64);

impl std::fmt::Display for UpgradeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// What somebody asks for, by signal or control socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Request {
    /// Put a new generation, resolved anew, in the place of the serving one.
    Upgrade,
    /// The same, by a canary first: the new generation shares with the serving one.
    Canary(Canary),
    /// The switch to the generation that shares, at once.
    Promote,
    /// The end of the generation that shares, or is not ready yet.
    Abort,
    /// Back to the generation before, or to the program it ran.
    Rollback,
    /// A fresh process of the program that serves now.
    Restart,
    /// Drain, then stop. Asked a second time: [`Request::Quit`].
    Stop,
    /// Stop signal to all now, SIGKILL after the stop time. Asked a second time: SIGKILL now.
    Quit,
}

/// What a [`Request`] is answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Answer {
    /// This transaction will show the result.
    Accepted(UpgradeId),
    /// The service is being stopped.
    Stopping,
    /// Nothing was changed.
    Refused(Refusal),
}

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The supervisor is about to end.
    Stopping,
    /// No version served before the one that serves now.
    NothingBefore,
    /// No version has served yet.
    NothingServed,
    /// No generation shares with the one that serves.
    NoCanary,
    /// No generation is there that was not switched to.
    NothingToAbort,
}

/// What happened. The driver reports it; a generation is named by its number, never by a pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// execve(2) succeeded.
    Spawned(GenerationId),
    /// The program could not be resolved or executed; no process is left of it.
    SpawnFailed(GenerationId),
    /// It has shown that it can serve.
    Ready(GenerationId),
    /// Its main process was reaped. `alone`: nothing else of the generation lives.
    Exited {
        /// Which one.
        generation: GenerationId,
        /// How.
        end: End,
        /// Whether no other process of it is left.
        alone: bool,
    },
    /// After [`Event::Exited`]: the rest of it is gone too.
    Emptied(GenerationId),
    /// It says that it has nothing left to finish.
    Drained(GenerationId),
    /// It asked for its current deadline to be put off until then, at least.
    Extended(GenerationId, Time),
    /// It missed its watchdog's time, or asked to be treated so.
    WatchdogExpired(GenerationId),
    /// The check of its canary succeeded in this step.
    Checked(GenerationId, u16),
    /// The check of its canary failed, or its share cannot be given.
    CheckFailed(GenerationId),
    /// The time that `poll_timeout` named has come.
    Timeout,
}

/// What to do. The driver performs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Resolve, fork, hand off, execute; answer with `Spawned` or `SpawnFailed`.
    Spawn {
        /// The new generation's number.
        generation: GenerationId,
        /// What it runs.
        source: Source,
    },
    /// New connections go to `to` from now on.
    Switch {
        /// The incumbent until now, if one lives.
        from: Option<GenerationId>,
        /// The incumbent from now on.
        to: GenerationId,
    },
    /// The candidate gets its share of this step, the incumbent the rest; its check is begun.
    Share {
        /// Who is tried.
        candidate: GenerationId,
        /// Who serves.
        incumbent: GenerationId,
        /// Number of the step, from 0.
        step: u16,
    },
    /// The candidate gets nothing new any more, and the incumbent everything.
    Unshare {
        /// Who was tried.
        candidate: GenerationId,
        /// Who serves.
        incumbent: GenerationId,
    },
    /// Ask it to finish what it has: drain message, or stop signal to its main process.
    Drain(GenerationId),
    /// Stop signal to all of its processes.
    Stop(GenerationId),
    /// SIGABRT to its main process: it hangs, and a core dump helps.
    Abort(GenerationId),
    /// SIGKILL to all of its processes.
    Kill(GenerationId),
    /// It is gone, to its last process: release what was held for it.
    Release(GenerationId),
    /// Tell who is interested.
    Notice(Notice),
    /// Everything is gone: close the listeners and end.
    Finish(Finish),
}

/// What a generation runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Source {
    /// Resolved anew: path, working directory, environment files.
    Fresh,
    /// What this generation resolved, on its held executable.
    Recorded(GenerationId),
}

/// The kind of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// The first generation.
    Start,
    /// New code.
    Upgrade,
    /// Code from before.
    Rollback,
    /// The same code, a new process, because somebody asked.
    Restart,
    /// The same code, a new process, because the one before was lost.
    Recovery,
}

/// News of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Notice {
    /// It waits for its turn.
    Queued(UpgradeId, Kind),
    /// Its candidate is being spawned.
    Started {
        /// Which transaction.
        upgrade: UpgradeId,
        /// Its kind.
        kind: Kind,
        /// The incumbent, if one lives.
        from: Option<GenerationId>,
        /// The candidate.
        to: GenerationId,
    },
    /// The candidate is ready and gets its share of this step.
    Canary(UpgradeId, u16),
    /// Switched; the old generation is on standby.
    Baking(UpgradeId),
    /// It is over.
    Ended(UpgradeId, Outcome),
    /// The next recovery is due at that time.
    Backoff(Time),
    /// Stopping was asked for; serving goes on until that time.
    LameDuck(Time),
    /// Everything is being drained or stopped.
    Stopping,
}

/// How a transaction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The new generation serves.
    Succeeded,
    /// It does not, for this reason; what served before was not touched, or serves again.
    Failed(Failure),
    /// It was ready, got no more than its share, and is on its way out; what served before serves on.
    Aborted(Abort),
    /// Switched back in its bake because somebody asked.
    RolledBack,
    /// A later request of another kind took its place in the queue.
    Superseded,
    /// The supervisor is stopping, or a rollback came before the switch.
    Cancelled,
}

/// Why a candidate failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Failure {
    /// It could not be executed.
    Spawn,
    /// It ended before it was ready.
    Exited(End),
    /// It was not ready in time.
    StartTimeout,
    /// It was ready, and ended in its bake.
    DiedInBake(End),
    /// It was ready, and missed its watchdog's time in its bake.
    HungInBake,
}

/// Why a candidate is not tried any longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Abort {
    /// Somebody asked: before it was ready, too.
    Asked,
    /// Its check failed, or its share could not be given.
    Check,
    /// It ended.
    Died(End),
    /// It missed its watchdog's time.
    Hung,
}

/// Why the supervisor ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Finish {
    /// Somebody asked.
    Stopped,
    /// No version ever became ready.
    StartFailed(Failure),
    /// The service ended by itself and its restart policy lets it.
    ServiceEnded(End),
    /// It was lost too often.
    RestartLimit,
}
