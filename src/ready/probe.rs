//! Probes: whether a generation serves, found out from outside.
//!
//! An answer counts only if it comes from the generation that was meant. Two generations may listen on one port: where
//! they have sockets of their own, the probe is steered to the one that is meant (`divert`). And whether steered or not,
//! after connecting the kernel is asked which socket is at the other end, and `/proc` whether one of the generation's
//! processes has it. An HTTP request is held back before its last line until that is known: no server answers, or closes
//! the connection, before.

use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::unistd::pipe2;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::time::{sleep, timeout};

use super::divert::{connect, Steering};
use super::tls::Tls;
use crate::config::ready::{Probe, Url};
use crate::core::End;
use crate::drain::{connections, diag};
use crate::process::group::{Group, MARKER_VAR};
use crate::process::program::Program;
use crate::process::reaper::Reaper;
use crate::process::spawn::{spawn, Launch};

/// The first attempts follow each other like this, later ones at up to [`SLOWEST`].
const FASTEST: Duration = Duration::from_millis(50);
const SLOWEST: Duration = Duration::from_secs(1);
/// How often the kernel is asked whether a connection was accepted.
const ACCEPTED: Duration = Duration::from_millis(5);
/// Longest head of an HTTP answer that is read.
const HEAD: usize = 16 * 1024;
/// Of what a command writes, so much is kept, and so many lines are told.
const WORDS: usize = 2048;
const LINES: usize = 3;

/// Whom a probe is about.
#[derive(Clone)]
pub struct Context {
    /// Name of the service.
    pub service: String,
    /// Number of the generation.
    pub generation: u32,
    /// Its first process.
    pub pid: i32,
    /// All of its processes.
    pub pids: Arc<dyn Fn() -> io::Result<Vec<i32>> + Send + Sync>,
    /// Lets a probe reach that generation alone.
    pub steering: Steering,
    /// For `https://`.
    pub tls: Option<Tls>,
    /// What the Host header says, and whose certificate it is to be; none: as the URL has it.
    pub host: Option<String>,
    /// Whether another process may answer as well.
    pub anybody: bool,
    /// For what an exec probe runs.
    pub reaper: Reaper,
    /// Longest time of one attempt.
    pub timeout: Duration,
}

/// Why an attempt did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum WhyNot {
    /// Nobody accepts there.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The other end is somebody else's.
    #[error("{address} was answered by a process that is not of this generation")]
    Other {
        /// Where.
        address: SocketAddr,
    },
    /// It did not answer properly.
    #[error("{0}")]
    Answer(String),
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The command says no.
    #[error("the command {0}")]
    Command(String),
    /// Something that the probe needs cannot be had.
    #[error("cannot probe: {0}")]
    System(#[from] io::Error),
}

/// Asks again and again until the answer is yes. `report` gets each new reason of a no.
pub async fn until_ready(probe: &Probe, context: &Context, mut report: impl FnMut(String)) {
    let mut pause = FASTEST;
    let mut said = String::new();
    loop {
        match once(probe, context).await {
            Ok(()) => return,
            Err(why) => {
                let why = why.to_string();
                if why != said {
                    report(why.clone());
                    said = why;
                }
            }
        }
        sleep(pause).await;
        pause = (pause * 3 / 2).min(SLOWEST);
    }
}

/// Asks once.
pub async fn once(probe: &Probe, context: &Context) -> Result<(), WhyNot> {
    let attempt = timeout(context.timeout, attempt(probe, context)).await;
    attempt.unwrap_or(Err(WhyNot::Timeout(context.timeout)))
}

async fn attempt(probe: &Probe, context: &Context) -> Result<(), WhyNot> {
    match probe {
        Probe::Tcp(address) => {
            let (stream, _diverted) = connect(*address, &context.steering).await?;
            is_of_generation((stream.local_addr()?, stream.peer_addr()?), context).await
        }
        Probe::Http(url) => http(url, context).await,
        Probe::Exec(command) => exec(command, context).await,
    }
}

