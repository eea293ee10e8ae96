//! A supervisor for tests of both ends of the control socket: it answers what it was told to.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::JoinHandle;

use super::client::Client;
use super::server::{End, Limits, Server};
use super::types::{
    Command, Event, Generation, GenerationPhase, Handle, Listener, Program, Proof, Reply, Request, ServicePhase,
    Status, Supervisor, UpgradeKind, UpgradeReport, UpgradeResult,
};
use crate::core::GenerationId;

/// A service whose third generation serves.
pub fn status() -> Status {
    Status {
        service: "web".to_owned(),
        supervisor: Supervisor {
            pid: 4711,
            version: "0.1.0".to_owned(),
            started_unix_ms: 1_700_000_000_500,
            replaced: 0,
        },
        phase: ServicePhase::Serving,
        serving: Some(GenerationId(3)),
        generations: vec![generation(3, GenerationPhase::Serving), generation(2, GenerationPhase::Retired)],
        listeners: vec![Listener { name: "http".to_owned(), address: "tcp://127.0.0.1:8080".to_owned() }],
        upgrades: vec![UpgradeReport { result: Some(UpgradeResult::Succeeded), retired: true, ..report(2) }],
        pending: None,
        restarts: 0,
        stored_fds: 0,
        ended: BTreeMap::new(),
    }
}

/// One of its generations.
pub fn generation(number: u32, phase: GenerationPhase) -> Generation {
    Generation {
        number: GenerationId(number),
        pid: Some(100),
        phase,
        program: Program { path: PathBuf::from("/srv/web"), sha256: Some("ab".repeat(32)) },
        cgroup: None,
        age_ms: 4_500,
        connections: Some(12),
        status: None,
        waiting_for: None,
        end: None,
    }
}

/// A transaction under way.
pub fn report(id: u64) -> UpgradeReport {
    UpgradeReport {
        id,
        kind: UpgradeKind::Upgrade,
        from: Some(GenerationId(3)),
        to: Some(GenerationId(4)),
        result: None,
        reason: None,
        stderr: Vec::new(),
        old_kept_serving: false,
        canary: None,
        phases: Vec::new(),
        connections_left: None,
        proof: Proof::default(),
        retired: false,
    }
}

/// A supervisor behind a real control socket.
pub struct Fake {
    /// Where it is.
    pub client: Client,
    /// For its news.
    pub events: broadcast::Sender<Event>,
    /// What `Command::Status` is answered with.
    pub status: Arc<Mutex<Status>>,
    /// What it was asked, but for the status.
    pub asked: Arc<Mutex<Vec<Command>>>,
    end: Option<oneshot::Sender<()>>,
    server: JoinHandle<Option<Server>>,
    directory: tempfile::TempDir,
}

impl Fake {
    /// Answers all but `Command::Status` by `reply`.
    pub fn start(limits: Limits, capacity: usize, reply: impl Fn(Command) -> Reply + Send + 'static) -> Fake {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("web.sock");
        let (commands, mut requests) = mpsc::channel::<Request>(4);
        let events = broadcast::Sender::new(capacity);
        let handle = Handle { commands, events: events.clone() };
        let (end, ended) = oneshot::channel::<()>();
        let serving = Server::bind(&path).unwrap().limited(limits).serve(handle, async {
            let _ended_or_dropped = ended.await;
            End::Leave
        });
        let server = tokio::spawn(serving);
        let (status, asked) = (Arc::new(Mutex::new(status())), Arc::new(Mutex::new(Vec::new())));
        let (current, noted) = (status.clone(), asked.clone());
        tokio::spawn(async move {
            while let Some(request) = requests.recv().await {
                let answer = if request.command == Command::Status {
                    Reply::Status(Box::new(current.lock().unwrap().clone()))
                } else {
                    noted.lock().unwrap().push(request.command.clone());
                    reply(request.command)
                };
                let _nobody_waits = request.reply.send(answer);
            }
        });
        Fake { client: Client::new(path), events, status, asked, end: Some(end), server, directory }
    }

    /// One that accepts everything.
    pub fn accepting(upgrade: u64) -> Fake {
        Fake::start(Limits::default(), 64, move |command| match command {
            Command::Stop { .. } => Reply::Stopping,
            _ => Reply::Accepted { upgrade },
        })
    }

    /// Ends it in order.
    pub async fn end(mut self) -> tempfile::TempDir {
        drop(self.end.take());
        self.server.await.unwrap();
        self.directory
    }

    /// Cuts it off.
    pub fn kill(self) {
        self.server.abort();
    }
}
