//! What each path of the control API answers.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};
use hyper::header::{HeaderValue, ALLOW, CACHE_CONTROL, CONTENT_TYPE};
use hyper::{Method, Request, Response, StatusCode};
use nix::unistd::Uid;
use percent_encoding::percent_decode_str;
use serde::Serialize;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::{broadcast, oneshot, watch, OwnedSemaphorePermit, Semaphore};

use super::server::{End, Limits};
use super::types::{self, Accepted, Command, Event, Handle, Refusal, Replacing, Reply, Status, Stopping};
use super::{metrics, sse};
use crate::config::canary::CanaryFlags;

/// A body that is there at once, or comes as a stream.
pub type Body = UnsyncBoxBody<Bytes, Infallible>;

const EVENT_STREAM: &str = "text/event-stream";

/// Answers requests for a supervisor.
#[derive(Debug, Clone)]
pub struct Answers {
    handle: Handle,
    limits: Limits,
    streams: Arc<Semaphore>,
    ended: watch::Receiver<Option<End>>,
}

/// What a request means.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Wanted {
    Command(Command),
    Events,
    Metrics,
}

impl Answers {
    /// For this supervisor, until `ended`.
    #[must_use]
    pub fn new(handle: Handle, limits: Limits, ended: watch::Receiver<Option<End>>) -> Self {
        Answers { handle, limits, streams: Arc::new(Semaphore::new(limits.streams)), ended }
    }

    /// Answers one request.
    pub async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let wanted = match wanted(request.method(), request.uri().path(), request.uri().query()) {
            Ok(wanted) => wanted,
            Err(refused) => return *refused,
        };
        if !request.body().is_end_stream() {
            return refuse(
                StatusCode::BAD_REQUEST,
                "the request has a body, and none of this API takes one",
                "send it without; parameters go into the query, as in /v1/stop?quick=true",
            );
        }
        let answered = match wanted {
            Wanted::Events => self.events().await,
            Wanted::Metrics => self.status().await.map(|status| text(metrics::CONTENT_TYPE, metrics::encode(&status))),
            Wanted::Command(command) => self.ask(command).await.map(reply),
        };
        answered.unwrap_or_else(|refused| *refused)
    }

    async fn ask(&self, command: Command) -> Result<Reply, Box<Response<Body>>> {
        let patience = match command {
            // The other program is tried first.
            Command::SelfUpgrade => self.limits.trial,
            _ => self.limits.answer,
        };
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.handle.commands.send(types::Request { command, reply }).await.ok()?;
            answer.await.ok()
        };
        let unavailable = |reason, remedy| Box::new(refuse(StatusCode::SERVICE_UNAVAILABLE, reason, remedy));
        match tokio::time::timeout(patience, asked).await {
            Ok(Some(reply)) => Ok(reply),
            Ok(None) => Err(unavailable("the supervisor is about to end", "start it again with `zddsup run`")),
            Err(_) => Err(unavailable("the supervisor is busy and did not answer in time", "ask again; see its log")),
        }
    }

    async fn status(&self) -> Result<Box<Status>, Box<Response<Body>>> {
        match self.ask(Command::Status).await? {
            Reply::Status(status) => Ok(status),
            other @ (Reply::Accepted { .. } | Reply::Stopping | Reply::Replacing | Reply::Refused(_)) => {
                Err(Box::new(reply(other)))
            }
        }
    }

    /// The status, and then everything that happens after it.
    async fn events(&self) -> Result<Response<Body>, Box<Response<Body>>> {
        let Ok(slot) = self.streams.clone().try_acquire_owned() else {
            return Err(Box::new(refuse(
                StatusCode::SERVICE_UNAVAILABLE,
                "too many follow the events",
                "end some of them, or look at /v1/status instead",
            )));
        };
        // Before the status is asked for, so that nothing falls between the two.
        let news = self.handle.events.subscribe();
        let first = self.status().await?;
        let follower = Follower {
            answers: self.clone(),
            news,
            next: Some(Event::Status(first)),
            lagged: false,
            told: false,
            _slot: slot,
        };
        let frames = stream::unfold(follower, |mut follower| async {
            let event = follower.event().await?;
            Some((Ok(Frame::data(Bytes::from(sse::encode(&event)))), follower))
        });
        let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(EVENT_STREAM));
        response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        Ok(response)
    }
}

/// Somebody who follows the events.
struct Follower {
    answers: Answers,
    news: broadcast::Receiver<Event>,
    next: Option<Event>,
    lagged: bool,
    /// Whether it was told to come again.
    told: bool,
    _slot: OwnedSemaphorePermit,
}

