//! A load generator that hides nothing: no request is sent twice, and whatever is not an answer is a failure.
//!
//! Included by `#[path]` where it is needed: tests, benchmarks, `examples/load.rs`. Plain threads and blocking sockets,
//! so that a test needs no runtime. The HTTP/1.1 is written by hand because client libraries repeat a request whose
//! connection was closed, which is just what is to be seen here.
//!
//! ```ignore
//! let load = Load::start(Config::new(Target::Tcp(address)));
//! upgrade();
//! assert!(load.saw("2", Duration::from_secs(5)));
//! load.stop().assert_clean();
//! ```
#![allow(dead_code)] // Each that includes it uses a part.

#[path = "load/http.rs"]
mod http;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use http::Connection;
pub use http::{Exchange, Target};

/// Failures of which the text is kept.
const MESSAGES: usize = 10;
/// After a failure, so that a dead server is not asked a million times.
const AFTER_FAILURE: Duration = Duration::from_millis(10);

/// How connections are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// A connection for each request.
    PerRequest,
    /// A connection is used until the server says `Connection: close`. One that it closes without a word has failed
    /// the request that comes next.
    KeepAlive,
}

/// What to send, and how much of it.
#[derive(Debug, Clone)]
pub struct Config {
    pub target: Target,
    pub mode: Mode,
    /// After so many answers, a connection is closed by this side.
    pub per_connection: u64,
    pub path: String,
    /// In the place of HTTP.
    pub exchange: Option<Exchange>,
    pub workers: usize,
    /// Each worker's rest between an answer and its next request.
    pub pause: Duration,
    /// For each step of a request: connecting, writing, each read.
    pub timeout: Duration,
    /// It stops by itself then.
    pub limit: Duration,
}

impl Config {
    /// Four workers, a connection per request, about 3,000 requests a second at most, for a minute at most.
    pub fn new(target: Target) -> Config {
        Config {
            target,
            mode: Mode::PerRequest,
            per_connection: u64::MAX,
            path: "/".to_owned(),
            exchange: None,
            workers: 4,
            pause: Duration::from_millis(1),
            timeout: Duration::from_secs(10),
            limit: Duration::from_secs(60),
        }
    }

    /// The same on connections that are used again.
    pub fn keep_alive(self) -> Config {
        Config { mode: Mode::KeepAlive, ..self }
    }
}

/// What went wrong with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    /// Nobody listens.
    Refused,
    /// The connection was reset.
    Reset,
    /// The connection ended before the answer did.
    Eof,
    /// No answer in time.
    Timeout,
    /// An answer other than 2xx.
    BadStatus,
    /// No HTTP.
    Malformed,
    /// This side ran out of something.
    Local,
}

/// What was seen, so far or in all.
#[derive(Debug, Clone, Default)]
pub struct Summary {
    /// Requests that were answered.
    pub answered: u64,
    /// Those that were not.
    pub failures: BTreeMap<Failure, u64>,
    /// The first few of them in words.
    pub messages: Vec<String>,
    /// Connections that were made.
    pub connections: u64,
    /// Versions that answered, in the order of their first answer.
    pub versions: Vec<(String, u64)>,
    /// Longest time without an answer for any worker.
    pub longest_gap: Duration,
    /// Longest time without an answer, of each worker.
    pub worker_gaps: Vec<Duration>,
    /// Time from the request (with its connection) to the whole answer.
    pub latency: Latency,
    /// How long it has run.
    pub elapsed: Duration,
}

impl Summary {
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }

    pub fn requests(&self) -> u64 {
        self.answered + self.failed()
    }

    /// Answers of one version.
    pub fn of(&self, version: &str) -> u64 {
        self.versions.iter().find(|(seen, _)| seen == version).map_or(0, |(_, count)| *count)
    }

    /// Versions in the order of their first answer.
    pub fn order(&self) -> Vec<&str> {
        self.versions.iter().map(|(version, _)| version.as_str()).collect()
    }

    /// Panics unless there were requests and each was answered.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert!(self.answered > 0, "nothing was asked: {self}");
        assert_eq!(self.failed(), 0, "{self}");
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} requests on {} connections in {:.1?}: {} failed",
            self.requests(),
            self.connections,
            self.elapsed,
            self.failed(),
        )?;
        for (failure, count) in &self.failures {
            writeln!(f, "  {failure:?}: {count}")?;
        }
        for message in &self.messages {
            writeln!(f, "  {message}")?;
        }
        let versions: Vec<_> = self.versions.iter().map(|(version, count)| format!("{version} ({count})")).collect();
        writeln!(f, "answered by version {}", versions.join(", "))?;
        let worst = self.worker_gaps.iter().max().copied().unwrap_or_default();
        writeln!(f, "longest gap {:.1?}, of one worker {worst:.1?}", self.longest_gap)?;
        write!(f, "latency {}", self.latency)
    }
}

