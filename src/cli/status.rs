//! `zddsup status`: the state of a service as tables, as JSON, or as an exit code.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::time::{Duration, SystemTime};

use comfy_table::{presets, Table};
use tokio::time::Instant;

use super::exit::{Exit, Failure};
use super::target::{self, Target};
use super::wait::before;
use super::{text, verdict};
use crate::control::client::Client;
use crate::control::types::{Generation, ServicePhase, Status, UpgradeReport};

/// Which service, and in which form.
#[derive(Debug, Clone, clap::Args)]
pub struct Flags {
    #[command(flatten)]
    target: Target,
    /// As JSON (with --watch: one object a line)
    #[arg(long)]
    json: bool,
    /// Again whenever something happens
    #[arg(short, long, conflicts_with = "ready")]
    watch: bool,
    /// Exit with 0 only when a generation serves, and is to (not in the lame duck time): for readiness probes
    #[arg(long)]
    ready: bool,
}

/// Shows it.
pub fn run(flags: &Flags) -> Result<Exit, Failure> {
    target::block_on(async {
        let client = flags.target.client()?;
        if flags.watch {
            return watch(&client, flags.json).await;
        }
        let status = client.status().await?;
        if flags.json {
            text::print(&json(&status))?;
        } else if flags.ready {
            text::print(&format!("{}\n", headline(&status)))?;
        } else {
            text::print(&tables(&status, SystemTime::now()))?;
        }
        Ok(if flags.ready && !is_ready(&status) { Exit::Failed } else { Exit::Done })
    })
}

/// Whether new connections are to come. In the lame duck time they are served, and are to go elsewhere.
fn is_ready(status: &Status) -> bool {
    status.serving.is_some() && !matches!(status.phase, ServicePhase::LameDuck | ServicePhase::Stopping)
}

/// Draws it anew at each event; on a terminal each second too, for the ages.
async fn watch(client: &Client, json_lines: bool) -> Result<Exit, Failure> {
    let screen = !json_lines && io::stdout().is_terminal();
    let mut events = client.events().await?;
    loop {
        let again = screen.then(|| Instant::now() + Duration::from_secs(1));
        let mut news = before(again, events.next()).await;
        // What comes together is drawn together.
        let together = Instant::now() + Duration::from_millis(50);
        while let Some(event) = news {
            if event?.is_none() {
                return Err(client.ended().into());
            }
            news = before(Some(together), events.next()).await;
        }
        draw(client, json_lines, screen).await?;
    }
}

async fn draw(client: &Client, json_lines: bool, screen: bool) -> Result<(), Failure> {
    let status = client.status().await?;
    let shown = match (json_lines, screen) {
        (true, _) => json(&status),
        // Home, and clear to the end.
        (false, true) => format!("\x1b[H\x1b[J{}", tables(&status, SystemTime::now())),
        (false, false) => format!("{}\n", tables(&status, SystemTime::now())),
    };
    text::print(&shown)
}

fn json(status: &Status) -> String {
    format!("{}\n", serde_json::to_string(status).unwrap_or_default())
}

fn headline(status: &Status) -> String {
    let serving = match status.serving {
        Some(serving) => format!("generation {serving} serves"),
        None => "no generation serves, connections wait".to_owned(),
    };
    format!("{}: {}, {serving}", status.service, status.phase)
}

