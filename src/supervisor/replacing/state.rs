//! What travels, and how a driver is taken apart and put together.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use nix::sys::resource::Resource;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::control::server::Server;
use crate::control::types as control;
use crate::core::{GenerationId, Machine, Phase};
use crate::handoff::channel::{self, Channel};
use crate::listener::inherit::Inherited;
use crate::process::capture;
use crate::process::limits::Limit;
use crate::process::output::Capture;
use crate::process::program::Program;
use crate::state::{fds, with};
use crate::supervisor::adopting::Adopted;
use crate::supervisor::canary::Canaries;
use crate::supervisor::driver::{Driver, Input};
use crate::supervisor::ending;
use crate::supervisor::instance::Lock;
use crate::supervisor::reports::Reports;
use crate::supervisor::run::most_kept;
use crate::supervisor::running::{Running, Tasks};
use crate::supervisor::spawning::Recipe;
use crate::supervisor::store::{Keeping, Store};
use crate::supervisor::stored_above;
use crate::supervisor::upward::Told;

/// Everything that a supervisor knows and its configuration does not say.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    service: String,
    instance: Instance,
    listeners: Vec<Held>,
    machine: Machine,
    #[serde(with = "with::moment")]
    epoch: Instant,
    started: SystemTime,
    replacements: u64,
    restarts: u64,
    running: BTreeMap<GenerationId, Running>,
    channels: BTreeMap<GenerationId, channel::Carried>,
    captures: BTreeMap<GenerationId, capture::Carried>,
    recipes: BTreeMap<GenerationId, Recipe>,
    retired: VecDeque<control::Generation>,
    store: Store,
    kept: Keeping,
    reports: Reports,
    adopted: Adopted,
    departed: BTreeSet<GenerationId>,
    canaries: Canaries,
    told_above: Told,
    #[serde(default)]
    stored_above: stored_above::Carried,
    cannot_trap: bool,
    speaks: bool,
    last_failure: Option<String>,
}

/// What makes it the one of its name.
#[derive(Debug, Serialize, Deserialize)]
pub struct Instance {
    #[serde(with = "fds::owned")]
    lock: OwnedFd,
    #[serde(with = "fds::owned")]
    control: OwnedFd,
    #[serde(with = "with::path")]
    control_path: PathBuf,
    /// Soft and hard limit of open files, that generations get back.
    nofile: Option<(u64, u64)>,
}

/// A listener.
#[derive(Debug, Serialize, Deserialize)]
struct Held {
    name: String,
    /// Whether somebody above bound it.
    passed: bool,
    #[serde(with = "fds::shared")]
    fd: Arc<OwnedFd>,
}

impl Instance {
    /// Of nobody, for a trial.
    pub fn placeholder() -> std::io::Result<Instance> {
        let (control, lock) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        Ok(Instance { lock, control, control_path: PathBuf::new(), nofile: None })
    }

    /// Of a supervisor.
    pub fn new(lock: &Lock, server: &Server, nofile: Option<Limit>) -> std::io::Result<Instance> {
        Ok(Instance {
            lock: lock.file().as_fd().try_clone_to_owned()?,
            control: server.listener().as_fd().try_clone_to_owned()?,
            control_path: server.path().to_owned(),
            nofile: nofile.map(|limit| (limit.soft, limit.hard)),
        })
    }
}

/// What the state has for the start of the one that goes on.
pub struct Begin {
    /// The lock's file.
    pub lock: OwnedFd,
    /// The control socket, which listens.
    pub control: OwnedFd,
    /// Its path.
    pub control_path: PathBuf,
    /// The limit of open files that generations get.
    pub nofile: Option<Limit>,
    /// Listeners that somebody above bound.
    pub passed: Inherited,
    /// The others, by their names.
    pub bound: BTreeMap<String, OwnedFd>,
}

