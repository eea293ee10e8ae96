//! Both ends over a real socket, and everything that should not come over one.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::client::{Client, ClientError};
use super::fixture::{self, Fake};
use super::server::Limits;
use super::types::{Command, Event, Refusal, Reply, ServicePhase, UpgradeReport};
use crate::config::CanaryFlags;

fn quick() -> Limits {
    Limits { time: Duration::from_millis(500), ..Limits::default() }
}

async fn raw(client: &Client, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(client.path()).await.unwrap();
    // It may have refused and closed before it was sent everything.
    let _refused_early = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _reset = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn what_is_asked_arrives_and_what_is_answered_comes_back() {
    let fake = Fake::start(Limits::default(), 16, |command| match command {
        Command::Rollback => Reply::Refused(Refusal { reason: "nothing before".to_owned(), remedy: "none".to_owned() }),
        Command::Stop { .. } => Reply::Stopping,
        _ => Reply::Accepted { upgrade: 9 },
    });
    assert_eq!(fake.client.status().await.unwrap(), fixture::status());
    assert_eq!(fake.client.command(Command::Upgrade).await.unwrap(), Reply::Accepted { upgrade: 9 });
    assert_eq!(fake.client.command(Command::Restart).await.unwrap(), Reply::Accepted { upgrade: 9 });
    let refused = fake.client.command(Command::Rollback).await.unwrap();
    assert!(matches!(refused, Reply::Refused(refusal) if refusal.reason == "nothing before"));
    let mut flags = CanaryFlags::default();
    for (name, value) in [("canary-steps", "0.5%,100%"), ("canary-from", "::1"), ("canary-check", "exec:a & b=%41 'ä'")]
    {
        flags.set(name, value).unwrap();
    }
    let canaries = [flags, CanaryFlags::default()].map(|flags| Command::Canary(Box::new(flags)));
    for command in canaries.iter().chain(&[Command::Promote, Command::Abort]) {
        assert_eq!(fake.client.command(command.clone()).await.unwrap(), Reply::Accepted { upgrade: 9 });
    }
    assert_eq!(fake.client.command(Command::Stop { quick: true }).await.unwrap(), Reply::Stopping);
    assert_eq!(fake.client.command(Command::Stop { quick: false }).await.unwrap(), Reply::Stopping);
    assert!(fake.client.metrics().await.unwrap().contains("zddsup_serving_generation{service=\"web\"} 3"));
    let asked = fake.asked.lock().unwrap().clone();
    let rest = [Command::Promote, Command::Abort, Command::Stop { quick: true }, Command::Stop { quick: false }];
    assert_eq!(asked, [&[Command::Upgrade, Command::Restart, Command::Rollback], &canaries[..], &rest].concat());
}

#[tokio::test]
async fn events_begin_with_the_status_and_end_with_the_last() {
    let fake = Fake::accepting(1);
    let mut events = fake.client.events().await.unwrap();
    assert_eq!(events.supervisor(), Some(i32::try_from(std::process::id()).unwrap()));
    assert_eq!(events.next().await.unwrap(), Some(Event::Status(Box::new(fixture::status()))));
    let news = [Event::Upgrade(fixture::report(5)), Event::Service { phase: ServicePhase::Upgrading }];
    fake.events.send(news[0].clone()).unwrap();
    assert_eq!(events.next().await.unwrap().as_ref(), Some(&news[0]));
    fake.events.send(news[1].clone()).unwrap();
    let path = fake.client.path().to_owned();
    let _directory = fake.end().await;
    assert_eq!(events.next().await.unwrap().as_ref(), Some(&news[1]));
    assert_eq!(events.next().await.unwrap(), None);
    assert!(!path.exists());
    assert!(matches!(Client::new(path).status().await, Err(ClientError::Unreachable { .. })));
}

#[tokio::test]
async fn who_reads_slowly_is_told_what_it_missed_and_gets_the_status_anew() {
    let fake = Fake::start(Limits::default(), 4, |_| Reply::Stopping);
    let mut events = fake.client.events().await.unwrap();
    assert!(matches!(events.next().await.unwrap(), Some(Event::Status(_))));
    let mut big = fixture::report(1);
    big.stderr = vec!["x".repeat(100_000); 10];
    for id in 1..=40 {
        fake.events.send(Event::Upgrade(UpgradeReport { id, ..big.clone() })).unwrap();
        tokio::task::yield_now().await;
    }
    let mut after = fixture::status();
    after.restarts = 7;
    *fake.status.lock().unwrap() = after.clone();
    let (mut missed, mut got) = (0, 0);
    loop {
        match events.next().await.unwrap().unwrap() {
            Event::Lagged { missed: some } => {
                missed += some;
                assert_eq!(events.next().await.unwrap(), Some(Event::Status(Box::new(after.clone()))));
            }
            Event::Upgrade(report) => {
                got += 1;
                if report.id == 40 {
                    break;
                }
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(missed > 0);
    assert_eq!(missed + got, 40);
}

#[tokio::test]
async fn a_supervisor_that_is_cut_off_ends_the_stream() {
    let fake = Fake::accepting(1);
    let mut events = fake.client.events().await.unwrap();
    events.next().await.unwrap();
    fake.kill();
    assert_eq!(events.next().await.unwrap(), None);
}

#[tokio::test]
async fn hostile_requests_are_refused_and_disturb_nobody() {
    let fake = Fake::start(quick(), 16, |_| Reply::Accepted { upgrade: 1 });
    let client = &fake.client;
    let garbage: Vec<u8> = (0..200_000u32).map(|i| i.wrapping_mul(2_654_435_761).to_be_bytes()[1]).collect();
    let long = format!("GET /v1/status HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "y".repeat(200_000));
    let many = format!("GET /v1/status HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(1000));
    let path = format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "a".repeat(100_000));
    for (bytes, code) in [
        (garbage.as_slice(), "400"),
        (long.as_bytes(), "431"),
        (many.as_bytes(), "431"),
        (path.as_bytes(), "4"),
        (b"POST /v1/upgrade HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nsurprise!", "400"),
        (b"POST /v1/upgrade HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n", "400"),
        (b"POST /v1/upgrade HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nffffffff\r\n", "400"),
        (b"POST /v1/upgrade HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", "400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ""),
        (b"GET /v1/status HTTP/1.1\r\nhost: x", ""),
        (b"DELETE /v1/status HTTP/1.1\r\nhost: x\r\n\r\n", "405"),
        (b"GET /../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n", "404"),
        (b"\0", "400"),
        (b"", ""),
    ] {
        let answer = tokio::time::timeout(Duration::from_secs(10), raw(client, bytes)).await.unwrap();
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(60)]).into_owned();
        let right = answer.is_empty() || answer.starts_with(&format!("HTTP/1.1 {code}"));
        assert!(right, "{shown}: {answer}");
        assert!(!answer.starts_with("HTTP/1.1 2"), "{shown}: {answer}");
    }
    client.status().await.unwrap();
    assert!(fake.asked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn connections_that_dawdle_make_room() {
    let limits = Limits { connections: 4, streams: 1, ..quick() };
    let fake = Fake::start(limits, 16, |_| Reply::Stopping);
    let mut dawdling = Vec::new();
    for _ in 0..20 {
        let mut stream = UnixStream::connect(fake.client.path()).await.unwrap();
        stream.write_all(b"GET /v1/sta").await.unwrap();
        dawdling.push(stream);
    }
    let begun = Instant::now();
    let client = fake.client.clone();
    let asked = tokio::spawn(async move { client.status().await });
    // One byte at a time does not buy more of it.
    let mut loris = UnixStream::connect(fake.client.path()).await.unwrap();
    tokio::spawn(async move {
        for byte in b"GET /v1/status HTTP/1.1\r\nhost: nobody-in-a-hurry\r\n".iter().cycle() {
            if loris.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    asked.await.unwrap().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(14));

    let _events = fake.client.events().await.unwrap();
    let denied = fake.client.events().await.unwrap_err();
    assert!(denied.to_string().contains("too many follow the events"), "{denied}");
    fake.client.status().await.unwrap();
}

#[tokio::test]
async fn whoever_asks_nothing_goes_first_when_there_is_no_room() {
    let limits = Limits { connections: 4, time: Duration::from_secs(60), ..Limits::default() };
    let fake = Fake::start(limits, 16, |_| Reply::Stopping);
    let mut events = fake.client.events().await.unwrap();
    assert!(matches!(events.next().await.unwrap(), Some(Event::Status(_))));
    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(UnixStream::connect(fake.client.path()).await.unwrap());
    }
    // Not a minute later, by when the silent ones would have had their time.
    let begun = Instant::now();
    fake.client.status().await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10));
    // Whoever had asked is still there.
    fake.events.send(Event::Service { phase: ServicePhase::Upgrading }).unwrap();
    assert!(matches!(events.next().await.unwrap(), Some(Event::Service { .. })));
}

#[tokio::test]
async fn who_asks_and_never_reads_is_dropped() {
    let limits = Limits { connections: 1, ..quick() };
    let fake = Fake::start(limits, 16, |_| Reply::Stopping);
    fake.status.lock().unwrap().upgrades[0].stderr = vec!["x".repeat(1 << 20)];
    let mut stream = UnixStream::connect(fake.client.path()).await.unwrap();
    stream.write_all(b"GET /v1/status HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    fake.client.status().await.unwrap();
}

#[tokio::test]
async fn a_supervisor_that_does_not_answer_is_said_to_be_busy() {
    let impatient = Limits { answer: Duration::from_millis(300), ..Limits::default() };
    let fake = Fake::accepting(1);
    let (commands, mut unanswered) = tokio::sync::mpsc::channel(1);
    let handle = super::types::Handle { commands, events: fake.events.clone() };
    let path = fake.client.path().with_file_name("busy.sock");
    let server = super::server::Server::bind(&path).unwrap().limited(impatient);
    let serving = tokio::spawn(server.serve(handle, std::future::pending()));
    let client = Client::new(path);
    let error = client.command(Command::Upgrade).await.unwrap_err().to_string();
    assert!(error.contains("busy"), "{error}");
    unanswered.close();
    let error = client.command(Command::Upgrade).await.unwrap_err().to_string();
    assert!(error.contains("about to end"), "{error}");
    serving.abort();
}

#[tokio::test]
async fn something_else_on_the_socket_is_strange() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("other.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        for answer in ["SSH-2.0-Hello\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi", "", "HTTP/1.1 200"] {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1000];
            let _some = stream.read(&mut request).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    let client = Client::new(path);
    assert!(matches!(client.status().await, Err(ClientError::Strange { .. })));
    assert!(matches!(client.status().await, Err(ClientError::Strange { .. })));
    assert!(matches!(client.status().await, Err(ClientError::Gone { .. })));
    assert!(matches!(client.status().await, Err(ClientError::Gone { .. })));
}

/// Another user's connection, where there is one to be had: only root can start a process of another user.
#[tokio::test]
async fn another_user_may_not_ask() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let fake = Fake::accepting(1);
    let path = fake.client.path().to_owned();
    fs::set_permissions(path.parent().unwrap(), fs::Permissions::from_mode(0o755)).unwrap();
    let curl = |mode: u32| {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let mut curl = std::process::Command::new("curl");
        curl.args(["-sS", "-XPOST", "http://z/v1/upgrade", "--unix-socket"]).arg(&path).uid(65534).gid(65534);
        tokio::task::spawn_blocking(move || curl.output())
    };
    let Ok(refused) = curl(0o666).await.unwrap() else { return };
    let answer = String::from_utf8_lossy(&refused.stdout);
    assert!(answer.contains("user 65534 may not control this service"), "{answer}");
    let shut_out = curl(0o600).await.unwrap().unwrap();
    assert!(!shut_out.status.success());
    assert!(fake.asked.lock().unwrap().is_empty());
}