impl Follower {
    async fn event(&mut self) -> Option<Event> {
        if let Some(event) = self.next.take() {
            return Some(event);
        }
        if std::mem::take(&mut self.lagged) {
            // What was missed is in here.
            return self.answers.status().await.ok().map(Event::Status);
        }
        let received = tokio::select! {
            biased;
            received = self.news.recv() => received,
            ended = self.answers.ended.wait_for(Option::is_some) => match self.news.try_recv() {
                Ok(event) => Ok(event),
                Err(TryRecvError::Lagged(missed)) => Err(RecvError::Lagged(missed)),
                Err(TryRecvError::Empty | TryRecvError::Closed) => {
                    let goes_on = ended.is_ok_and(|how| *how == Some(End::HandOver));
                    return (goes_on && !std::mem::replace(&mut self.told, true)).then_some(Event::Replacing);
                }
            },
        };
        match received {
            Ok(event) => {
                self.told |= event == Event::Replacing;
                Some(event)
            }
            Err(RecvError::Lagged(missed)) => {
                self.lagged = true;
                Some(Event::Lagged { missed })
            }
            Err(RecvError::Closed) => None,
        }
    }
}

fn wanted(method: &Method, path: &str, query: Option<&str>) -> Result<Wanted, Box<Response<Body>>> {
    let (takes, mut wanted) =
        match path {
            "/v1/status" => (Method::GET, Wanted::Command(Command::Status)),
            "/v1/events" => (Method::GET, Wanted::Events),
            "/v1/metrics" => (Method::GET, Wanted::Metrics),
            "/v1/upgrade" => (Method::POST, Wanted::Command(Command::Upgrade)),
            "/v1/rollback" => (Method::POST, Wanted::Command(Command::Rollback)),
            "/v1/restart" => (Method::POST, Wanted::Command(Command::Restart)),
            "/v1/promote" => (Method::POST, Wanted::Command(Command::Promote)),
            "/v1/abort" => (Method::POST, Wanted::Command(Command::Abort)),
            "/v1/self-upgrade" => (Method::POST, Wanted::Command(Command::SelfUpgrade)),
            "/v1/stop" => (Method::POST, Wanted::Command(Command::Stop { quick: false })),
            _ => return Err(Box::new(refuse(
                StatusCode::NOT_FOUND,
                "there is no such path",
                "GET /v1/status, /v1/events or /v1/metrics; POST /v1/upgrade, /v1/promote, /v1/abort, /v1/rollback, \
                 /v1/restart, /v1/self-upgrade or /v1/stop",
            ))),
        };
    if method != takes {
        let mut refused = refuse(
            StatusCode::METHOD_NOT_ALLOWED,
            &format!("{path} does not take this method"),
            &format!("use {takes}"),
        );
        if let Ok(takes) = HeaderValue::from_str(takes.as_str()) {
            refused.headers_mut().insert(ALLOW, takes);
        }
        return Err(Box::new(refused));
    }
    for parameter in query.unwrap_or_default().split('&').filter(|parameter| !parameter.is_empty()) {
        match (&mut wanted, parameter) {
            (Wanted::Command(Command::Stop { quick }), "quick" | "quick=true") => *quick = true,
            (Wanted::Command(Command::Stop { quick }), "quick=false") => *quick = false,
            (Wanted::Command(Command::Upgrade), "canary=off") => wanted = canary(Box::default()),
            (Wanted::Command(Command::Upgrade | Command::Canary(_)), parameter) if parameter.starts_with("canary") => {
                let mut flags = match &wanted {
                    Wanted::Command(Command::Canary(flags)) => flags.clone(),
                    Wanted::Command(_) | Wanted::Events | Wanted::Metrics => Box::default(),
                };
                set(&mut flags, parameter).map_err(|why| Box::new(wrong_parameter(parameter, &why)))?;
                wanted = canary(flags);
            }
            _ => {
                return Err(Box::new(refuse(
                    StatusCode::BAD_REQUEST,
                    &format!("{path} does not know this parameter"),
                    "quick=true is one of /v1/stop; canary, canary-from, canary-steps, canary-interval and canary-check are \
                     of /v1/upgrade",
                )))
            }
        }
    }
    if let Wanted::Command(Command::Canary(flags)) = &wanted {
        flags.plan().map_err(|error| Box::new(wrong_parameter("the canary", &error.to_string())))?;
    }
    Ok(wanted)
}

fn canary(flags: Box<CanaryFlags>) -> Wanted {
    Wanted::Command(Command::Canary(flags))
}

