//! What the benchmarks share: servers built in the same profile, upgrades by the control API, medians, tables.

#![allow(dead_code)] // Each benchmark uses its own part.

#[path = "../../tests/common/mod.rs"]
pub mod supervised;

pub mod clocked;
pub mod proc;
pub mod servers;

use std::fmt::Display;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use supervised::{Supervisor, PATIENCE, ZDDSUP};
use zddsup::control::client::Client;
use zddsup::control::types::{self as control, Event, Reply, UpgradeReport, UpgradeResult};

/// Builds the servers that are supervised, in the profile of the program: `cargo bench` alone builds no examples.
pub fn build_examples(names: &[&str]) {
    let profile_dir = Path::new(ZDDSUP).parent().expect("a directory");
    let profile = match profile_dir.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(profile) => profile,
    };
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--profile", profile]).current_dir(env!("CARGO_MANIFEST_DIR"));
    cargo.arg("--target-dir").arg(profile_dir.parent().expect("a target directory"));
    for name in names {
        cargo.args(["--example", name]);
    }
    assert!(cargo.status().expect("cargo").success(), "the examples cannot be built");
}

/// Nanoseconds of `CLOCK_MONOTONIC`, which all processes have in common.
#[must_use]
pub fn now_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("a clock");
    u64::try_from(now.tv_sec()).unwrap() * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap()
}

/// An upgrade, timed by the client that asked for it.
#[derive(Debug, Clone)]
pub struct Upgrade {
    /// Before the request was sent.
    pub asked_ns: u64,
    /// When its result had arrived.
    pub result_ns: u64,
    /// What was reported.
    pub report: UpgradeReport,
}

impl Upgrade {
    /// From the request to the result.
    #[must_use]
    pub fn took(&self) -> Duration {
        Duration::from_nanos(self.result_ns - self.asked_ns)
    }
}

/// A client of the control API, in a runtime of its own.
pub struct Control {
    client: Client,
    runtime: tokio::runtime::Runtime,
}

impl Control {
    #[must_use]
    pub fn of(supervisor: &Supervisor) -> Control {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        Control { client: Client::new(supervisor.control()), runtime }
    }

    /// Asks for an upgrade and waits for its result, which must be success.
    #[must_use]
    pub fn upgrade(&self) -> Upgrade {
        self.runtime.block_on(async {
            let mut events = self.client.events().await.expect("events");
            let first = events.next().await.expect("events");
            assert!(matches!(first, Some(Event::Status(_))), "{first:?}");
            let asked_ns = now_ns();
            let reply = self.client.command(control::Command::Upgrade).await.expect("an answer");
            let Reply::Accepted { upgrade } = reply else { panic!("{reply:?}") };
            loop {
                let event = events.next().await.expect("events").expect("a result before the end");
                let Event::Upgrade(report) = event else { continue };
                if report.id == upgrade && report.result.is_some() {
                    let result_ns = now_ns();
                    assert_eq!(report.result, Some(UpgradeResult::Succeeded), "{report:?}");
                    return Upgrade { asked_ns, result_ns, report };
                }
            }
        })
    }
}

/// The value in the middle.
#[must_use]
pub fn median<T: Copy + Ord>(values: &[T]) -> T {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 2]
}

/// Half of the values lie between these two.
#[must_use]
pub fn quartiles<T: Copy + Ord>(values: &[T]) -> [T; 2] {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    [sorted[sorted.len() / 4], sorted[sorted.len() * 3 / 4]]
}

/// In milliseconds.
#[must_use]
pub fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

/// The difference of two times, which may be less than nothing where both are noise.
#[must_use]
pub fn ms_more(one: Duration, other: Duration) -> String {
    format!("{:+.2} ms", (one.as_secs_f64() - other.as_secs_f64()) * 1e3)
}

/// How many times the other.
#[must_use]
pub fn ratio(one: Duration, other: Duration) -> String {
    format!("{:.2}", one.as_secs_f64() / other.as_secs_f64().max(1e-9))
}

/// In MiB, from KiB.
#[must_use]
#[allow(clippy::cast_precision_loss)]
pub fn mib(kib: u64) -> String {
    format!("{:.2} MiB", kib as f64 / 1024.0)
}

/// A table in Markdown, padded to be read as it is.
pub struct Table {
    title: String,
    rows: Vec<Vec<String>>,
}

impl Table {
    #[must_use]
    pub fn new(title: impl Display, header: &[&str]) -> Table {
        Table { title: title.to_string(), rows: vec![header.iter().map(ToString::to_string).collect()] }
    }

    pub fn row(&mut self, cells: &[&dyn Display]) {
        assert_eq!(cells.len(), self.rows[0].len(), "a cell for each column");
        self.rows.push(cells.iter().map(ToString::to_string).collect());
    }

    pub fn print(&self) {
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<_> = (0..self.rows[0].len()).map(width).collect();
        let line = |row: &[String]| {
            let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            format!("| {} |", cells.join(" | "))
        };
        println!("\n{}\n", self.title);
        println!("{}", line(&self.rows[0]));
        println!("|{}|", widths.iter().map(|width| "-".repeat(width + 2)).collect::<Vec<_>>().join("|"));
        for row in &self.rows[1..] {
            println!("{}", line(row));
        }
    }
}

/// Looks again and again for something that nothing reports, and says how long it took.
pub fn until(what: &str, mut is: impl FnMut() -> bool) -> Duration {
    let begin = Instant::now();
    while !is() {
        assert!(begin.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
    begin.elapsed()
}
