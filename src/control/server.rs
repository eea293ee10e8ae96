//! The supervisor's end of the control socket: who may connect, and how much of the supervisor a connection can have.
//!
//! Everything that comes in is bounded: connections, the time of each, its header, its body (none). What a peer does
//! on its connection is that connection's matter alone.

use std::convert::Infallible;
use std::fs;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::unistd::{geteuid, Pid, Uid};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use super::answers::{self, Answers};
use super::place;
use super::types::Handle;
use crate::sys::pidfd::PidFd;

/// How much of the supervisor its control socket can have.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at a time. Further ones wait in the queue.
    pub connections: usize,
    /// Of these, streams of events.
    pub streams: usize,
    /// Bytes of a request's header.
    pub header: usize,
    /// Time of a connection, from its accept to its last byte; streams of events have no end.
    pub time: Duration,
    /// When there is no room, whoever has asked nothing for so long makes some.
    pub patience: Duration,
    /// Time for the supervisor to answer.
    pub answer: Duration,
    /// The same where it tries another program first.
    pub trial: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: 64,
            streams: 32,
            header: 16 << 10,
            time: Duration::from_secs(10),
            patience: Duration::from_millis(100),
            answer: Duration::from_secs(5),
            trial: Duration::from_secs(9),
        }
    }
}

/// Why the control socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody answers on it.
    #[error("control socket {0:?} is in use by a supervisor that answers: stop that one, or give another --control PATH or --name")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{0:?} exists and is not a socket: it is left alone; give another --control PATH")]
    NotASocket(PathBuf),
    /// Its directory cannot be made.
    #[error("cannot make the directory {path:?} of the control socket: {source}; give another --control PATH")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The system says no.
    #[error("cannot {step} control socket {path:?}: {source}; give another --control PATH")]
    Socket {
        /// What failed.
        step: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The bound control socket. Connections wait in its queue until it is served.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    file: SocketFile,
    limits: Limits,
}

/// How it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// For good.
    Leave,
    /// Another one goes on with the socket.
    HandOver,
}

/// The socket's file, removed at the end if it is still ours.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.identity);
        if ours {
            let _gone_already = fs::remove_file(&self.path);
        }
    }
}

impl Server {
    /// Binds it for its owner alone. A file that a dead supervisor left is replaced.
    pub fn bind(path: &Path) -> Result<Server, BindError> {
        let path =
            std::path::absolute(path).map_err(|source| BindError::Directory { path: path.to_owned(), source })?;
        if let Some(directory) = path.parent() {
            place::make_directory(directory, 0o700)
                .map_err(|source| BindError::Directory { path: directory.to_owned(), source })?;
        }
        let failed = |step| {
            let path = path.clone();
            move |source| BindError::Socket { step, path, source }
        };
        match fs::symlink_metadata(&path) {
            Ok(found) if !found.file_type().is_socket() => return Err(BindError::NotASocket(path)),
            Ok(_) if place::is_alive(&path) => return Err(BindError::InUse(path)),
            Ok(_) => fs::remove_file(&path).map_err(failed("replace the stale"))?,
            Err(_) => {}
        }
        let address = SockAddr::unix(&path).map_err(failed("name (at most 107 bytes)"))?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).map_err(failed("open"))?;
        socket.bind(&address).map_err(failed("bind"))?;
        let made = fs::symlink_metadata(&path).map_err(failed("find"))?;
        let file = SocketFile { path: path.clone(), identity: (made.dev(), made.ino()) };
        // Nobody can connect before listen(2), so nobody sees the mode that the umask gave it.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(failed("set the mode of"))?;
        socket.listen(128).map_err(failed("listen on"))?;
        Ok(Server { listener: socket.into(), file, limits: Limits::default() })
    }

    /// Goes on with that of the program in whose place this one is.
    pub fn resume(listener: OwnedFd, path: PathBuf) -> Result<Server, BindError> {
        match fs::symlink_metadata(&path) {
            Ok(found) => {
                let file = SocketFile { identity: (found.dev(), found.ino()), path };
                Ok(Server { listener: listener.into(), file, limits: Limits::default() })
            }
            // Somebody removed it.
            Err(_) => Server::bind(&path),
        }
    }

    /// Its socket, to be kept for the program that takes this one's place.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// With other limits.
    #[must_use]
    pub fn limited(mut self, limits: Limits) -> Server {
        self.limits = limits;
        self
    }

    /// Where it is bound.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Answers until `end`, and then for as long as it takes to say the last, but no longer than a second.
    /// Streams of events end with the last event that was sent before `end`. Dropped, it ends at once.
    /// With [`End::HandOver`] whoever connects meanwhile waits, and the server is given back.
    pub async fn serve(self, handle: Handle, end: impl Future<Output = End>) -> Option<Server> {
        let listener = self.listener.try_clone().and_then(tokio::net::UnixListener::from_std);
        let listener = match listener {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!("cannot serve the control socket: {error}; status and upgrade by SIGHUP still work");
                return match end.await {
                    End::Leave => None,
                    End::HandOver => Some(self),
                };
            }
        };
        let (ending, ended) = watch::channel(None);
        let answers = Answers::new(handle, self.limits, ended);
        let mut seats = Seats { most: self.limits.connections, patience: self.limits.patience, taken: Vec::new() };
        let mut connections = JoinSet::new();
        let mut end = std::pin::pin!(end);
        let how = loop {
            let room = seats.room();
            tokio::select! {
                how = &mut end => break how,
                Some(_) = connections.join_next() => seats.leave(),
                accepted = accept(&listener, room) => match accepted {
                    Ok(stream) => {
                        seats.make_room();
                        let asked = Arc::new(AtomicBool::new(false));
                        let task = connections.spawn(connection(stream, answers.clone(), self.limits, asked.clone()));
                        seats.taken.push(Seat { since: Instant::now(), asked, task });
                        // It may have asked already, and is not to be taken for one that has not.
                        tokio::task::yield_now().await;
                    }
                    Err(error) => {
                        // Out of fds or memory: the connection stays in the queue, and trying at once would spin.
                        tracing::warn!("cannot accept a control connection: {error}");
                        tokio::time::sleep(Duration::from_millis(200)).await;
                    }
                }
            }
        };
        drop(listener);
        let server = match how {
            End::Leave => None,
            End::HandOver => Some(self),
        };
        drop(answers);
        let _nobody_follows = ending.send(Some(how));
        let all = async {
            while let Some(done) = connections.join_next().await {
                if let (Ok(Some(follower)), 1, End::Leave) = (done, std::process::id(), how) {
                    farewell(follower).await;
                }
            }
        };
        let _cut_off = tokio::time::timeout(Duration::from_secs(1), all).await;
        server
    }
}

