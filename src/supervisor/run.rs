//! From a configuration to the end of the service.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use nix::sys::signal::Signal;
use tokio::sync::{broadcast, mpsc};

use super::above::Barrier;
use super::adopting::Adopted;
use super::answering::Answering;
use super::canary::Canaries;
use super::counting::Counting;
use super::driver::{Driver, Input};
use super::ending::describe;
use super::instance::{Lock, LockError, PidFile};
use super::replacing;
use super::replacing::start::{Left, LeftError};
use super::replacing::state::State;
use super::reports::Reports;
use super::signals::{Signals, Wish};
use super::store::{Keeping, Store};
use super::stored_above::StoredAbove;
use super::takeover::Orphans;
use super::upward::Upward;
use crate::config::ready::{Probe, Scheme};
use crate::config::{environment, start_directory, ConfigError, EnvError, OwnCgroup, Ready, ServiceConfig, Switch};
use crate::control::server::{self, Server};
use crate::control::types as control;
use crate::control::{place, types::Handle};
use crate::core::{Answer, Finish, Machine, Refusal, Request};
use crate::listener::inherit::Inherited;
use crate::listener::{self, BindError, Listener};
use crate::process::cgroup::{Delegated, NoCgroup};
use crate::process::identity::{Identity, IdentityError};
use crate::process::limits;
use crate::process::output::Output;
use crate::process::reaper::Reaper;
use crate::process::table;
use crate::ready::tls::{Tls, TlsError};

/// News that a slow follower may be behind before some are left out.
const EVENTS_HELD: usize = 256;

/// Generations may keep fds for each other up to this part of what zddsup may have open: it needs some for itself.
const KEPT_SHARE: usize = 4;

