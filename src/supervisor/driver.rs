//! Performs the core's actions, and tells it what came of them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Instant, SystemTime};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::sync::{broadcast, mpsc};

use super::adopting::Adopted;
use super::canary::Canaries;
use super::counting::Counting;
use super::replacing::program::ReplaceError;
use super::replacing::Replacement;
use super::reports::Reports;
use super::running::Running;
use super::spawning::Recipe;
use super::store::{Keeping, Store};
use super::stored_above::StoredAbove;
use super::upward::Upward;
use crate::config::ServiceConfig;
use crate::control::types::{self as control, ServicePhase};
use crate::core::{Action, Answer, End, Event, Finish, GenerationId, Machine, Request, Time};
use crate::drain::connections::Count;
use crate::handoff::channel::Incoming;
use crate::listener::Listener;
use crate::process::cgroup::Delegated;
use crate::process::limits::Limit;
use crate::process::output::Output;
use crate::process::reaper::Reaper;
use crate::process::spawn::{SpawnError, Spawned};
use crate::ready::divert::Wish;
use crate::ready::notify::Datagram;
use crate::ready::tls::Tls;
use crate::sys::seccomp::Notification;

/// What tasks report to the loop.
#[derive(Debug)]
pub enum Input {
    /// What became of a spawn.
    Spawned(GenerationId, Result<Spawned, SpawnError>),
    /// A main process ended.
    Ended(GenerationId, Pid, End),
    /// The same, after all that the generation had said before was heard.
    Gone(GenerationId, Pid, End),
    /// A probe succeeded, or the delay is over.
    Probed(GenerationId),
    /// A probe wants to reach its generation alone.
    Wished(GenerationId, Wish),
    /// It ran for a while without an end.
    Settled(GenerationId),
    /// A probe did not succeed yet.
    WhyNot(GenerationId, String),
    /// It called bind(2) or listen(2), and waits.
    Caught(GenerationId, Notification),
    /// It made no further socket for a while.
    Quiet {
        /// Which one.
        generation: GenerationId,
        /// How many it had made then.
        count: u32,
        /// Whether what is missing is not waited for any longer.
        given_up: bool,
    },
    /// A round of a canary's checks, in this step.
    Checked(GenerationId, u16, Result<(), String>),
    /// A notify message.
    Notified(GenerationId, Datagram),
    /// A handoff message.
    Heard(GenerationId, Incoming),
    /// Another program was tried.
    Tried(Result<(), ReplaceError>),
    /// Connections were counted.
    Counted(BTreeMap<GenerationId, Count>),
}

/// One service and everything that it has.
pub struct Driver {
    pub(super) config: ServiceConfig,
    pub(super) machine: Machine,
    /// What the core has to be told once the running action is performed.
    pub(super) happenings: VecDeque<Event>,
    pub(super) listeners: Vec<Listener>,
    pub(super) running: BTreeMap<GenerationId, Running>,
    /// The last that ended, for the status.
    pub(super) retired: VecDeque<control::Generation>,
    pub(super) recipes: BTreeMap<GenerationId, Recipe>,
    pub(super) store: Store,
    pub(super) kept: Keeping,
    pub(super) reports: Reports,
    pub(super) restarts: u64,
    /// How often the program was replaced.
    pub(super) replacements: u64,
    pub(super) replacement: Option<Replacement>,
    /// By which its program is found.
    pub(super) own_name: OsString,
    pub(super) inbox: mpsc::UnboundedSender<Input>,
    pub(super) events: broadcast::Sender<control::Event>,
    pub(super) reaper: Reaper,
    pub(super) output: Output,
    /// Where generations have cgroups of their own.
    pub(super) cgroups: Option<Delegated>,
    pub(super) nofile: Option<Limit>,
    pub(super) epoch: Instant,
    pub(super) started: SystemTime,
    pub(super) start_directory: PathBuf,
    pub(super) state_file: PathBuf,
    pub(super) upward: Upward,
    pub(super) stored_above: StoredAbove,
    pub(super) counting: Counting,
    pub(super) adopted: Adopted,
    /// Generations of which a socket may be left.
    pub(super) departed: BTreeSet<GenerationId>,
    /// For probes by `https://`.
    pub(super) tls: Option<Tls>,
    pub(super) canaries: Canaries,
    /// Whether calls cannot be caught here.
    pub(super) cannot_trap: bool,
    /// When to look again whether generations without a main process are gone.
    pub(super) sweep_due: Option<Instant>,
    /// Whether a generation ever said that it is ready.
    pub(super) speaks: bool,
    /// The phase that was told last.
    pub(super) told: Option<ServicePhase>,
    pub(super) finish: Option<Finish>,
    pub(super) last_failure: Option<String>,
}

