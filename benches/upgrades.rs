//! What upgrades cost those who ask the service, and what zddsup adds to the start of the server itself.
//!
//! `cargo bench --bench upgrades`; `UPGRADES=5` makes it shorter.

mod common;

use std::net::TcpListener;
use std::process::Command;
use std::time::Duration;

use common::clocked::{self, Bare, Ear, CLOCK_VAR};
use common::supervised::load::{Config, Load, Mode, Summary, Target};
use common::supervised::{example, Setup, Supervisor, PATIENCE};
use common::{median, ms, ms_more, now_ns, quartiles, ratio, Control, Table};

/// Before each upgrade, so that all phases of the load are met.
const BETWEEN: Duration = Duration::from_millis(100);

fn main() {
    clocked::be_server_if_told();
    common::build_examples(&["axum_hello", "puppet"]);
    let upgrades = std::env::var("UPGRADES").ok().and_then(|count| count.parse().ok()).unwrap_or(20);
    println!("# Upgrades");
    under_load(upgrades);
    added(upgrades);
    moments(upgrades);
}

fn servers() -> [(&'static str, Vec<String>); 2] {
    let path = |name| example(name).display().to_string();
    [
        ("axum_hello", vec![path("axum_hello"), "{generation}".to_owned()]),
        ("puppet", vec![path("puppet"), "--version".to_owned(), "{generation}".to_owned()]),
    ]
}

fn supervise(command: &[String]) -> Supervisor {
    let args = ["--listen", "http=127.0.0.1:0", "--"].iter().map(ToString::to_string);
    Supervisor::start(args.chain(command.iter().cloned()))
}

fn under_load(upgrades: usize) {
    let title = format!("Under load: {upgrades} upgrades, then the same server as long without any");
    let mut table = Table::new(
        title,
        &["server", "load", "upgrades", "requests", "failed", "longest gap", "of one client", "p50", "p99", "longest"],
    );
    let mut ratios =
        Table::new("With upgrades to without, of the table above", &["server", "load", "gap", "of one client", "p99"]);
    for (name, command) in servers() {
        for mode in [Mode::PerRequest, Mode::KeepAlive] {
            let supervisor = supervise(&command);
            let config =
                Config { mode, limit: Duration::from_secs(600), ..Config::new(Target::Tcp(supervisor.address())) };
            let with = upgraded(&supervisor, config.clone(), upgrades);
            supervisor.wait_settled();
            let without = quiet(config, with.elapsed);
            let load = match mode {
                Mode::PerRequest => "a connection per request",
                Mode::KeepAlive => "keep-alive",
            };
            for (summary, count) in [(&with, upgrades), (&without, 0)] {
                table.row(&[
                    &name,
                    &load,
                    &count,
                    &summary.requests(),
                    &summary.failed(),
                    &ms(summary.longest_gap),
                    &ms(of_one(summary)),
                    &ms(summary.latency.percentile(50)),
                    &ms(summary.latency.percentile(99)),
                    &ms(summary.latency.max()),
                ]);
                for message in &summary.messages {
                    println!("{name}, {load}: {message}");
                }
            }
            let times = |of: fn(&Summary) -> Duration| ratio(of(&with), of(&without));
            let p99 = times(|summary| summary.latency.percentile(99));
            ratios.row(&[&name, &load, &times(|summary| summary.longest_gap), &times(of_one), &p99]);
        }
    }
    table.print();
    ratios.print();
}

fn of_one(summary: &Summary) -> Duration {
    summary.worker_gaps.iter().max().copied().unwrap_or_default()
}

fn upgraded(supervisor: &Supervisor, config: Config, upgrades: usize) -> Summary {
    let control = Control::of(supervisor);
    let load = Load::start(config);
    for _ in 0..upgrades {
        std::thread::sleep(BETWEEN);
        let to = control.upgrade().report.to.expect("a generation");
        // As the servers say it: the puppet a bare number, axum_hello in its line.
        let (bare, in_line) = (to.to_string(), format!("version {to},"));
        let is_new = |version: &str| version == bare || version.starts_with(&in_line);
        let seen = load.wait(PATIENCE, |summary| summary.versions.iter().any(|(version, _)| is_new(version)));
        assert!(seen, "the new generation never answered: {}", load.so_far());
    }
    load.stop()
}

fn quiet(config: Config, long: Duration) -> Summary {
    let load = Load::start(config);
    std::thread::sleep(long);
    load.stop()
}

/// What zddsup adds to a server's own start, by turns.
fn added(upgrades: usize) {
    let mut table = Table::new(
        format!("Added to the server's own start, medians of {upgrades}, taken in turn"),
        &["server", "bare: execve to READY=1", "request to result", "added", "half of the results"],
    );
    for (name, command) in servers() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut ear = Ear::new(dir.path());
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let bare_command: Vec<_> = command.iter().map(|arg| arg.replace("{generation}", "1")).collect();
        let supervisor = supervise(&command);
        let control = Control::of(&supervisor);
        let (mut bare, mut whole) = (Vec::new(), Vec::new());
        for _ in 0..upgrades {
            bare.push(Bare::start(dir.path(), &mut ear, &listener, &bare_command).start);
            whole.push(control.upgrade().took());
            supervisor.wait_settled();
        }
        let [low, high] = quartiles(&whole);
        let (bare, whole) = (median(&bare), median(&whole));
        table.row(&[&name, &ms(bare), &ms(whole), &ms_more(whole, bare), &format!("{} to {}", ms(low), ms(high))]);
    }
    table.print();
}