/// Why a supervisor cannot begin. Nothing was spawned.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The name is taken.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The runtime directory cannot be had.
    #[error(transparent)]
    Place(#[from] place::PlaceError),
    /// A listener cannot be had.
    #[error(transparent)]
    Listener(#[from] BindError),
    /// What systemd passed does not fit the configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The environment cannot be made.
    #[error(transparent)]
    Environment(#[from] EnvError),
    /// The user or group is unknown.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Generations were to have cgroups.
    #[error(transparent)]
    Cgroup(#[from] NoCgroup),
    /// TLS of probes.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Another program's state is none of this service.
    #[error(transparent)]
    Left(#[from] LeftError),
    /// The control socket cannot be had.
    #[error(transparent)]
    Control(#[from] server::BindError),
    /// The pid file cannot be written.
    #[error("cannot write the pid file {path:?}: {source}")]
    PidFile {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// There is no `/proc`, or another PID namespace's.
    #[error("cannot use /proc: {0}; zddsup needs that of its own PID namespace: `mount -t proc proc /proc`")]
    Proc(io::Error),
    /// The kernel refuses something that every supervisor needs.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

impl StartError {
    /// Whether the configuration is to blame.
    #[must_use]
    pub fn is_invalid(&self) -> bool {
        matches!(
            self,
            StartError::Config(_) | StartError::Environment(_) | StartError::Identity(_) | StartError::Tls(_)
        )
    }
}

/// What is had before the first spawn.
struct Held {
    listeners: Vec<Listener>,
    tls: Option<Tls>,
    cgroups: Option<Delegated>,
    nofile: Option<limits::Limit>,
    reaper: Reaper,
    output: Output,
    state_file: PathBuf,
    stored_above: StoredAbove,
}

/// How a service ended.
#[derive(Debug)]
pub struct Ended {
    /// Why.
    pub finish: Finish,
    /// In words, where something failed.
    pub reason: Option<String>,
}

impl Ended {
    /// For people.
    #[must_use]
    pub fn in_words(&self) -> String {
        let reason = self.reason.as_deref().unwrap_or("the log says why");
        match self.finish {
            Finish::Stopped => "stopped".to_owned(),
            Finish::StartFailed(_) => format!("the first version never became ready: {reason}"),
            Finish::RestartLimit => format!("lost too often, restart limit reached: {reason}"),
            Finish::ServiceEnded(end) => format!("{} and is not started again (--restart)", describe(end)),
        }
    }
}

/// Supervises a service to its end. `signals::block` was called before any thread was made.
///
/// # Errors
/// When it cannot begin; nothing was spawned then.
pub fn run(
    config: ServiceConfig,
    inherited: Inherited,
    left: Option<Left>,
    output: Output,
) -> Result<Ended, StartError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| StartError::System { what: "start the event loop", source })?;
    runtime.block_on(supervise(config, inherited, left, output))
}

async fn supervise(
    config: ServiceConfig,
    mut inherited: Inherited,
    left: Option<Left>,
    output: Output,
) -> Result<Ended, StartError> {
    let system = |what| move |source| StartError::System { what, source };
    let mut state = left.map(|left| left.read(&config)).transpose()?;
    let gone_on = state.as_mut().map(State::begin).transpose().map_err(system("take over open files"))?;
    if gone_on.is_none() {
        // Both are looked up anew for each generation; what is wrong from the start is refused before anything is bound.
        environment::for_generation(&config)?;
        Identity::resolve(config.user.as_deref(), config.group.as_deref())?;
    }
    let tls = tls(&config)?;
    table::check_own_proc().map_err(StartError::Proc)?;
    let reaper = Reaper::new();
    reaper.become_subreaper().map_err(system("become the reaper of orphans"))?;
    let signals = Signals::new().map_err(system("listen to signals"))?;

    let directory = place::runtime_dir()?;
    let name = config.name.clone();
    let file = |ending| directory.join(format!("{name}.{ending}"));
    let (mut stored_above, returned) = StoredAbove::from_environment(inherited.take_stored());
    let mut orphans = Orphans::default();
    let (lock, nofile, listeners, server);
    if let Some(begin) = gone_on {
        lock = Lock::resume(begin.lock).map_err(system("keep the lock"))?;
        nofile = begin.nofile;
        listeners = listener::open_from(begin.passed, &config.listeners, begin.bound)?;
        server = Server::resume(begin.control, begin.control_path)?;
    } else {
        nofile = limits::raise_nofile().map_err(system("raise the limit of open files"))?;
        lock = Lock::take(&file("lock"), &config.name)?;
        orphans = Orphans::find(&file("state"), returned);
        stored_above.let_go(&orphans.close_unasked(&config.listeners));
        listeners = listener::open_from(inherited, &config.listeners, orphans.sockets())?;
        config.check_listeners(&listeners)?;
        server = Server::bind(config.control.as_deref().unwrap_or(&file("sock")))?;
    }
    // What was there before is no reason to end a service that runs.
    let (cgroups, _pid_file) = if state.is_some() {
        (or_log(cgroups(&config)).flatten(), config.pid_file.as_deref().and_then(|path| or_log(write_pid_file(path))))
    } else {
        (cgroups(&config)?, config.pid_file.as_deref().map(write_pid_file).transpose()?)
    };

    let (commands, mut asked) = mpsc::channel(64);
    let (inbox, mut inputs) = mpsc::unbounded_channel();
    let (events, _) = broadcast::channel(EVENTS_HELD);
    let mut answering = Answering::new(server, Handle { commands, events: events.clone() });
    let held = Held { listeners, tls, cgroups, nofile, reaper, output, state_file: file("state"), stored_above };
    let mut driver = Driver::new(config, held, inbox, events);
    match state {
        Some(state) => driver.go_on(state),
        None => driver.begin(orphans),
    }

    let finish = loop {
        driver.settle();
        if let Some(finish) = driver.finished() {
            break finish;
        }
        if driver.is_to_be_replaced() {
            answering.let_go();
            match answering.resting() {
                Some(server) => driver.replace_itself(&mut inputs, &lock, server).await,
                None => driver.give_up_in_time(),
            }
            if !driver.is_to_be_replaced() {
                // Nothing came of it.
                continue;
            }
        } else {
            answering.begin();
        }
        tokio::select! {
            wish = signals.next() => driver.wish(wish.map_err(system("read a signal"))?),
            Some(request) = asked.recv() => driver.answer(request),
            Some(input) = inputs.recv() => driver.take(input),
            () = answering.rests() => {}
            () = until(driver.due()) => driver.tick(),
        }
    };
    let (ended, heard) = driver.end(finish);
    answering.leave().await;
    if let Some(heard) = heard {
        if let Err(error) = heard.passed().await {
            tracing::debug!("the supervisor above has not heard the last words: {error}");
        }
    }
    Ok(ended)
}

/// For a probe by `https://`. The file of authorities is read once.
pub fn tls(config: &ServiceConfig) -> Result<Option<Tls>, TlsError> {
    let Ready::Probe(Probe::Http(url)) = &config.ready else { return Ok(None) };
    match url.scheme {
        Scheme::Plain => Ok(None),
        Scheme::Verified => Tls::verified(config.ready_ca.as_deref()).map(Some),
        Scheme::Insecure => Tls::insecure().map(Some),
    }
}

/// Where generations have cgroups of their own. The name is ours by now: nobody else's are tidied up.
fn cgroups(config: &ServiceConfig) -> Result<Option<Delegated>, NoCgroup> {
    if config.cgroup == OwnCgroup::Off {
        return Ok(None);
    }
    match Delegated::find(&config.name, config.cgroup == OwnCgroup::Auto) {
        Ok(delegated) => {
            tracing::info!("each generation has a cgroup of its own in {}", delegated.directory().display());
            delegated.tidy();
            Ok(Some(delegated))
        }
        Err(reason) if config.cgroup == OwnCgroup::Require => Err(reason),
        Err(reason @ NoCgroup::Unusable { .. }) => {
            tracing::info!("generations are process groups, though zddsup's cgroup is delegated: {reason}");
            Ok(None)
        }
        Err(reason) => {
            tracing::debug!("generations are process groups: {reason}");
            Ok(None)
        }
    }
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

/// How many fds generations may keep for each other.
pub(super) fn most_kept() -> usize {
    limits::own_nofile() / KEPT_SHARE
}

fn or_log<T, E: std::fmt::Display>(result: Result<T, E>) -> Option<T> {
    result.inspect_err(|error| tracing::error!("{error}")).ok()
}

fn write_pid_file(path: &Path) -> Result<PidFile, StartError> {
    PidFile::write(path).map_err(|source| StartError::PidFile { path: path.to_owned(), source })
}

impl Driver {
    fn new(
        config: ServiceConfig,
        held: Held,
        inbox: mpsc::UnboundedSender<Input>,
        events: broadcast::Sender<control::Event>,
    ) -> Self {
        let Held { listeners, tls, cgroups, nofile, reaper, output, state_file, stored_above } = held;
        let machine = Machine::new(config.policy(fastrand::u64(..)));
        Driver {
            store: Store::new(config.fdstore_max),
            config,
            machine,
            happenings: VecDeque::new(),
            listeners,
            running: BTreeMap::new(),
            retired: VecDeque::new(),
            recipes: BTreeMap::new(),
            kept: Keeping::new(most_kept()),
            reports: Reports::default(),
            restarts: 0,
            replacements: 0,
            replacement: None,
            own_name: replacing::program::own_name(),
            inbox,
            events,
            reaper,
            output,
            cgroups,
            nofile,
            epoch: Instant::now(),
            started: SystemTime::now(),
            start_directory: start_directory(),
            state_file,
            upward: Upward::from_environment(Instant::now()),
            stored_above,
            counting: Counting::default(),
            adopted: Adopted::default(),
            departed: BTreeSet::new(),
            tls,
            canaries: Canaries::default(),
            cannot_trap: false,
            sweep_due: None,
            speaks: false,
            told: None,
            finish: None,
            last_failure: None,
        }
    }

    /// The first generation; or, where a killed supervisor left one that serves, an upgrade of that.
    fn begin(&mut self, orphans: Orphans) {
        for listener in &self.listeners {
            tracing::info!(listener = listener.name(), "listens on {}", listener.address());
            if self.config.switch == Switch::Steered && !listener.is_steered() {
                tracing::info!(listener = listener.name(), "is shared by all generations: only TCP is steered");
            }
        }
        let taken_over = self.take_over(orphans);
        self.hold_declared();
        self.record();
        if taken_over {
            let request = self.usual_upgrade().unwrap_or(Request::Upgrade);
            self.machine.request(request, self.now());
        } else {
            self.machine.start(self.now());
        }
    }

    /// Goes on where another program was.
    fn go_on(&mut self, state: State) {
        self.put_together(state);
        self.replacements += 1;
        self.wake();
        // Signs of life that came meanwhile were not read yet.
        let now = Instant::now();
        self.running.values_mut().for_each(|running| running.watchdog.fed_if_due(now));
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            "goes on in the place of another zddsup: {}",
            self.one_line()
        );
        self.record();
    }

    /// A signal came.
    fn wish(&mut self, wish: Wish) {
        let request = match wish {
            Wish::Upgrade => match self.usual_upgrade() {
                Ok(request) => request,
                Err(refusal) => return tracing::warn!("refused: {}; {}", refusal.reason, refusal.remedy),
            },
            Wish::Stop => Request::Stop,
            Wish::Quit => Request::Quit,
            Wish::PrintStatus => return tracing::info!("{}", self.one_line()),
            Wish::Reap => {
                self.reaper.reap();
                return self.sweep();
            }
            Wish::SelfUpgrade => return self.replace_program(None),
            Wish::Forward(signal) => return self.forward(signal),
        };
        match self.ask(request) {
            Answer::Accepted(id) => tracing::info!(upgrade = %id, "asked for by a signal"),
            Answer::Stopping => {}
            Answer::Refused(refusal) => {
                let refusal = in_words(refusal);
                tracing::warn!("refused: {}; {}", refusal.reason, refusal.remedy);
            }
        }
    }

    /// A command came by the control socket.
    fn answer(&mut self, request: control::Request) {
        let asked = match request.command {
            control::Command::Status => return self.reply_with_status(request.reply),
            control::Command::SelfUpgrade => return self.replace_program(Some(request.reply)),
            control::Command::Upgrade => self.usual_upgrade(),
            // The server refused those that cannot be meant.
            control::Command::Canary(flags) => self.upgrade_by(flags.plan().unwrap_or_default()),
            control::Command::Promote => Ok(Request::Promote),
            control::Command::Abort => Ok(Request::Abort),
            control::Command::Rollback => Ok(Request::Rollback),
            control::Command::Restart => Ok(Request::Restart),
            control::Command::Stop { quick: false } => Ok(Request::Stop),
            control::Command::Stop { quick: true } => Ok(Request::Quit),
        };
        let reply = match asked.map(|asked| self.ask(asked)) {
            Err(refusal) => control::Reply::Refused(refusal),
            Ok(answer) => match answer {
                Answer::Accepted(id) => control::Reply::Accepted { upgrade: id.0 },
                Answer::Stopping => control::Reply::Stopping,
                Answer::Refused(refusal) => control::Reply::Refused(in_words(refusal)),
            },
        };
        let _gone = request.reply.send(reply);
    }

    /// Passes a signal on to the incumbent's main process.
    fn forward(&self, signal: Signal) {
        let main = self.machine.serving().and_then(|id| self.running.get(&id)?.main.as_ref());
        if let Some(main) = main {
            let _gone_already = main.pidfd.signal(signal);
        }
    }

    /// Everything is gone: closes the listeners. Where systemd has them too, nobody is refused if this is a restart, and what
    /// belongs to them stays where it is. (If it is none, the next start removes it.) The barrier is for what was said upwards.
    fn end(mut self, finish: Finish) -> (Ended, Option<Barrier>) {
        self.tell_of_unserved();
        if self.stored_above.is_on() {
            self.record();
            self.listeners.iter().for_each(Listener::leave_file);
        } else {
            let _never_written = std::fs::remove_file(&self.state_file);
            self.adopted.locals.remove_all();
        }
        drop(self.listeners);
        let ended = Ended { finish, reason: self.last_failure };
        let heard = self.upward.ended(&ended.in_words());
        (ended, heard)
    }
}

fn in_words(refusal: Refusal) -> control::Refusal {
    let (reason, remedy) = match refusal {
        Refusal::Stopping => ("the supervisor is stopping", "start it again"),
        Refusal::NothingBefore => {
            ("no version served before the one that serves now", "put the former program in place and upgrade")
        }
        Refusal::NoCanary => (
            "no generation is ready and gets a share of new connections",
            "begin a canary with `zddsup upgrade --canary 5%`; see `zddsup status`",
        ),
        Refusal::NothingToAbort => (
            "no generation is there that was not switched to yet",
            "`zddsup rollback` goes back to the version before; see `zddsup status`",
        ),
        Refusal::NothingServed => ("no version has been ready yet", "wait for the first one, or upgrade"),
    };
    control::Refusal { reason: reason.to_owned(), remedy: remedy.to_owned() }
}