impl Driver {
    /// Time as the core counts it.
    pub(super) fn now(&self) -> Time {
        Time(self.epoch.elapsed())
    }

    /// Notes something for the core.
    pub(super) fn happened(&mut self, event: Event) {
        self.happenings.push_back(event);
    }

    /// Why everything ended, once it has.
    pub(super) fn finished(&self) -> Option<Finish> {
        self.finish
    }

    /// Takes a report of a task.
    pub(super) fn take(&mut self, input: Input) {
        match input {
            Input::Spawned(id, result) => self.spawned(id, result),
            Input::Ended(id, pid, end) => self.ended(id, pid, end),
            Input::Gone(id, pid, end) => self.gone(id, pid, end),
            Input::Probed(id) => self.probed(id),
            Input::Wished(id, wish) => self.adopted.grant(id, wish),
            Input::Caught(id, notification) => self.caught(id, &notification),
            Input::Quiet { generation, count, given_up } => self.quiet(generation, count, given_up),
            Input::Settled(id) => self.settled_in(id),
            Input::WhyNot(id, why) => {
                if let Some(running) = self.running.get_mut(&id) {
                    running.why_not = Some(why);
                }
                self.news_of(id);
            }
            Input::Checked(id, step, result) => self.checked(id, step, result),
            Input::Notified(id, datagram) => self.notified(id, datagram),
            Input::Heard(id, incoming) => self.heard(id, incoming),
            Input::Tried(result) => self.tried(result),
            Input::Counted(counts) => self.counted(&counts),
        }
    }

    /// Somebody asks for something.
    pub(super) fn ask(&mut self, request: Request) -> Answer {
        let answer = self.machine.request(request, self.now());
        self.settle();
        answer
    }

    /// Tells the core what happened and does what it says, until there is nothing left of both.
    pub(super) fn settle(&mut self) {
        loop {
            if let Some(action) = self.machine.poll_action() {
                self.perform(action);
            } else if let Some(event) = self.happenings.pop_front() {
                let now = self.now();
                self.machine.handle(event, now);
            } else {
                break;
            }
        }
        self.tell();
    }

    /// When the loop has to look at the clock again.
    pub(super) fn due(&self) -> Option<Instant> {
        let core = self.machine.poll_timeout().map(|time| self.epoch + time.0);
        let watchdogs = self.running.values().filter_map(|running| running.watchdog.due);
        let looks = self.sweep_due.into_iter().chain(self.counting.due()).chain(self.adopted.due());
        watchdogs.chain(core).chain(looks).chain(self.replacement_due()).chain(self.upward.due()).min()
    }

    /// The clock was looked at.
    pub(super) fn tick(&mut self) {
        let now = Instant::now();
        for running in self.running.values_mut() {
            if running.watchdog.due.is_some_and(|due| due <= now) {
                running.watchdog.due = None;
                tracing::error!(generation = %running.id, "gave no sign of life within its watchdog's time");
                self.happenings.push_back(Event::WatchdogExpired(running.id));
            }
        }
        if self.machine.poll_timeout().is_some_and(|due| due <= self.now()) {
            self.happened(Event::Timeout);
        }
        if self.sweep_due.is_some_and(|due| due <= now) {
            self.sweep();
        }
        if self.adopted.due().is_some_and(|due| due <= now) {
            self.tend_left();
            self.refresh_datagrams();
            self.tend_emptying();
        }
        if self.counting.due().is_some_and(|due| due <= now) {
            self.count();
        }
        self.upward.tick(now);
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Spawn { generation, source } => self.spawn(generation, source),
            Action::Switch { from, to } => self.switch(from, to),
            Action::Share { candidate, incumbent, step } => self.share(candidate, incumbent, step),
            Action::Unshare { candidate, incumbent } => self.unshare(candidate, incumbent),
            Action::Drain(id) => self.drain(id),
            Action::Stop(id) => {
                self.prove_stop(id);
                self.signal(id, self.config.stop_signal);
            }
            Action::Abort(id) => self.signal_main(id, Signal::SIGABRT),
            Action::Kill(id) => self.signal(id, Signal::SIGKILL),
            Action::Release(id) => self.release(id),
            Action::Notice(notice) => self.noticed(notice),
            Action::Finish(finish) => self.finish = Some(finish),
        }
    }
}
