//! How generations end: watched, drained, signalled, swept, released.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use super::driver::{Driver, Input};
use super::running::{Main, Running, Seen};
use super::signals;
use super::spawning::LOOK_AGAIN;
use crate::config::{Drain, Handoff};
use crate::control::types as control;
use crate::core::stopping::Life;
use crate::core::{End, Event, GenerationId, Phase};
use crate::drain::connections::Count;
use crate::handoff::channel::Outgoing;
use crate::process::group::{signal_main, Group, Member};
use crate::process::spawn::{SpawnError, Spawned};
use crate::proto::handoff::ToGeneration;
use crate::sys::memory;
use crate::sys::pidfd::PidFd;

/// How many messages are taken when a generation has ended: more than its queue holds (`net.unix.max_dgram_qlen` is 10, or
/// 512 under systemd). Whoever floods it does not keep the end from being acted on.
const LAST_WORDS: usize = 1024;

/// A generation whose drain is observed has drained when looks have found nothing for so long: handshakes that were under
/// way at the switch have come to their end.
const QUIET: Duration = LOOK_AGAIN;
/// The same where it gets datagrams, which it may be about to answer.
const QUIET_WITH_DATAGRAMS: Duration = Duration::from_millis(1500);

impl Driver {
    pub(super) fn spawned(&mut self, id: GenerationId, result: Result<Spawned, SpawnError>) {
        let Some(running) = self.running.get_mut(&id) else { return };
        match result {
            Ok(spawned) => {
                tracing::info!(generation = %id, pid = spawned.member.pid, program = %running.program_path(), "started");
                running.executed = Some(Instant::now());
                self.watch_main(id, spawned.member, spawned.pidfd, Some(spawned.end));
                self.happened(Event::Spawned(id));
                self.reports.spawned(id, Instant::now());
                if let Some(trap) = spawned.trap {
                    self.watch_calls(id, trap);
                }
                self.listen_to(id);
                self.await_ready(id);
                self.check_canary(id);
                self.record();
            }
            // Beside one whose sockets are steered it could bind what nobody knows of: then it rather fails.
            Err(error)
                if error.is_trap()
                    && self.config.handoff == Handoff::Auto
                    && !self.cannot_trap
                    && self.adopted.groups.is_empty() =>
            {
                tracing::warn!("a program that binds for itself cannot be upgraded without a gap here: {error}");
                self.cannot_trap = true;
                let source = running.source;
                self.running.remove(&id);
                self.spawn(id, source);
            }
            Err(error) => {
                running.spawn_error = Some(error.to_string());
                self.happened(Event::SpawnFailed(id));
            }
        }
    }

    /// From now on the end of this process is the generation's. `end` comes from the reaper where it is our child.
    pub(super) fn watch_main(
        &mut self,
        id: GenerationId,
        member: Member,
        pidfd: PidFd,
        end: Option<oneshot::Receiver<End>>,
    ) {
        let end = end.unwrap_or_else(|| self.reaper.watch(Pid::from_raw(member.pid)));
        let watch = watch(&pidfd, id, member, end, self.inbox.clone());
        let Some(running) = self.running.get_mut(&id) else { return };
        if running.group.is_none() {
            running.group = Some(Arc::new(Group::new(member, &running.marker).within(running.cgroup.take())));
        }
        running.main = Some(Main { member, pidfd, watch });
    }

    /// The end is taken after everything that the generation said before it.
    pub(super) fn ended(&mut self, id: GenerationId, pid: Pid, end: End) {
        let Some(running) = self.running.get(&id) else { return };
        if let Some(channel) = &running.channel {
            channel.catch_up();
        }
        if let Some(notify) = running.notify.clone() {
            for _ in 0..LAST_WORDS {
                let Ok(Some(datagram)) = notify.try_recv() else { break };
                self.notified(id, datagram);
            }
        }
        let _loop_is_gone = self.inbox.send(Input::Gone(id, pid, end));
    }

    /// A generation was taken over without its main process: what is left of it is swept.
    pub(super) fn main_is_gone(&mut self, id: GenerationId) {
        if let Some(running) = self.running.get_mut(&id) {
            running.end = Some(End::Unknown);
            self.happened(Event::Exited { generation: id, end: End::Unknown, alone: false });
            self.sweep_due = Some(Instant::now() + LOOK_AGAIN);
        }
    }

    pub(super) fn gone(&mut self, id: GenerationId, pid: Pid, end: End) {
        let Some(running) = self.running.get(&id) else { return };
        if running.main.as_ref().is_some_and(|main| main.member.pid != pid.as_raw()) {
            // A daemon's first process: MAINPID named another one meanwhile.
            return;
        }
        self.claim_orphans(id);
        if self.goes_on_as_daemon(id, end) {
            return;
        }
        let Some(running) = self.running.get_mut(&id) else { return };
        running.main = None;
        running.end = Some(end);
        running.watchdog.due = None;
        if let Some(capture) = &running.capture {
            capture.catch_up();
        }
        let alone = running.group.as_ref().is_none_or(|group| group.is_empty().unwrap_or(false));
        tracing::info!(generation = %id, pid = pid.as_raw(), "{}", describe(end));
        self.steer_to_the_only_one(id);
        self.happened(Event::Exited { generation: id, end, alone });
        if !alone {
            self.sweep_due = Some(Instant::now() + LOOK_AGAIN);
        }
        self.repair_listeners();
    }

