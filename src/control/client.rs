//! The command line's end of the control socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use percent_encoding::{utf8_percent_encode, NON_ALPHANUMERIC};
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use super::sse::{Decoder, SseError};
use super::types::{Accepted, Command, Event, Refusal, Replacing, Reply, Status, Stopping};
use crate::config::canary::CanaryFlags;

/// No answer but the stream of events is longer.
const MOST: usize = 16 << 20;

/// How long a supervisor may take to answer.
const PATIENCE: Duration = Duration::from_secs(15);
/// Until the next try when a supervisor's queue is full.
const QUEUE_IS_FULL: Duration = Duration::from_millis(20);

/// A supervisor, by its control socket. Each request has a connection of its own.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
}

/// Why a supervisor gave no answer that helps.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody is there.
    #[error("no supervisor answers on {path:?}: {source}; is `zddsup run` running, and as which user?")]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the supervisor on {path:?} went away before it answered ({why}); its log says more")]
    Gone {
        /// The socket.
        path: PathBuf,
        /// What broke.
        why: String,
    },
    /// It takes connections, and no more.
    #[error("the supervisor on {0:?} does not answer; is it stopped (Ctrl-Z, SIGSTOP), or the machine very busy?")]
    Silent(PathBuf),
    /// It answers something else.
    #[error(
        "what answers on {path:?} does not speak like zddsup ({why}); is the path right, and are both of one version?"
    )]
    Strange {
        /// The socket.
        path: PathBuf,
        /// What is strange.
        why: String,
    },
    /// It does not want to.
    #[error("{reason}; {remedy}", reason = .0.reason, remedy = .0.remedy)]
    Denied(Refusal),
}

/// Its options as the query.
fn canary_path(flags: &CanaryFlags) -> String {
    let pairs = flags.pairs();
    if pairs.is_empty() {
        return "/v1/upgrade?canary=off".to_owned();
    }
    let encode = |(name, value): (&str, String)| format!("{name}={}", utf8_percent_encode(&value, NON_ALPHANUMERIC));
    let pairs: Vec<_> = pairs.into_iter().map(encode).collect();
    format!("/v1/upgrade?{}", pairs.join("&"))
}

impl Client {
    /// For the supervisor that has this socket.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Client { path }
    }

    /// Its socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The state of the service.
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.ask(Method::GET, "/v1/status").await.and_then(|answer| answer.read(StatusCode::OK))
    }

    /// The metrics as text.
    pub async fn metrics(&self) -> Result<String, ClientError> {
        let answer = self.ask(Method::GET, "/v1/metrics").await?;
        match answer.code {
            StatusCode::OK => Ok(String::from_utf8_lossy(&answer.body).into_owned()),
            _ => Err(answer.denied()),
        }
    }

    /// Asks for something. A refusal is an answer.
    pub async fn command(&self, command: Command) -> Result<Reply, ClientError> {
        let path = match &command {
            Command::Status => return self.status().await.map(Box::new).map(Reply::Status),
            Command::Upgrade => "/v1/upgrade".to_owned(),
            Command::Canary(flags) => canary_path(flags),
            Command::Promote => "/v1/promote".to_owned(),
            Command::Abort => "/v1/abort".to_owned(),
            Command::Rollback => "/v1/rollback".to_owned(),
            Command::Restart => "/v1/restart".to_owned(),
            Command::SelfUpgrade => "/v1/self-upgrade".to_owned(),
            Command::Stop { quick: false } => "/v1/stop".to_owned(),
            Command::Stop { quick: true } => "/v1/stop?quick=true".to_owned(),
        };
        let answer = self.ask(Method::POST, &path).await?;
        if answer.code == StatusCode::CONFLICT {
            return answer.read(StatusCode::CONFLICT).map(Reply::Refused);
        }
        match command {
            Command::Stop { .. } => answer.read(StatusCode::ACCEPTED).map(|Stopping { .. }| Reply::Stopping),
            Command::SelfUpgrade => answer.read(StatusCode::ACCEPTED).map(|Replacing { .. }| Reply::Replacing),
            _ => answer.read(StatusCode::ACCEPTED).map(|Accepted { upgrade }| Reply::Accepted { upgrade }),
        }
    }

    /// Follows what happens. The first event is the status; nothing that happens after it is left out unsaid.
    pub async fn events(&self) -> Result<Events, ClientError> {
        let following = async {
            let (response, peer) = self.send(Method::GET, "/v1/events").await?;
            if response.status() != StatusCode::OK {
                return Err(Answer::collect(self, response).await?.denied());
            }
            Ok(Events {
                client: self.clone(),
                body: response.into_body(),
                decoder: Decoder::default(),
                peer,
                again: None,
            })
        };
        self.patiently(following).await
    }

    async fn ask(&self, method: Method, path: &str) -> Result<Answer, ClientError> {
        let asking = async {
            let (response, _) = self.send(method, path).await?;
            Answer::collect(self, response).await
        };
        self.patiently(asking).await
    }

    async fn patiently<T>(
        &self,
        work: impl std::future::Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ClientError> {
        tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| Err(ClientError::Silent(self.path.clone())))
    }

    async fn send(&self, method: Method, path: &str) -> Result<(Response<Incoming>, Option<i32>), ClientError> {
        let stream =
            self.connect().await.map_err(|source| ClientError::Unreachable { path: self.path.clone(), source })?;
        let peer = stream.peer_cred().ok().and_then(|peer| peer.pid()).filter(|&pid| pid > 0);
        let (mut requests, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.broken(&error))?;
        // It ends with the body, or when that is dropped.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "zddsup")
            .body(Empty::<Bytes>::new())
            .map_err(|error| self.strange(error.to_string()))?;
        let response = requests.send_request(request).await.map_err(|error| self.broken(&error))?;
        Ok((response, peer))
    }

    /// A full queue is waited for: somebody takes connections from it.
    async fn connect(&self) -> io::Result<UnixStream> {
        loop {
            match UnixStream::connect(&self.path).await {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => tokio::time::sleep(QUEUE_IS_FULL).await,
                connected => return connected,
            }
        }
    }

    fn broken(&self, error: &hyper::Error) -> ClientError {
        if error.is_parse() {
            self.strange(error.to_string())
        } else {
            ClientError::Gone { path: self.path.clone(), why: error.to_string() }
        }
    }

    /// It went away while it was followed.
    #[must_use]
    pub fn ended(&self) -> ClientError {
        ClientError::Gone { path: self.path.clone(), why: "its events ended".to_owned() }
    }

    /// It answered, and not to what it was asked.
    #[must_use]
    pub fn answered_otherwise(&self) -> ClientError {
        self.strange("it answered something else than was asked".to_owned())
    }

    fn strange(&self, why: String) -> ClientError {
        ClientError::Strange { path: self.path.clone(), why }
    }
}

