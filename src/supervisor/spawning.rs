//! The one place where a generation's program, environment and fds are made.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use super::driver::{Driver, Input};
use super::running::{Running, Said, Tasks, Watchdog};
use super::steered::OneMoreError;
use crate::config::{environment, EnvError, Handoff, OwnCgroup};
use crate::core::{Event, GenerationId, Source};
use crate::handoff::channel::Channel;
use crate::process::group::MARKER_VAR;
use crate::process::identity::{Identity, IdentityError};
use crate::process::program::{Program, ProgramError};
use crate::process::spawn::{spawn, Launch};
use crate::proto::handoff::SOCKET_VAR;
use crate::proto::{compat, listen_fds, placeholder};
use crate::ready::notify::NotifySocket;

/// What a generation runs, as it was resolved once. A rollback, a restart and a recovery run it again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Recipe {
    /// The executable, held open.
    pub program: Arc<Program>,
    /// Arguments, the program's name first, with placeholders.
    pub args: Vec<OsString>,
    /// Environment, with placeholders, without what zddsup adds.
    #[serde(with = "crate::state::with::pairs")]
    pub env: BTreeMap<OsString, OsString>,
    /// Working directory.
    #[serde(with = "crate::state::with::path")]
    pub directory: PathBuf,
}

/// Why a generation cannot be spawned, before anything is forked.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The environment cannot be made.
    #[error(transparent)]
    Environment(#[from] EnvError),
    /// The program cannot be found.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The user or group is unknown.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A placeholder names no listener.
    #[error(transparent)]
    Placeholder(#[from] placeholder::PlaceholderError),
    /// It cannot have sockets of its own.
    #[error(transparent)]
    Socket(#[from] OneMoreError),
    /// It was to have a cgroup.
    #[error("cannot make its cgroup: {0}; --cgroup auto does without")]
    Cgroup(#[source] std::io::Error),
    /// A socket or pipe for it cannot be made.
    #[error("cannot make its {what}: {source}; is the limit of open files reached?")]
    Fd {
        /// What was to be made.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}

/// A listener as a generation has it.
struct Numbered {
    name: String,
    address: String,
    fd: i32,
}

/// Fds that a generation gets, in order from 3, and what names them.
struct Handed {
    fds: Vec<Arc<OwnedFd>>,
    listeners: Vec<Numbered>,
    names: Vec<String>,
    channel: Option<(Channel, i32)>,
}

impl Driver {
    /// Performs `Action::Spawn`.
    pub(super) fn spawn(&mut self, id: GenerationId, source: Source) {
        let mut running = Running {
            id,
            source,
            program: None,
            marker: format!("{:032x}", fastrand::u128(..)),
            uid: geteuid(),
            since: Instant::now(),
            executed: None,
            main: None,
            cgroup: None,
            group: None,
            notify: None,
            notifier: None,
            listens: 0,
            has_listened: false,
            probed: false,
            drained: None,
            seen: None,
            channel: None,
            capture: None,
            told_to_drain: None,
            said: Said::default(),
            ready: false,
            connections: None,
            why_not: None,
            spawn_error: None,
            end: None,
            flags_before: self.flags(),
            watchdog: Watchdog { every: self.config.watchdog, due: None },
            tasks: Tasks::default(),
        };
        match self.launch(source, &mut running) {
            Ok(launch) => {
                let reaper = self.reaper.clone();
                let inbox = self.inbox.clone();
                // Not one of the generation's tasks: whatever becomes of it, a process that was forked is reported.
                tokio::spawn(async move {
                    let result = spawn(launch, &reaper).await;
                    let _loop_is_gone = inbox.send(Input::Spawned(id, result));
                });
            }
            Err(error) => {
                running.spawn_error = Some(error.to_string());
                self.happened(Event::SpawnFailed(id));
            }
        }
        self.running.insert(id, running);
        self.news_of(id);
    }

    fn launch(&mut self, source: Source, running: &mut Running) -> Result<Launch, LaunchError> {
        let id = running.id;
        let (recipe, recorded) = match source {
            Source::Recorded(program) if self.recipes.contains_key(&program) => (self.recipes[&program].clone(), true),
            Source::Recorded(_) | Source::Fresh => {
                let recipe = self.resolve()?;
                self.recipes.insert(id, recipe.clone());
                (recipe, false)
            }
        };
        running.program = Some(Arc::clone(&recipe.program));
        if recorded {
            compute_digest(&recipe.program);
        }
        let identity = match (&self.config.user, &self.config.group) {
            (None, None) => None,
            (user, group) => Some(Identity::resolve(user.as_deref(), group.as_deref())?),
        };
        running.uid = identity.as_ref().map_or(running.uid, |identity| identity.uid);
        let mut handed = self.hand_off(id)?;
        let notify = NotifySocket::new().map_err(|source| LaunchError::Fd { what: "notify socket", source })?;
        let (capture, stderr) =
            self.output.capture().map_err(|source| LaunchError::Fd { what: "pipe for stderr", source })?;
        let env = self.environment(running, &recipe, &handed, identity.as_ref(), &notify)?;
        let cgroup = self.own_cgroup(running)?;
        let expanded: Result<Vec<_>, _> = recipe.args.iter().map(|arg| handed.expand(arg, id)).collect();
        running.capture = Some(capture);
        running.channel = handed.channel.take().map(|(channel, _)| channel);
        running.notify = Some(Arc::new(notify));
        Ok(Launch {
            program: Arc::clone(&recipe.program),
            recorded,
            args: expanded?,
            env,
            cgroup,
            directory: recipe.directory,
            listen_pid: !handed.names.is_empty(),
            fds: handed.fds,
            stdout: None,
            stderr: Some(stderr),
            identity,
            umask: self.config.umask,
            limits: self.nofile.into_iter().chain(self.config.limits.iter().copied()).collect(),
            nice: self.config.nice,
            oom_score_adj: self.config.oom_score_adj,
            trap: self.adopts() && !self.cannot_trap,
        })
    }

    /// Makes its cgroup, where there are any, and gives its entrance.
    fn own_cgroup(&self, running: &mut Running) -> Result<Option<OwnedFd>, LaunchError> {
        let Some(delegated) = &self.cgroups else { return Ok(None) };
        let made = delegated.make(running.id).and_then(|cgroup| Ok((cgroup.entrance()?, cgroup)));
        match made {
            Ok((entrance, cgroup)) => {
                running.cgroup = Some(cgroup);
                Ok(Some(entrance))
            }
            Err(error) if self.config.cgroup == OwnCgroup::Require => Err(LaunchError::Cgroup(error)),
            Err(error) => {
                tracing::warn!(generation = %running.id, "cannot make its cgroup: {error}; it goes without");
                Ok(None)
            }
        }
    }

    /// Everything about the program, anew: environment files, PATH, symlinks, working directory.
    fn resolve(&self) -> Result<Recipe, LaunchError> {
        let env = environment::for_generation(&self.config)?;
        let directory = match &self.config.chdir {
            Some(directory) => self.start_directory.join(directory),
            None => self.start_directory.clone(),
        };
        let path = env.get(OsStr::new("PATH")).map(OsString::as_os_str);
        let program = Program::resolve(&self.config.command[0], path, &directory)?;
        // An upgrade of the configuration alone: one open file for both, and one digest.
        let held = self.recipes.values().map(|recipe| &recipe.program).find(|held| held.is_same(&program));
        let program = held.map_or_else(|| Arc::new(program), Arc::clone);
        if held.is_none() {
            compute_digest(&program);
        }
        Ok(Recipe { program, args: self.config.command.clone(), env, directory })
    }

    /// Which fds it gets: listeners, then what was stored, then the handoff socket.
    fn hand_off(&mut self, id: GenerationId) -> Result<Handed, LaunchError> {
        let by_number = matches!(self.config.handoff, Handoff::Auto | Handoff::Fds | Handoff::Adopt);
        let by_socket = matches!(self.config.handoff, Handoff::Auto | Handoff::Socket);
        let mut handed = Handed { fds: Vec::new(), listeners: Vec::new(), names: Vec::new(), channel: None };
        // Who binds for itself has its own in the place of those that are steered.
        let adopts = self.adopts();
        let places = (0..self.listeners.len()).filter(|&place| !adopts || !self.listeners[place].is_steered());
        let mut own = Vec::new();
        for place in places.collect::<Vec<_>>() {
            own.push((place, self.own_socket(id, place)?));
        }
        let sockets: Vec<_> = own.into_iter().map(|(place, fd)| (&self.listeners[place], fd)).collect();
        let stored = self.store.for_next();
        let kept = || stored.iter().map(|stored| (stored.name.clone(), Arc::clone(&stored.fd)));
        if by_number {
            for (listener, fd) in &sockets {
                let name = listener.name().to_owned();
                handed.listeners.push(Numbered {
                    name: name.clone(),
                    address: listener.address(),
                    fd: handed.next_number(),
                });
                handed.place(name, Arc::clone(fd));
            }
            for (name, fd) in kept() {
                handed.place(name, fd);
            }
        }
        if by_socket {
            let sockets = sockets.iter().map(|(listener, fd)| (listener.name().to_owned(), Arc::clone(fd)));
            let named: Vec<_> = sockets.chain(kept()).collect();
            let inbox = self.inbox.clone();
            let heard = move |incoming| drop(inbox.send(Input::Heard(id, incoming)));
            let (channel, end) = Channel::pair(&self.config.name, id.0, &named, self.kept.most_fds(), heard)
                .map_err(|source| LaunchError::Fd { what: "handoff socket", source })?;
            let number = handed.next_number();
            handed.fds.push(Arc::new(end));
            handed.channel = Some((channel, number));
        }
        Ok(handed)
    }

    fn environment(
        &self,
        running: &Running,
        recipe: &Recipe,
        handed: &Handed,
        identity: Option<&Identity>,
        notify: &NotifySocket,
    ) -> Result<Vec<(OsString, OsString)>, LaunchError> {
        let mut env = BTreeMap::new();
        for (name, value) in &recipe.env {
            env.insert(name.clone(), handed.expand(value, running.id)?);
        }
        for (name, value) in identity.into_iter().flat_map(Identity::environment) {
            env.entry(name.into()).or_insert(value);
        }
        let mut own = vec![
            (MARKER_VAR.to_owned(), running.marker.clone()),
            ("ZDDSUP_SERVICE".to_owned(), self.config.name.clone()),
            ("ZDDSUP_GENERATION".to_owned(), running.id.to_string()),
            ("NOTIFY_SOCKET".to_owned(), notify.address()),
        ];
        if let Some(every) = self.config.watchdog {
            own.push(("WATCHDOG_USEC".to_owned(), every.as_micros().to_string()));
        }
        if let Some((_, number)) = &handed.channel {
            own.push((SOCKET_VAR.to_owned(), number.to_string()));
        }
        if !handed.names.is_empty() {
            own.extend(listen_fds::encode(&handed.names).map(|(name, value)| (name.to_owned(), value)));
        }
        let listeners: Vec<_> = handed.listeners.iter().map(Numbered::for_others).collect();
        if self.config.compat.start_server && !listeners.is_empty() {
            own.extend(compat::start_server(&listeners, running.id.0));
        }
        if self.config.compat.einhorn && !listeners.is_empty() {
            own.extend(compat::einhorn(&listeners));
        }
        env.extend(own.into_iter().map(|(name, value)| (name.into(), value.into())));
        Ok(env.into_iter().collect())
    }

    /// Takes what it says on its notify socket, from now on that its processes are known: until then it waits there.
    pub(super) fn listen_to(&mut self, id: GenerationId) {
        let Some(running) = self.running.get_mut(&id) else { return };
        let Some(notify) = running.notify.clone() else { return };
        let inbox = self.inbox.clone();
        let task = tokio::spawn(async move {
            while let Ok(datagram) = notify.recv().await {
                if inbox.send(Input::Notified(id, datagram)).is_err() {
                    break;
                }
                // One that floods its socket must not outrun the loop.
                tokio::task::yield_now().await;
            }
        });
        running.tasks.add(&task);
    }
}

impl Numbered {
    fn for_others(&self) -> compat::Handed<'_> {
        compat::Handed { address: &self.address, fd: self.fd }
    }
}

impl Handed {
    fn next_number(&self) -> i32 {
        3 + i32::try_from(self.fds.len()).unwrap_or(i32::MAX - 3)
    }

    fn place(&mut self, name: String, fd: Arc<OwnedFd>) {
        self.fds.push(fd);
        self.names.push(name);
    }

    fn expand(&self, text: &OsStr, id: GenerationId) -> Result<OsString, placeholder::PlaceholderError> {
        let numbers: Vec<_> = self.listeners.iter().map(|listener| (listener.name.as_str(), listener.fd)).collect();
        placeholder::expand(text, &numbers, id.0)
    }
}

/// How often the sweep and the count look again, where nothing reports the change.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(500);

impl Driver {
    /// Computes those that are not known.
    pub(super) fn digest_programs(&self) {
        self.recipes.values().for_each(|recipe| compute_digest(&recipe.program));
    }
}

/// The digest is for people: computed beside, when nothing waits for it.
fn compute_digest(program: &Arc<Program>) {
    if program.sha256().is_none() {
        let program = Arc::clone(program);
        tokio::task::spawn_blocking(move || program.digest());
    }
}