/// `NAME=VALUE`, the value percent-encoded.
fn set(flags: &mut CanaryFlags, parameter: &str) -> Result<(), String> {
    let (name, value) = parameter.split_once('=').ok_or("write NAME=VALUE")?;
    let value = percent_decode_str(value).decode_utf8().map_err(|_| "the value is not UTF-8")?;
    flags.set(name, &value)
}

fn wrong_parameter(parameter: &str, why: &str) -> Response<Body> {
    refuse(StatusCode::BAD_REQUEST, &format!("{parameter}: {why}"), "see docs/control.md; %25 is a percent sign")
}

fn reply(reply: Reply) -> Response<Body> {
    match reply {
        Reply::Status(status) => json(StatusCode::OK, &status),
        Reply::Accepted { upgrade } => json(StatusCode::ACCEPTED, &Accepted { upgrade }),
        Reply::Stopping => json(StatusCode::ACCEPTED, &Stopping { stopping: true }),
        Reply::Replacing => json(StatusCode::ACCEPTED, &Replacing { replacing: true }),
        Reply::Refused(refusal) => json(StatusCode::CONFLICT, &refusal),
    }
}

/// To somebody who may not ask.
#[must_use]
pub fn forbidden(peer: Uid) -> Response<Body> {
    refuse(
        StatusCode::FORBIDDEN,
        &format!("user {peer} may not control this service"),
        "ask as the user that zddsup runs as, or as root",
    )
}

/// To somebody of whom the kernel says nothing.
#[must_use]
pub fn unknown_peer() -> Response<Body> {
    refuse(StatusCode::FORBIDDEN, "the kernel does not say who you are", "connect by the control socket's path")
}

/// Whether a response is a stream of events.
#[must_use]
pub fn is_stream(response: &Response<Body>) -> bool {
    response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind == EVENT_STREAM)
}

fn refuse(code: StatusCode, reason: &str, remedy: &str) -> Response<Body> {
    json(code, &Refusal { reason: reason.to_owned(), remedy: remedy.to_owned() })
}

fn json(code: StatusCode, body: &impl Serialize) -> Response<Body> {
    let mut line = serde_json::to_string(body).unwrap_or_default();
    line.push('\n');
    let mut response = text("application/json", line);
    *response.status_mut() = code;
    response
}

fn text(kind: &'static str, body: String) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(body)).boxed_unsync());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_methods_and_parameters() {
        let ask =
            |method: Method, path, query| wanted(&method, path, query).map_err(|refused| refused.status().as_u16());
        assert_eq!(ask(Method::GET, "/v1/status", None), Ok(Wanted::Command(Command::Status)));
        assert_eq!(ask(Method::POST, "/v1/stop", None), Ok(Wanted::Command(Command::Stop { quick: false })));
        assert_eq!(
            ask(Method::POST, "/v1/stop", Some("quick=true")),
            Ok(Wanted::Command(Command::Stop { quick: true }))
        );
        assert_eq!(ask(Method::POST, "/v1/stop", Some("quick=maybe")), Err(400));
        assert_eq!(ask(Method::POST, "/v1/upgrade", Some("quick")), Err(400));
        assert_eq!(ask(Method::POST, "/v1/promote", None), Ok(Wanted::Command(Command::Promote)));
        assert_eq!(ask(Method::POST, "/v1/abort", None), Ok(Wanted::Command(Command::Abort)));
        assert_eq!(ask(Method::GET, "/v1/upgrade", None), Err(405));
        assert_eq!(ask(Method::POST, "/v1/status", None), Err(405));
        assert_eq!(ask(Method::GET, "/", None), Err(404));
        assert_eq!(ask(Method::GET, "/v2/status", None), Err(404));
    }

    #[test]
    fn a_canary_is_written_as_on_the_command_line() {
        let ask =
            |query| wanted(&Method::POST, "/v1/upgrade", Some(query)).map_err(|refused| refused.status().as_u16());
        let mut flags = CanaryFlags::default();
        flags.set("canary-steps", "1%,50%").unwrap();
        flags.set("canary-from", "10.0.0.0/8").unwrap();
        flags.set("canary-check", "exec:a b").unwrap();
        let asked = ask("canary-steps=1%25,50&canary-from=10.0.0.0%2f8&canary-check=exec:a%20b");
        assert_eq!(asked, Ok(canary(Box::new(flags))));
        assert_eq!(ask("canary=off"), Ok(canary(Box::default())));
        for bad in ["canary", "canary=0", "canary=5&canary-steps=6", "canary-check=exec:x", "canaryx=1", "canary=%ff"] {
            assert_eq!(ask(bad), Err(400), "{bad}");
        }
    }
}