/// Waits until the connection was accepted, and looks by whom.
async fn is_of_generation((local, address): (SocketAddr, SocketAddr), context: &Context) -> Result<(), WhyNot> {
    if context.anybody {
        return Ok(());
    }
    let inode = loop {
        match diag::far_side(local, address)? {
            Some(connection) if connection.inode != 0 => break connection.inode,
            Some(_) => sleep(ACCEPTED).await,
            None => {
                let why =
                    "closed the connection at once, or is not of this machine (notify and exec: ask nobody's socket)";
                return Err(WhyNot::Answer(format!("{address} {why}")));
            }
        }
    };
    if connections::has_socket(&(context.pids)()?, inode) {
        Ok(())
    } else {
        Err(WhyNot::Other { address })
    }
}

async fn http(url: &Url, context: &Context) -> Result<(), WhyNot> {
    let (stream, _diverted) = connect(url.address, &context.steering).await?;
    let ends = (stream.local_addr()?, stream.peer_addr()?);
    match &context.tls {
        None => exchange(stream, ends, url, context).await,
        Some(tls) => {
            let known_as = context.host.clone().unwrap_or_else(|| url.name());
            let shaken = tls.over(stream, &known_as).await;
            let stream =
                shaken.map_err(|error| WhyNot::Answer(format!("{} does not speak TLS: {error}", url.address)))?;
            exchange(stream, ends, url, context).await
        }
    }
}