/// Latencies in buckets that are exact to 0.4 %.
#[derive(Debug, Clone)]
pub struct Latency {
    buckets: Vec<u64>,
    max: Duration,
}

impl Default for Latency {
    fn default() -> Self {
        Latency { buckets: vec![0; 256 * 57], max: Duration::ZERO }
    }
}

impl Latency {
    fn add(&mut self, latency: Duration) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        let bucket = match ns.checked_ilog2() {
            Some(power @ 8..) => usize::try_from(u64::from(power - 7) * 256 + ((ns >> (power - 8)) & 255)),
            _ => usize::try_from(ns),
        };
        self.buckets[bucket.unwrap_or_default()] += 1;
        self.max = self.max.max(latency);
    }

    /// So many percent of the requests took no longer.
    pub fn percentile(&self, percent: u64) -> Duration {
        self.per_mille(percent * 10)
    }

    /// So many of a thousand requests took no longer.
    pub fn per_mille(&self, per_mille: u64) -> Duration {
        let rank = self.buckets.iter().sum::<u64>() * per_mille / 1000;
        let mut passed = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            passed += count;
            if passed > rank {
                let (power, part) = (bucket as u64 / 256, bucket as u64 % 256);
                let ns = if power == 0 { part } else { (256 + part) << (power - 1) };
                return Duration::from_nanos(ns);
            }
        }
        self.max
    }

    pub fn max(&self) -> Duration {
        self.max
    }
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [half, most, nearly_all] = [50, 90, 99].map(|percent| self.percentile(percent));
        write!(f, "p50 {half:.1?}, p90 {most:.1?}, p99 {nearly_all:.1?}, max {:.1?}", self.max)
    }
}

/// Requests under way, until it is stopped or dropped.
pub struct Load {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    config: Config,
    begin: Instant,
    tally: Mutex<Tally>,
    changed: Condvar,
}

struct Tally {
    stop: bool,
    summary: Summary,
    last: Instant,
    last_of: Vec<Instant>,
}

impl Shared {
    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Load {
    /// Begins.
    pub fn start(config: Config) -> Load {
        let begin = Instant::now();
        let workers = config.workers;
        let summary = Summary { worker_gaps: vec![Duration::ZERO; workers], ..Summary::default() };
        let tally = Tally { stop: false, summary, last: begin, last_of: vec![begin; workers] };
        let shared = Arc::new(Shared { config, begin, tally: Mutex::new(tally), changed: Condvar::new() });
        let spawn = |worker| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || shared.work(worker))
        };
        let workers = (0..workers).map(spawn).collect();
        Load { shared, workers }
    }

    /// What was seen so far.
    pub fn so_far(&self) -> Summary {
        let now = Instant::now();
        let mut tally = self.shared.tally();
        // A gap that has not ended is one.
        tally.note_gaps(now);
        Summary { elapsed: now - self.shared.begin, ..tally.summary.clone() }
    }

    /// Waits until what was seen is as wished; false when that does not come in time.
    pub fn wait(&self, within: Duration, wished: impl Fn(&Summary) -> bool) -> bool {
        let tally = self.shared.tally();
        let waited = self.shared.changed.wait_timeout_while(tally, within, |tally| !wished(&tally.summary));
        let (tally, _) = waited.unwrap_or_else(PoisonError::into_inner);
        wished(&tally.summary)
    }

    /// Waits until this version has answered.
    pub fn saw(&self, version: &str, within: Duration) -> bool {
        self.wait(within, |summary| summary.of(version) > 0)
    }

    /// Waits for so many more answers.
    pub fn more(&self, answers: u64, within: Duration) -> bool {
        let before = self.shared.tally().summary.answered;
        self.wait(within, |summary| summary.answered >= before + answers)
    }

    /// Ends with the requests that are under way.
    pub fn stop(mut self) -> Summary {
        self.shared.tally().stop = true;
        for worker in self.workers.drain(..) {
            worker.join().expect("a worker does not panic");
        }
        self.so_far()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.tally().stop = true;
    }
}

