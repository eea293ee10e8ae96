//! Another program in the supervisor's place: `zddsup self-upgrade`, SIGUSR2.
//!
//! ```text
//!  asked for    the program is looked up anew, and executed as a child that reads the state and says whether it can go on
//!               with it; if not, that is the answer, and nothing was changed
//!  agreed       the control socket is let go: whoever connects waits, whoever follows is told to come again
//!  at rest      no spawn, count or end is under way, every message that was read is acted on
//!  execve(2)    pid, children, open files and blocked signals stay; the state goes in a memfd
//! ```
//!
//! What is not read yet stays where it is: in sockets, pipes, the kernel's queues; the ends of children in their zombies;
//! calls that are caught wait. If execve(2) fails after all, this one goes on with the same state.
//!
//! | file | what it holds |
//! |---|---|
//! | [`state`] | what travels; a driver taken apart, and put together |
//! | [`program`] | the other program: found, tried, executed |
//! | [`start`] | the other program's side: a trial, and the start in another one's place |

pub mod program;
pub mod start;
pub mod state;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use self::program::ReplaceError;
use self::state::Instance;
use super::driver::{Driver, Input};
use super::instance::Lock;
use super::running::{Running, Tasks};
use crate::control::server::Server;
use crate::control::types as control;
use crate::process::output::LAST_LINES;
use crate::process::program::Program;
use crate::sys::socket::is_readable;

/// The state, as the number of its fd.
pub const STATE_VAR: &str = "ZDDSUP_STATE";
/// Set where the state at stdin is only to be tried.
pub const TRIAL_VAR: &str = "ZDDSUP_TRIAL";
/// What one says then that can go on with it.
pub const TRIAL_PASSED: &str = "zddsup can go on with this service";

const COPIES: &str = "take copies of open files";

/// How long it is waited for a moment at which nothing is under way.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// How far a replacement is.
#[derive(Debug)]
pub enum Replacement {
    /// The other program is tried.
    Trying {
        /// Who waits for the answer.
        reply: Option<oneshot::Sender<control::Reply>>,
        /// Which.
        program: Arc<Program>,
    },
    /// It can go on, and does as soon as nothing is under way.
    Agreed {
        /// Which.
        program: Arc<Program>,
        /// When it is given up.
        until: Instant,
    },
}

impl Driver {
    /// Somebody wants another program in this one's place.
    pub(super) fn replace_program(&mut self, reply: Option<oneshot::Sender<control::Reply>>) {
        if self.replacement.is_some() {
            return refuse(reply, "the program is being replaced already".to_owned(), "wait until it is");
        }
        let tried = program::find(&self.own_name).map_err(ReplaceError::from).and_then(|program| {
            // Taken apart and put together again: nothing has happened in between.
            let instance = Instance::placeholder().map_err(failed(COPIES))?;
            let state = self.take_apart(instance).map_err(failed(COPIES))?;
            let written = crate::state::write(&state);
            self.put_together(state);
            Ok((Arc::new(program), written?.0))
        });
        match tried {
            Err(error) => refuse(reply, error.to_string(), "see the log; this one goes on"),
            Ok((program, state)) => {
                tracing::info!(program = %program.found().display(), "is tried: it is to take this one's place");
                let (inbox, reaper, other) = (self.inbox.clone(), self.reaper.clone(), Arc::clone(&program));
                tokio::spawn(async move {
                    let _loop_is_gone = inbox.send(Input::Tried(program::tried(&other, &state, reaper).await));
                });
                self.replacement = Some(Replacement::Trying { reply, program });
            }
        }
    }

    /// The other program was tried.
    pub(super) fn tried(&mut self, result: Result<(), ReplaceError>) {
        let Some(Replacement::Trying { reply, program }) = self.replacement.take() else { return };
        match result {
            Ok(()) => {
                self.replacement = Some(Replacement::Agreed { program, until: Instant::now() + LONGEST_WAIT });
                if let Some(reply) = reply {
                    let _gone = reply.send(control::Reply::Replacing);
                }
                let _nobody_listens = self.events.send(control::Event::Replacing);
            }
            Err(error) => refuse(reply, error.to_string(), "put a zddsup in place that can; this one goes on"),
        }
    }