/// A whole answer.
struct Answer {
    client: Client,
    code: StatusCode,
    body: Bytes,
}

impl Answer {
    async fn collect(client: &Client, response: Response<Incoming>) -> Result<Answer, ClientError> {
        let code = response.status();
        let body = Limited::new(response.into_body(), MOST).collect().await.map_err(|error| {
            match error.downcast_ref::<hyper::Error>() {
                Some(error) => client.broken(error),
                None => client.strange(error.to_string()),
            }
        })?;
        Ok(Answer { client: client.clone(), code, body: body.to_bytes() })
    }

    fn read<T: DeserializeOwned>(self, code: StatusCode) -> Result<T, ClientError> {
        if self.code != code {
            return Err(self.denied());
        }
        serde_json::from_slice(&self.body).map_err(|error| self.client.strange(error.to_string()))
    }

    /// An answer that says why there is none.
    fn denied(self) -> ClientError {
        match serde_json::from_slice(&self.body) {
            Ok(refusal) => ClientError::Denied(refusal),
            Err(_) => self.client.strange(format!("status {}", self.code)),
        }
    }
}

/// What happens, as it happens.
#[derive(Debug)]
pub struct Events {
    client: Client,
    body: Incoming,
    decoder: Decoder,
    peer: Option<i32>,
    /// It is followed again.
    again: Option<JoinHandle<Result<Events, ClientError>>>,
}

impl Events {
    /// The next one; none when the supervisor is gone. Where its program is replaced, it is followed on, and the next one is
    /// the status. Nothing is lost when this is dropped before it is done.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            let strange = |error: SseError| self.client.strange(error.to_string());
            match self.decoder.event().map_err(strange)? {
                Some(Event::Replacing) => {
                    let client = self.client.clone();
                    self.again = Some(tokio::spawn(async move { client.events().await }));
                    continue;
                }
                Some(event) => return Ok(Some(event)),
                None => {}
            }
            if let Some(again) = &mut self.again {
                *self = again.await.map_err(|error| self.client.strange(error.to_string()))??;
                continue;
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.decoder.push(data);
                    }
                }
                // A killed supervisor does not end its stream properly.
                Some(Err(error)) if !error.is_parse() => return Ok(None),
                Some(Err(error)) => return Err(self.client.broken(&error)),
                None => return Ok(None),
            }
        }
    }

    /// Pid of the supervisor, as this process sees it; none where it cannot.
    #[must_use]
    pub fn supervisor(&self) -> Option<i32> {
        self.peer
    }
}