impl State {
    /// Whose it is.
    #[must_use]
    pub fn service(&self) -> &str {
        &self.service
    }

    /// Names of its listeners.
    pub fn listeners(&self) -> impl Iterator<Item = &str> {
        self.listeners.iter().map(|held| held.name.as_str())
    }

    /// What is needed before there is a driver.
    pub fn begin(&mut self) -> std::io::Result<Begin> {
        let Instance { lock, control, control_path, nofile } = &self.instance;
        let mut bound = BTreeMap::new();
        let mut passed = Vec::new();
        for held in self.listeners.drain(..) {
            let fd = held.fd.try_clone()?;
            if held.passed {
                passed.push((held.name, fd));
            } else {
                bound.insert(held.name, fd);
            }
        }
        Ok(Begin {
            lock: lock.try_clone()?,
            control: control.try_clone()?,
            control_path: control_path.clone(),
            nofile: nofile.map(|(soft, hard)| Limit { resource: Resource::RLIMIT_NOFILE, soft, hard }),
            passed: Inherited::from_fds(passed),
            bound,
        })
    }
}

impl Driver {
    /// Takes what travels out of the driver. [`Driver::put_together`] puts it back.
    pub(super) fn take_apart(&mut self, instance: Instance) -> std::io::Result<State> {
        let listeners = self.listeners.iter().enumerate().map(|(place, listener)| Held {
            name: listener.name().to_owned(),
            passed: listener.is_passed(),
            fd: self.living_socket(place).unwrap_or_else(|| listener.fd()),
        });
        let listeners = listeners.collect();
        let channels = self.running.iter().filter_map(|(id, running)| Some((*id, running.channel.as_ref()?.carry())));
        let channels = channels.filter_map(|(id, carried)| Some(carried.transpose()?.map(|carried| (id, carried))));
        // All that may fail comes before anything is moved.
        let channels = channels.collect::<std::io::Result<_>>()?;
        let stored_above = self.stored_above.carry()?;
        let captures =
            self.running.iter().filter_map(|(id, running)| Some((*id, running.capture.as_ref()?.carry()))).collect();
        let policy = self.machine.policy().clone();
        Ok(State {
            service: self.config.name.clone(),
            instance,
            listeners,
            channels,
            captures,
            machine: std::mem::replace(&mut self.machine, Machine::new(policy)),
            epoch: self.epoch,
            started: self.started,
            replacements: self.replacements,
            restarts: self.restarts,
            running: std::mem::take(&mut self.running),
            recipes: std::mem::take(&mut self.recipes),
            retired: std::mem::take(&mut self.retired),
            store: std::mem::replace(&mut self.store, Store::new(0)),
            kept: std::mem::replace(&mut self.kept, Keeping::new(0)),
            reports: std::mem::take(&mut self.reports),
            adopted: std::mem::take(&mut self.adopted),
            departed: std::mem::take(&mut self.departed),
            canaries: std::mem::take(&mut self.canaries),
            told_above: self.upward.told(),
            stored_above,
            cannot_trap: self.cannot_trap,
            speaks: self.speaks,
            last_failure: self.last_failure.clone(),
        })
    }

    /// Of a listener at which each generation has a socket of its own: one that listens. The first one, which zddsup bound, may
    /// be out of its group by now, and must not come back.
    fn living_socket(&self, place: usize) -> Option<Arc<OwnedFd>> {
        let (key, _) = self.adopted.declared.iter().find(|(_, other)| **other == place)?;
        let members = self.adopted.groups.get(key)?.members().filter(|(.., leaving)| !leaving);
        let (members, serving) = (members.collect::<Vec<_>>(), self.machine.serving());
        let own = members.iter().find(|(owner, ..)| Some(*owner) == serving).or_else(|| members.first());
        own.map(|(_, socket, _)| Arc::clone(socket))
    }