fn tables(status: &Status, now: SystemTime) -> String {
    let started = SystemTime::UNIX_EPOCH + Duration::from_millis(status.supervisor.started_unix_ms);
    let up = text::span(now.duration_since(started).unwrap_or_default());
    let mut shown = headline(status);
    // Writing to a String cannot fail.
    let _written = writeln!(
        shown,
        "\nzddsup {}, pid {}, up {up}, {}, {} in the store",
        text::harmless(&status.supervisor.version),
        status.supervisor.pid,
        text::count(status.restarts, "restart"),
        text::count(status.stored_fds as u64, "fd"),
    );
    if let Some(pending) = &status.pending {
        let _written = writeln!(shown, "Waiting for its turn: {}", text::harmless(pending));
    }
    let mut table = new_table(&["GENERATION", "PID", "PHASE", "AGE", "CONNECTIONS", "DIGEST", "PROGRAM", "NOTE"]);
    for generation in &status.generations {
        table.add_row(row(generation));
    }
    add(&mut shown, &table);
    if !status.listeners.is_empty() {
        let mut table = new_table(&["LISTENER", "ADDRESS"]);
        for listener in &status.listeners {
            table.add_row([text::harmless(&listener.name), text::harmless(&listener.address)]);
        }
        add(&mut shown, &table);
    }
    if !status.upgrades.is_empty() {
        let mut table = new_table(&["NUMBER", "KIND", "GENERATIONS", "RESULT", "TIMES", "NOTE"]);
        for report in &status.upgrades {
            table.add_row(upgrade_row(report));
        }
        add(&mut shown, &table);
    }
    shown
}

fn row(generation: &Generation) -> [String; 8] {
    let dash = || "-".to_owned();
    let notes = [
        generation.waiting_for.as_ref().map(|why| format!("waiting for {why}")),
        generation.status.clone(),
        generation.end.clone(),
    ];
    let notes: Vec<String> = notes.into_iter().flatten().collect();
    let digest = generation.program.sha256.as_deref().and_then(|digest| digest.get(..12));
    [
        generation.number.to_string(),
        generation.pid.map_or_else(dash, |pid| pid.to_string()),
        generation.phase.to_string(),
        text::span_ms(generation.age_ms),
        generation.connections.map_or_else(dash, |connections| connections.to_string()),
        digest.map_or_else(dash, str::to_owned),
        text::harmless(&generation.program.path.to_string_lossy()).into_owned(),
        text::harmless(&notes.join("; ")).into_owned(),
    ]
}

fn upgrade_row(report: &UpgradeReport) -> [String; 6] {
    let number = |generation: Option<_>| {
        generation.map_or_else(|| "-".to_owned(), |one: crate::core::GenerationId| one.to_string())
    };
    let left = report
        .connections_left
        .filter(|_| !report.retired)
        .map(|left| format!("{} left", text::count(left, "connection")));
    let proof = Some(verdict::proven(&report.proof)).filter(|_| report.retired && report.from.is_some());
    let canary = report.canary.as_ref().filter(|_| report.result.is_none()).map(text::canary);
    let notes: Vec<String> = [report.reason.clone(), canary, left, proof].into_iter().flatten().collect();
    [
        report.id.to_string(),
        report.kind.to_string(),
        format!("{} > {}", number(report.from), number(report.to)),
        report.result.map_or_else(|| "under way".to_owned(), |result| result.to_string()),
        verdict::phase_times(report),
        text::harmless(&notes.join("; ")).into_owned(),
    ]
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.iter().copied());
    table
}

fn add(shown: &mut String, table: &Table) {
    shown.push('\n');
    for line in table.lines() {
        shown.push_str(line.trim());
        shown.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::fixture;
    use crate::control::types::UpgradeResult;

    #[test]
    fn everything_is_in_it_and_nothing_of_it_moves_the_cursor() {
        let mut status = fixture::status();
        status.generations[0].status = Some("busy\x1b[2J\nnow".to_owned());
        status.generations[1].end = Some("exited with status 0".to_owned());
        status.upgrades[0].result = Some(UpgradeResult::Failed);
        status.upgrades[0].reason = Some("was killed by SIGSEGV".to_owned());
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(status.supervisor.started_unix_ms + 61_000);
        let shown = tables(&status, now);
        for part in [
            "web: serving, generation 3 serves",
            "pid 4711, up 1 min 1 s, 0 restarts",
            "abababababab",
            "/srv/web",
            "tcp://127.0.0.1:8080",
            "exited with status 0",
            "3 > 4",
            "was killed by SIGSEGV",
        ] {
            assert!(shown.contains(part), "{part} is not in\n{shown}");
        }
        assert!(!shown.contains('\x1b'));
        assert!(shown.lines().all(|line| line == line.trim()), "{shown}");
    }
}