    /// Looks whether generations without a main process are gone altogether.
    pub(super) fn sweep(&mut self) {
        let empty: Vec<_> = self
            .running
            .values()
            .filter(|running| running.end.is_some())
            .filter(|running| running.group.as_ref().is_none_or(|group| group.is_empty().unwrap_or(false)))
            .map(|running| running.id)
            .collect();
        let left = self.running.values().filter(|running| running.end.is_some()).count() > empty.len();
        // The last of them is our child and its end is reported; this is for those that are not.
        self.sweep_due = left.then(|| Instant::now() + LOOK_AGAIN);
        for id in empty {
            self.happened(Event::Emptied(id));
        }
    }

    fn leaves(&mut self, id: GenerationId) {
        self.reports.leaves(id, Instant::now());
        self.counting.wanted();
    }

    pub(super) fn drain(&mut self, id: GenerationId) {
        self.leaves(id);
        if let Some(running) = self.running.get_mut(&id) {
            running.drained = Some(false);
        }
        if self.observes_drains() && !self.shares_locals(id) {
            tracing::info!(generation = %id, "drains: {} once its last connection is gone", self.config.stop_signal);
            if let Some(running) = self.running.get_mut(&id) {
                running.seen = Some(Seen::Busy);
            }
        } else if !self.empties_first(id) {
            self.begin_drain(id);
        }
        self.record();
        self.news_of(id);
    }

    /// It is told, and stops accepting.
    pub(super) fn begin_drain(&mut self, id: GenerationId) {
        if self.tell_to_drain(id) {
            tracing::info!(generation = %id, "drains");
        } else {
            tracing::info!(generation = %id, "drains: {} to its main process", self.config.stop_signal);
            self.signal_main(id, self.config.stop_signal);
        }
    }

    /// Whether a generation gets nothing new once it is switched away from, and is left alone until what it has is gone.
    fn observes_drains(&self) -> bool {
        let steered = self.steers_all() && self.machine.serving().is_some();
        match self.config.drain {
            Drain::Auto => steered && self.adopts(),
            Drain::Observe => steered,
            Drain::Signal => false,
        }
    }

    /// Connections of a generation were counted. None for a while, and none that waits: it has drained, however often that
    /// was looked at (whoever asks for the status does so too). One that gets datagrams is given some more time for its
    /// answers. Connections that are still count as none (`--drain-idle`).
    pub(super) fn observed(&mut self, id: GenerationId, count: Count) {
        let waiting = self.has_waiting(id);
        let enough = if self.gets_datagrams(id) { QUIET_WITH_DATAGRAMS } else { QUIET };
        let Some(running) = self.running.get_mut(&id) else { return };
        let (now, busy) = (Instant::now(), count.all > count.still || waiting);
        let drained = match running.seen {
            None => return,
            Some(Seen::QuietSince(since)) if !busy => now - since >= enough,
            Some(Seen::Busy | Seen::QuietSince(_)) => {
                running.seen = Some(if busy { Seen::Busy } else { Seen::QuietSince(now) });
                false
            }
        };
        if drained {
            running.seen = None;
            if count.still > 0 {
                tracing::info!(generation = %id, idle = count.still, "has drained: its other connections are gone");
            }
            self.has_drained(id);
        }
    }

    /// It has nothing left to finish.
    pub(super) fn has_drained(&mut self, id: GenerationId) {
        if let Some(running) = self.running.get_mut(&id) {
            running.drained = running.drained.map(|_| true);
        }
        self.happened(Event::Drained(id));
    }

    /// By the handoff socket; false where nobody reads it. Nothing is said twice.
    fn tell_to_drain(&mut self, id: GenerationId) -> bool {
        // While the service runs somebody serves after it, if not now then when the service is restarted.
        let last = self.is_being_stopped();
        let others_keep = || self.running.values().any(|other| other.id != id && other.hears());
        let more = last && self.receiver() == Some(id) && others_keep();
        let limit = match self.phase(id) {
            Some(Phase::Draining { deadline: Some(deadline) }) => Some(deadline.since(self.now())),
            _ => self.config.drain_timeout,
        };
        let timeout_ms = limit.and_then(|limit| u64::try_from(limit.as_millis()).ok());
        let Some(running) = self.running.get_mut(&id).filter(|running| running.hears()) else { return false };
        let told = running.told_to_drain.replace((last, more));
        if let Some(channel) = running.channel.as_ref().filter(|_| told != Some((last, more))) {
            channel.send(Outgoing { message: ToGeneration::Drain { timeout_ms, last, more }, fds: Vec::new() });
        }
        true
    }