    /// Whether the control socket is to be let go.
    pub(super) fn is_to_be_replaced(&self) -> bool {
        matches!(self.replacement, Some(Replacement::Agreed { .. }))
    }

    /// When waiting for rest is given up.
    pub(super) fn replacement_due(&self) -> Option<Instant> {
        match self.replacement {
            Some(Replacement::Agreed { until, .. }) => Some(until),
            Some(Replacement::Trying { .. }) | None => None,
        }
    }

    /// Gives it up if its time is over and nothing came of it.
    pub(super) fn give_up_in_time(&mut self) {
        if self.replacement_due().is_some_and(|due| due <= Instant::now()) {
            self.give_up(&ReplaceError::Busy);
        }
    }

    /// Whether nothing is under way of which the other program could not know.
    fn is_at_rest(&self) -> bool {
        let spawns = |running: &Running| running.main.is_none() && running.end.is_none();
        // Its end is about to be reported.
        let has_ended =
            |running: &Running| running.main.as_ref().is_some_and(|main| is_readable(&main.pidfd).unwrap_or(false));
        !self.counting.is_under_way() && !self.running.values().any(|running| spawns(running) || has_ended(running))
    }

    /// Executes the other program, if nothing is under way. Comes back where that is not the case, or it fails.
    pub(super) async fn replace_itself(
        &mut self,
        inputs: &mut mpsc::UnboundedReceiver<Input>,
        lock: &Lock,
        server: &Server,
    ) {
        if !self.is_at_rest() && self.replacement_due().is_some_and(|due| due > Instant::now()) {
            return;
        }
        // A probe's child ends with its task; whatever else reads begins again where it was.
        self.running.values_mut().for_each(|running| running.tasks = Tasks::default());
        self.end_checks();
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        while let Ok(input) = inputs.try_recv() {
            self.take(input);
            self.settle();
        }
        if self.finished().is_some() {
            return;
        }
        if !self.is_at_rest() {
            if self.replacement_due().is_none_or(|due| due <= Instant::now()) {
                self.give_up(&ReplaceError::Busy);
            }
            return self.wake();
        }
        let Some(Replacement::Agreed { program, .. }) = self.replacement.take() else { return };
        let Err(error) = self.execute(&program, lock, server);
        self.give_up(&error);
        self.wake();
    }

    fn execute(&mut self, program: &Program, lock: &Lock, server: &Server) -> Result<Infallible, ReplaceError> {
        if !program.is_untouched() {
            // Not what was tried.
            let program = program.found().display().to_string();
            return Err(ReplaceError::Refused { program, why: "it was changed meanwhile".to_owned() });
        }
        let instance = Instance::new(lock, server, self.nofile).map_err(failed(COPIES))?;
        let state = self.take_apart(instance).map_err(failed(COPIES))?;
        let executed = crate::state::write(&state).map_err(ReplaceError::from).and_then(|(document, kept)| {
            tracing::info!(program = %program.found().display(), "takes this one's place");
            self.output.flush(LAST_LINES);
            program::execute(program, &document, &kept)
        });
        self.put_together(state);
        executed
    }

    fn give_up(&mut self, error: &ReplaceError) {
        self.replacement = None;
        tracing::error!("the program is not replaced: {error}; this one goes on");
    }
}

fn failed(what: &'static str) -> impl Fn(std::io::Error) -> ReplaceError {
    move |source| ReplaceError::System { what, source }
}

fn refuse(reply: Option<oneshot::Sender<control::Reply>>, reason: String, remedy: &str) {
    tracing::error!("the program is not replaced: {reason}; {remedy}");
    if let Some(reply) = reply {
        let _gone = reply.send(control::Reply::Refused(control::Refusal { reason, remedy: remedy.to_owned() }));
    }
}