impl Tally {
    fn note_gaps(&mut self, now: Instant) {
        if self.stop && self.summary.requests() > 0 {
            return;
        }
        self.summary.longest_gap = self.summary.longest_gap.max(now.saturating_duration_since(self.last));
        for (gap, last) in self.summary.worker_gaps.iter_mut().zip(&self.last_of) {
            *gap = (*gap).max(now.saturating_duration_since(*last));
        }
    }

    fn answered(&mut self, worker: usize, begin: Instant, version: String) {
        let now = Instant::now();
        let summary = &mut self.summary;
        summary.answered += 1;
        summary.latency.add(now - begin);
        match summary.versions.iter_mut().find(|(seen, _)| *seen == version) {
            Some((_, count)) => *count += 1,
            None => summary.versions.push((version, 1)),
        }
        summary.longest_gap = summary.longest_gap.max(now.saturating_duration_since(self.last));
        let gap = &mut summary.worker_gaps[worker];
        *gap = (*gap).max(now.saturating_duration_since(self.last_of[worker]));
        self.last = now;
        self.last_of[worker] = now;
    }

    fn failed(&mut self, after: Duration, failure: Failure, why: &str) {
        *self.summary.failures.entry(failure).or_default() += 1;
        if self.summary.messages.len() < MESSAGES {
            self.summary.messages.push(format!("after {after:.3?}: {failure:?}: {why}"));
        }
    }
}

impl Shared {
    fn work(&self, worker: usize) {
        let mut connection = None;
        while self.begin.elapsed() < self.config.limit && !self.tally().stop {
            let begin = Instant::now();
            let mut rest = self.config.pause;
            match self.ask(&mut connection) {
                Ok(version) => self.tally().answered(worker, begin, version),
                Err((failure, why)) => {
                    connection = None;
                    rest = rest.max(AFTER_FAILURE);
                    self.tally().failed(self.begin.elapsed(), failure, &why);
                }
            }
            self.changed.notify_all();
            if !rest.is_zero() {
                std::thread::sleep(rest);
            }
        }
    }

    /// One request. The connection stays in its place if the next one may use it.
    fn ask(&self, kept: &mut Option<Connection>) -> Result<String, (Failure, String)> {
        let used = kept.is_some();
        let mut connection = if let Some(connection) = kept.take() {
            connection
        } else {
            self.tally().summary.connections += 1;
            let made = Connection::new(&self.config.target, self.config.timeout);
            made.map_err(|error| classify(&error, "connect"))?
        };
        let close = self.config.mode == Mode::PerRequest;
        let answer = match &self.config.exchange {
            Some(exchange) => connection.exchange(exchange),
            None => connection.ask(&self.config.path, close),
        };
        let answer = answer.map_err(|error| {
            classify(&error, if used { "on a connection that was used before" } else { "on a new connection" })
        })?;
        if !(200..300).contains(&answer.status) {
            return Err((Failure::BadStatus, format!("status {}: {}", answer.status, version(&answer.body))));
        }
        if !close && answer.keep_alive && connection.answers < self.config.per_connection {
            *kept = Some(connection);
        }
        Ok(version(&answer.body))
    }
}

fn classify(error: &io::Error, step: &str) -> (Failure, String) {
    let failure = match error.kind() {
        ErrorKind::ConnectionRefused | ErrorKind::NotFound => Failure::Refused,
        ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe => Failure::Reset,
        ErrorKind::UnexpectedEof => Failure::Eof,
        ErrorKind::TimedOut | ErrorKind::WouldBlock => Failure::Timeout,
        ErrorKind::InvalidData => Failure::Malformed,
        _ => Failure::Local,
    };
    (failure, format!("{step}: {error}"))
}

/// What follows `version=` in an answer, or its first line.
fn version(body: &str) -> String {
    let named = body.split_once("version=").and_then(|(_, rest)| rest.split_whitespace().next());
    let whole = || body.lines().next().unwrap_or_default().chars().take(80).collect();
    named.map_or_else(whole, str::to_owned)
}