/// The connections that there are.
struct Seats {
    most: usize,
    patience: Duration,
    /// The oldest first.
    taken: Vec<Seat>,
}

struct Seat {
    since: Instant,
    asked: Arc<AtomicBool>,
    task: AbortHandle,
}

impl Seats {
    /// When there is room for one more. None: when somebody leaves.
    fn room(&self) -> Option<Instant> {
        if self.taken.len() < self.most {
            return Some(Instant::now());
        }
        self.taken.iter().find(|seat| seat.is_idle()).map(|seat| seat.since + self.patience)
    }

    /// Ends the oldest one that has asked nothing, if there is no room.
    fn make_room(&mut self) {
        if self.taken.len() < self.most {
            return;
        }
        if let Some(oldest) = self.taken.iter().position(Seat::is_idle) {
            self.taken.remove(oldest).task.abort();
            tracing::debug!("a control connection asked nothing while others wait: closed");
        }
    }

    fn leave(&mut self) {
        self.taken.retain(|seat| !seat.task.is_finished());
    }
}

impl Seat {
    fn is_idle(&self) -> bool {
        !self.asked.load(Ordering::Relaxed)
    }
}

/// The next connection, once there is room for it.
async fn accept(listener: &tokio::net::UnixListener, room: Option<Instant>) -> io::Result<UnixStream> {
    match room {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
    listener.accept().await.map(|(stream, _)| stream)
}

/// One connection, one request. Gives who it was that followed the events.
async fn connection(stream: UnixStream, answers: Answers, limits: Limits, asked: Arc<AtomicBool>) -> Option<Pid> {
    let process = stream.peer_cred().ok().and_then(|peer| peer.pid());
    let peer = stream.peer_cred().map(|peer| Uid::from_raw(peer.uid()));
    let streaming = Arc::new(AtomicBool::new(false));
    let service = service_fn(|request| {
        asked.store(true, Ordering::Relaxed);
        let (answers, streaming, peer) = (answers.clone(), streaming.clone(), peer.as_ref().ok().copied());
        async move {
            let response = match peer {
                Some(peer) if may_ask(peer, geteuid()) => answers.answer(request).await,
                Some(peer) => answers::forbidden(peer),
                None => answers::unknown_peer(),
            };
            streaming.store(answers::is_stream(&response), Ordering::Relaxed);
            Ok::<_, Infallible>(response)
        }
    });
    let mut protocol = http1::Builder::new();
    // One request a connection: there is no idle connection to be counted and timed.
    protocol.keep_alive(false).max_buf_size(limits.header).max_headers(64);
    protocol.timer(TokioTimer::new()).header_read_timeout(limits.time);
    let mut served = std::pin::pin!(protocol.serve_connection(TokioIo::new(stream), service));
    let done = match tokio::time::timeout(limits.time, &mut served).await {
        Ok(done) => done,
        Err(_too_slow) if streaming.load(Ordering::Relaxed) => served.await,
        Err(_too_slow) => {
            tracing::debug!("a control connection took too long: closed");
            Ok(())
        }
    };
    if let Err(error) = done {
        tracing::debug!("control connection: {error}");
    }
    process.filter(|_| streaming.load(Ordering::Relaxed)).map(Pid::from_raw)
}

/// The end of PID 1 is the end of all in its container: whoever followed the events there is to end first, and as it wants.
async fn farewell(follower: Pid) {
    if let Ok(process) = PidFd::open(follower) {
        let _cannot_be_watched = process.exited().await;
    }
}

/// The supervisor's own user, and root.
fn may_ask(peer: Uid, own: Uid) -> bool {
    peer.is_root() || peer == own
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_own_user_and_root_may_ask() {
        let (root, web, other) = (Uid::from_raw(0), Uid::from_raw(33), Uid::from_raw(1000));
        assert!(may_ask(web, web) && may_ask(root, web) && may_ask(root, root));
        assert!(!may_ask(other, web) && !may_ask(web, root));
    }

    #[test]
    fn it_is_for_its_owner_replaces_what_is_stale_and_leaves_the_rest_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/web.sock");
        let server = Server::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
        assert!(matches!(Server::bind(&path), Err(BindError::InUse(_))));
        drop(server);
        assert!(!path.exists());

        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let server = Server::bind(&path).unwrap();
        // Another one's file is not removed at the end.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        drop(server);
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
        assert!(matches!(Server::bind(&path), Err(BindError::NotASocket(_))));

        let long = dir.path().join("x".repeat(120));
        assert!(Server::bind(&long).unwrap_err().to_string().contains("107 bytes"));
    }
}
