//! The one place where children are reaped: those that were spawned, and orphans that zddsup is made the parent of.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::unistd::Pid;
use tokio::sync::oneshot;

use crate::core::End;
use crate::sys::wait::{self, Status};

/// Reaps all children, and tells whoever watches one how it ended. A clone is the same reaper.
#[derive(Debug, Clone, Default)]
pub struct Reaper {
    watched: Arc<Mutex<HashMap<Pid, Vec<oneshot::Sender<End>>>>>,
}

impl Reaper {
    /// One that watches nobody yet.
    #[must_use]
    pub fn new() -> Self {
        Reaper::default()
    }

    /// Makes zddsup the parent of its descendants' orphans, so that a daemon's end is seen and no zombie is left
    /// (`PR_SET_CHILD_SUBREAPER` in prctl(2)), and makes the kernel keep the ends of children at all.
    pub fn become_subreaper(&self) -> io::Result<()> {
        wait::keep_ends()?;
        Ok(nix::sys::prctl::set_child_subreaper(true)?)
    }

    /// The end of a child that was not reaped yet. One that never becomes a child of ours never ends here.
    #[must_use]
    pub fn watch(&self, pid: Pid) -> oneshot::Receiver<End> {
        let (sender, receiver) = oneshot::channel();
        let mut watched = self.watched();
        // Those that nobody waits for any more: their processes may be none of ours.
        watched.retain(|_, senders| {
            senders.retain(|sender| !sender.is_closed());
            !senders.is_empty()
        });
        watched.entry(pid).or_default().push(sender);
        receiver
    }

    /// Reaps every child that has ended. To be called on SIGCHLD.
    pub fn reap(&self) {
        loop {
            match wait::reap_any() {
                Ok(Some(reaped)) => {
                    let end = match reaped.status {
                        Status::Exited(code) => End::Exited(code),
                        Status::Killed { signal, core } => End::Killed { signal, core },
                    };
                    let watchers = self.watched().remove(&reaped.pid).unwrap_or_default();
                    tracing::trace!(pid = reaped.pid.as_raw(), ?end, watched = !watchers.is_empty(), "reaped");
                    for watcher in watchers {
                        let _nobody_waits = watcher.send(end);
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::error!("cannot reap children: {error}");
                    break;
                }
            }
        }
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<Pid, Vec<oneshot::Sender<End>>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