    /// The service is being stopped: what drained to pass on its connections has nobody to pass them to any more; and
    /// who takes those that are on their way is told when no more can come.
    pub(super) fn nobody_follows(&mut self) {
        let ids: Vec<_> = self.running.keys().copied().collect();
        for id in ids {
            if self.is_draining(id) {
                self.tell_to_drain(id);
            }
        }
    }

    pub(super) fn is_being_stopped(&self) -> bool {
        self.machine.life() != Life::Running && self.machine.serving().is_none()
    }

    /// Who gets what is kept: who serves; when the service is being stopped, the newest that still drains.
    pub(super) fn receiver(&self) -> Option<GenerationId> {
        let hears = |running: &&Running| running.hears() && self.is_draining(running.id);
        let newest = || self.running.values().rev().find(hears).map(|running| running.id);
        self.machine.serving().or_else(|| self.is_being_stopped().then(newest).flatten())
    }

    pub(super) fn is_draining(&self, id: GenerationId) -> bool {
        matches!(self.phase(id), Some(Phase::Draining { .. }))
    }

    fn phase(&self, id: GenerationId) -> Option<Phase> {
        self.machine.generations().find(|(other, _)| *other == id).map(|(_, generation)| generation.phase)
    }

    pub(super) fn signal_main(&mut self, id: GenerationId, signal: Signal) {
        self.leaves(id);
        let Some(main) = self.running.get(&id).and_then(|running| running.main.as_ref()) else { return };
        if let Err(error) = signal_main(&main.pidfd, signal) {
            tracing::error!(generation = %id, "cannot send {signal}: {error}");
        }
    }

    pub(super) fn signal(&mut self, id: GenerationId, signal: Signal) {
        self.leaves(id);
        let Some(group) = self.running.get(&id).and_then(|running| running.group.as_ref()) else { return };
        tracing::info!(generation = %id, "{signal} to all of its processes");
        let sent = group.signal_all(signal).and_then(|_| match signal {
            // A stopped process would sleep through it.
            Signal::SIGKILL => Ok(0),
            _ => group.signal_all(Signal::SIGCONT),
        });
        if let Err(error) = sent {
            tracing::error!(generation = %id, "cannot send {signal}: {error}");
        }
        self.news_of(id);
    }

    pub(super) fn release(&mut self, id: GenerationId) {
        self.repair_listeners();
        self.restore_flags_once_gone(id);
        self.store.discard(id);
        let served = self.running.get(&id).is_some_and(|running| running.ready);
        let unwanted = self.kept.lost(id, served);
        if unwanted > 0 {
            tracing::warn!(generation = %id, unwanted, "what former generations passed on was not taken: closed");
        }
        if let Some(running) = self.running.remove(&id) {
            tracing::info!(generation = %id, "is gone to its last process");
            let retired = self.describe(&running, control::GenerationPhase::Retired);
            let _nobody_listens = self.events.send(control::Event::Generation(retired.clone()));
            self.retired.push_front(retired);
            self.retired.truncate(5);
        }
        self.leave_sockets(id);
        self.pass_on_kept();
        if self.is_being_stopped() {
            self.nobody_follows();
        }
        if self.kept.shrunk() {
            memory::give_back();
        }
        self.forget_programs();
        self.upward.status(&self.one_line());
        self.record();
    }

    /// Lets go of executables that nothing may run any more.
    pub(super) fn forget_programs(&mut self) {
        let machine = &self.machine;
        self.recipes.retain(|&program, _| machine.needs_program(program));
    }
}

/// Reports the end of a main process.
pub(super) fn watch(
    pidfd: &PidFd,
    id: GenerationId,
    member: Member,
    end: oneshot::Receiver<End>,
    inbox: mpsc::UnboundedSender<Input>,
) -> Option<AbortHandle> {
    let watched = pidfd.try_clone().ok()?;
    let task = tokio::spawn(async move {
        let _cannot_be_watched = watched.exited().await;
        // One that is not our child is reaped by its parent, and its status is not for us.
        let reaped = tokio::time::timeout(Duration::from_secs(1), end).await;
        let end = reaped.ok().and_then(Result::ok).unwrap_or(End::Unknown);
        let _loop_is_gone = inbox.send(Input::Ended(id, Pid::from_raw(member.pid), end));
    });
    Some(task.abort_handle())
}

/// An end in words.
#[must_use]
pub fn describe(end: End) -> String {
    match end {
        End::Exited(code) => format!("exited with status {code}"),
        End::Killed { signal, core: false } => format!("was killed by {}", signals::name(signal)),
        End::Killed { signal, core: true } => format!("was killed by {} (core dumped)", signals::name(signal)),
        End::Unknown => "ended (its status is not known)".to_owned(),
    }
}