/// Sends a request, and reads the status of its answer.
async fn exchange(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    ends: (SocketAddr, SocketAddr),
    url: &Url,
    context: &Context,
) -> Result<(), WhyNot> {
    let host = context.host.as_ref().unwrap_or(&url.host);
    let path = &url.path;
    let head =
        format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: zddsup\r\nAccept: */*\r\nConnection: close\r\n");
    stream.write_all(head.as_bytes()).await?;
    stream.flush().await?;
    is_of_generation(ends, context).await?;
    stream.write_all(b"\r\n").await?;
    stream.flush().await?;
    let mut answer = Vec::new();
    while !answer.contains(&b'\n') && answer.len() < HEAD {
        if stream.read_buf(&mut answer).await? == 0 {
            break;
        }
    }
    let line = answer.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line).trim().to_owned();
    let status = line.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1)?.parse::<u16>().ok());
    match status {
        Some(200..=399) => Ok(()),
        Some(status) => Err(WhyNot::Answer(format!("{} answered with status {status}", url.address))),
        None => Err(WhyNot::Answer(format!("{} did not answer with HTTP: {line:?}", url.address))),
    }
}

/// Runs a shell command in its own process group, and ends all of it with the attempt.
async fn exec(command: &str, context: &Context) -> Result<(), WhyNot> {
    struct EndedWithTheAttempt(Group);
    impl Drop for EndedWithTheAttempt {
        fn drop(&mut self) {
            let _gone_already = self.0.signal_all(Signal::SIGKILL);
        }
    }
    let marker = format!("{:032x}", fastrand::u128(..));
    let shell = Program::resolve("/bin/sh".as_ref(), None, Path::new("/")).map_err(io::Error::other)?;
    let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from)?;
    let mut words = pipe::Receiver::from_owned_fd(read)?;
    let mut env: Vec<_> = std::env::vars_os().collect();
    env.extend([
        ("ZDDSUP_SERVICE".into(), OsString::from(&context.service)),
        ("ZDDSUP_GENERATION".into(), context.generation.to_string().into()),
        (MARKER_VAR.into(), OsString::from(&marker)),
        ("ZDDSUP_PID".into(), context.pid.to_string().into()),
    ]);
    let launch = Launch {
        program: Arc::new(shell),
        recorded: false,
        args: ["sh", "-c", command].map(OsString::from).into(),
        env,
        cgroup: None,
        directory: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
        fds: Vec::new(),
        stdout: Some(write.try_clone()?),
        stderr: Some(write),
        identity: None,
        umask: None,
        limits: Vec::new(),
        nice: None,
        oom_score_adj: None,
        listen_pid: false,
        trap: false,
    };
    let spawned = spawn(launch, &context.reaper).await.map_err(io::Error::other)?;
    let _all_of_it = EndedWithTheAttempt(Group::new(spawned.member, &marker));
    let (mut end, mut said) = (spawned.end, Vec::new());
    let end = loop {
        tokio::select! {
            biased;
            // Not its end, which somebody who outlives it may have.
            Ok(1..) = words.read_buf(&mut said) => shorten(&mut said),
            end = &mut end => break end,
        }
    };
    while matches!(words.try_read_buf(&mut said), Ok(1..)) {
        shorten(&mut said);
    }
    match end {
        Ok(end) if end.is_success() => Ok(()),
        Ok(End::Exited(code)) => Err(WhyNot::Command(format!("exited with status {code}{}", last_lines(&said)))),
        Ok(_) | Err(_) => Err(WhyNot::Command(format!("was killed{}", last_lines(&said)))),
    }
}

/// Keeps the end.
fn shorten(said: &mut Vec<u8>) {
    said.drain(..said.len().saturating_sub(WORDS));
}

/// For the end of a sentence.
fn last_lines(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let last = lines[lines.len().saturating_sub(LINES)..].join(" | ");
    let harmless: String = last.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect();
    if harmless.is_empty() {
        harmless
    } else {
        format!("; it said: {harmless}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ready::Scheme;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    fn context(pids: Vec<i32>) -> Context {
        Context {
            service: "web".to_owned(),
            generation: 1,
            pid: pids[0],
            pids: Arc::new(move || Ok(pids.clone())),
            steering: Arc::new(|_| {}),
            tls: None,
            host: None,
            anybody: false,
            reaper: Reaper::new(),
            timeout: Duration::from_secs(5),
        }
    }

    fn own() -> i32 {
        i32::try_from(std::process::id()).unwrap()
    }

    /// Answers one request with this status line, and closes.
    fn server(status: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
                request.push(byte[0]);
            }
            assert!(request.is_empty() || request.starts_with(b"GET /health?x=1 HTTP/1.1\r\nHost: here\r\n"));
            let _gone = stream.write_all(format!("{status}\r\nContent-Length: 0\r\n\r\n").as_bytes());
        });
        address
    }

    fn http_at(address: SocketAddr) -> Probe {
        Probe::Http(Url { scheme: Scheme::Plain, address, host: "here".to_owned(), path: "/health?x=1".to_owned() })
    }

    #[tokio::test(flavor = "current_thread")]
    async fn two_and_three_hundreds_are_a_yes() {
        for (status, yes) in [
            ("HTTP/1.1 204 No Content", true),
            ("HTTP/1.0 302 Found", true),
            ("HTTP/1.1 503 No", false),
            ("SSH-2.0", false),
        ] {
            let answer = attempt(&http_at(server(status)), &context(vec![own()])).await;
            assert_eq!(answer.is_ok(), yes, "{status}: {answer:?}");
        }
    }

    #[test]
    fn a_command_is_quoted_by_its_last_lines() {
        let mut said = b"first\nsecond\r\n\n  third \x1b[2J\nfourth".to_vec();
        assert_eq!(last_lines(&said), "; it said: second | third \u{fffd}[2J | fourth");
        assert_eq!(last_lines(b" \n"), "");
        said.extend([b'x'; WORDS]);
        shorten(&mut said);
        assert_eq!(said, [b'x'; WORDS]);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn whoever_answers_where_nobody_is_meant() {
        let anybody = Context { anybody: true, ..context(vec![1]) };
        once(&http_at(server("HTTP/1.1 200 OK")), &anybody).await.unwrap();
        let why = once(&http_at(server("HTTP/1.1 503 No")), &anybody).await.unwrap_err().to_string();
        assert!(why.ends_with("answered with status 503"), "{why}");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_answer_by_another_process_is_a_no() {
        let probe = http_at(server("HTTP/1.1 200 OK"));
        let answer = attempt(&probe, &context(vec![1])).await;
        assert!(matches!(answer, Err(WhyNot::Other { .. })), "{answer:?}");
        let answer = attempt(&Probe::Tcp(server("")), &context(vec![1])).await;
        assert!(matches!(answer, Err(WhyNot::Other { .. })), "{answer:?}");
        attempt(&Probe::Tcp(server("")), &context(vec![own()])).await.unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_closed_port_is_a_no_with_its_reason() {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let answer = attempt(&Probe::Tcp(address), &context(vec![own()])).await.unwrap_err().to_string();
        assert!(answer.contains("cannot connect to 127.0.0.1"), "{answer}");
    }
}
