//! The control server beside the loop: while it answers, and while another program is about to go on with its socket.

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::control::server::{End, Server};
use crate::control::types::Handle;

/// A control server that answers, or rests.
pub struct Answering {
    handle: Handle,
    at_work: Option<AtWork>,
    resting: Option<Server>,
}

struct AtWork {
    /// Dropped, it leaves.
    end: Option<oneshot::Sender<End>>,
    task: JoinHandle<Option<Server>>,
}

impl Answering {
    /// From now on. Within a runtime only.
    pub fn new(server: Server, handle: Handle) -> Answering {
        let mut answering = Answering { handle, at_work: None, resting: Some(server) };
        answering.begin();
        answering
    }

    /// It answers, again if it rested.
    pub fn begin(&mut self) {
        let Some(server) = self.resting.take() else { return };
        let (end, ended) = oneshot::channel();
        let ended = async { ended.await.unwrap_or(End::Leave) };
        let task = tokio::spawn(server.serve(self.handle.clone(), ended));
        self.at_work = Some(AtWork { end: Some(end), task });
    }

    /// Tells it to rest. [`Answering::rests`] says when it does.
    pub fn let_go(&mut self) {
        if let Some(end) = self.at_work.as_mut().and_then(|at_work| at_work.end.take()) {
            let _ended_already = end.send(End::HandOver);
        }
    }

    /// The server, once it rests.
    pub fn resting(&self) -> Option<&Server> {
        self.resting.as_ref()
    }

    /// Waits until it rests, for ever if it was not told to.
    pub async fn rests(&mut self) {
        match &mut self.at_work {
            Some(AtWork { end: None, task }) => {
                let server = task.await;
                self.at_work = None;
                self.resting = server.ok().flatten();
            }
            Some(AtWork { end: Some(_), .. }) | None => std::future::pending().await,
        }
    }

    /// It says the last, and removes its socket.
    pub async fn leave(self) {
        if let Some(AtWork { end, task }) = self.at_work {
            drop(end);
            let _cannot_panic = task.await;
        }
    }
}