/// When what happens in an upgrade, told by a server that does nothing but look at the clock.
fn moments(upgrades: usize) {
    let own = std::env::current_exe().expect("its own path").display().to_string();
    let dir = tempfile::tempdir().expect("a directory");
    let mut ear = Ear::new(dir.path());
    let mut setup = Setup::new(["--listen", "127.0.0.1:0", "--", &own, "--clocked"]);
    setup.command().env(CLOCK_VAR, &ear.path);
    let supervisor = setup.start();
    let control = Control::of(&supervisor);
    let mut old = ear.hear("main", |_| true).pid;
    let [mut bare, mut to_main, mut to_term, mut to_result] = [const { Vec::new() }; 4];
    for _ in 0..upgrades {
        let begin = now_ns();
        let mut child = Command::new(&own).arg("--clocked").env(CLOCK_VAR, &ear.path).spawn().expect("itself");
        let pid = i32::try_from(child.id()).unwrap();
        bare.push(Duration::from_nanos(ear.hear("main", |said| said.pid == pid).at_ns - begin));
        child.kill().expect("it waits for that");
        child.wait().expect("its end");

        let upgrade = control.upgrade();
        let main = ear.hear("main", |said| said.pid != pid);
        let ready = ear.hear("ready", |said| said.pid == main.pid);
        let term = ear.hear("term", |said| said.pid == old);
        to_main.push(Duration::from_nanos(main.at_ns - upgrade.asked_ns));
        to_term.push(Duration::from_nanos(term.at_ns - ready.at_ns));
        to_result.push(Duration::from_nanos(upgrade.result_ns - ready.at_ns));
        old = main.pid;
        supervisor.wait_settled();
    }
    let mut table = Table::new(
        format!("Within an upgrade, medians of {upgrades}, with a server that is ready at once"),
        &["from", "to", "median", "half of them"],
    );
    for (from, to, times) in [
        ("spawn by the benchmark itself", "main of the server", &bare),
        ("request at the control socket", "main of the new generation", &to_main),
        ("READY=1 is sent", "the old generation has its TERM: switched", &to_term),
        ("READY=1 is sent", "the client has the result", &to_result),
    ] {
        let [low, high] = quartiles(times);
        table.row(&[&from, &to, &ms(median(times)), &format!("{} to {}", ms(low), ms(high))]);
    }
    table.print();
    println!("\nadded from the request to main: {}", ms_more(median(&to_main), median(&bare)));
}