    /// Goes on with it: in the program that was started in the place of another one, or where that could not be.
    pub(in crate::supervisor) fn put_together(&mut self, state: State) {
        let policy = self.machine.policy().clone();
        self.machine = state.machine.under(policy);
        self.epoch = state.epoch;
        self.started = state.started;
        self.replacements = state.replacements;
        self.restarts = state.restarts;
        self.running = state.running;
        self.recipes = state.recipes;
        self.retired = state.retired;
        self.store = state.store.within(self.config.fdstore_max);
        self.kept = state.kept.within(most_kept());
        self.reports = state.reports;
        self.adopted = state.adopted;
        self.departed = state.departed;
        self.canaries = state.canaries;
        self.upward.resume(state.told_above);
        self.stored_above.resume(state.stored_above);
        self.cannot_trap = state.cannot_trap;
        self.speaks = state.speaks;
        self.last_failure = state.last_failure;
        for (id, carried) in state.channels {
            let inbox = self.inbox.clone();
            let Some(running) = self.running.get_mut(&id).filter(|running| running.channel.is_none()) else { continue };
            let heard = move |incoming| drop(inbox.send(Input::Heard(id, incoming)));
            match Channel::resume(carried, heard) {
                Ok(channel) => running.channel = Some(channel),
                Err(error) => tracing::error!(generation = %id, "its handoff socket is lost: {error}"),
            }
        }
        for (id, carried) in state.captures {
            let Some(running) = self.running.get_mut(&id).filter(|running| running.capture.is_none()) else { continue };
            match Capture::resume(carried, &self.output) {
                Ok(capture) => running.capture = Some(capture),
                Err(error) => tracing::error!(generation = %id, "its stderr is lost: {error}"),
            }
        }
        // One open file for all that run the same.
        let mut different: Vec<Arc<Program>> = Vec::new();
        for recipe in self.recipes.values_mut() {
            match different.iter().find(|program| program.is_same(&recipe.program)) {
                Some(same) => recipe.program = Arc::clone(same),
                None => different.push(Arc::clone(&recipe.program)),
            }
        }
        let programs: Vec<_> = self.machine.generations().map(|(id, generation)| (id, generation.program)).collect();
        for (id, program) in programs {
            let program = self.recipes.get(&program).map(|recipe| Arc::clone(&recipe.program));
            if let (Some(running), Some(program)) = (self.running.get_mut(&id), program) {
                running.program.get_or_insert(program);
            }
        }
    }

    /// Tasks that were not taken along are begun again.
    pub(in crate::supervisor) fn wake(&mut self) {
        let ids: Vec<_> = self.running.keys().copied().collect();
        for id in ids {
            let Some(running) = self.running.get_mut(&id) else { continue };
            running.tasks = Tasks::default();
            if running.main.is_none() {
                // It is being spawned: what that comes to begins them.
                continue;
            }
            self.watch_again(id);
            self.listen_to(id);
            self.take_calls(id);
            let starts = self
                .machine
                .generations()
                .any(|(other, generation)| other == id && matches!(generation.phase, Phase::Starting { .. }));
            if starts {
                self.await_ready(id);
                self.await_quiet(id);
            }
            self.check_canary(id);
        }
        if self.running.values().any(|running| running.end.is_some()) {
            self.sweep_due = Some(Instant::now());
        }
        if self.machine.generations().any(|(_, generation)| generation.is_leaving()) {
            self.counting.wanted();
        }
        self.guard_files();
        self.digest_programs();
        self.reaper.reap();
    }

    /// Its main process' end is reported, whoever watched it before.
    fn watch_again(&mut self, id: GenerationId) {
        let Some(main) = self.running.get_mut(&id).and_then(|running| running.main.as_mut()) else { return };
        if main.watch.is_some() {
            return;
        }
        let end = self.reaper.watch(Pid::from_raw(main.member.pid));
        main.watch = ending::watch(&main.pidfd, id, main.member, end, self.inbox.clone());
    }
}
