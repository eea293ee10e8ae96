//! What shows that a generation can serve, and what does not.

use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use zddsup::control::types::{Generation, Status, UpgradePhase, UpgradeReport, UpgradeResult};

use crate::common::{processes_with, request, wait_for, Supervisor};
use crate::seen::{environ, own_address, reserved_port};
use crate::stage::Stage;

const FAILED: Option<i32> = Some(3);

/// A message to a notify socket from this process, which is of no generation.
fn say_from_outside(socket: &str, text: &[u8]) {
    let address = SocketAddr::from_abstract_name(socket.strip_prefix('@').unwrap()).unwrap();
    UnixDatagram::unbound().unwrap().send_to_addr(text, &address).unwrap();
}

/// The candidate, once it runs.
fn candidate(supervisor: &Supervisor, number: u32) -> Generation {
    let runs = |generation: &Generation| generation.number.0 == number && generation.pid.is_some();
    let status = supervisor.wait_until("the candidate runs", |status| status.generations.iter().any(runs));
    status.generations.into_iter().find(runs).unwrap()
}

/// How long the newest transaction waited for its candidate.
fn waited(report: &UpgradeReport) -> Duration {
    let phases = report.phases.iter().filter(|time| time.phase == UpgradePhase::WaitingReady);
    Duration::from_millis(phases.map(|time| time.ms).sum())
}

fn last_report(supervisor: &Supervisor) -> UpgradeReport {
    supervisor.status().upgrades.into_iter().next().unwrap()
}

/// An upgrade that must fail, and the reason.
#[track_caller]
fn fails(stage: &Stage) -> String {
    let before = stage.serving();
    let output = stage.cli(&["upgrade"]);
    assert_eq!(output.status.code(), FAILED, "{output:?}\n{}", stage.log());
    assert_eq!(stage.serving().pid, before.pid);
    last_report(stage).reason.unwrap()
}

const NOT_OF_IT: &str = "answered by a process that is not of this generation";

/// Whether a generation waits for this.
fn waits_for(status: &Status, what: &str) -> bool {
    let why = status.generations.iter().filter_map(|generation| generation.waiting_for.as_deref());
    why.into_iter().any(|why| why.contains(what))
}

/// The candidate was not ready until it was called off; the one before serves.
#[track_caller]
fn called_off(stage: &Stage) {
    let report = last_report(stage);
    assert_eq!(report.result, None, "{report:?}");
    assert!(stage.cli(&["rollback"]).status.success());
    let cancelled = |report: &UpgradeReport| report.result == Some(UpgradeResult::Cancelled);
    assert_eq!(stage.wait_for_report("it was called off", cancelled).id, report.id);
    assert_eq!(Some(stage.serving().number), report.from);
}

#[test]
fn it_is_ready_when_it_says_so_and_not_before() {
    let stage = Stage::start(&["--ready", "notify"], "--version 1 --ready delay-ms=600");
    let report = last_report(&stage);
    assert!(waited(&report) >= Duration::from_millis(550), "{report:?}");
    assert_eq!(stage.serving().status.as_deref(), Some("version 1"));
}

#[test]
fn an_unrelated_process_cannot_say_it() {
    let stage = Stage::spawn(&["--ready", "notify"], "--version 1 --ready none");
    let pid = candidate(&stage, 1).pid.unwrap();
    say_from_outside(&environ(pid)["NOTIFY_SOCKET"], b"READY=1\nSTATUS=from a stranger\nMAINPID=1");
    let log = stage.wait_for_log("notify message from a process that is not of this generation: ignored");
    assert!(log.contains(&format!("pid={}", std::process::id())), "{log}");
    let status = stage.status();
    assert_eq!((status.serving, status.generations[0].status.as_deref()), (None, None));
    // Its own word counts, also after that.
    let said = request(stage.address(), "/notify?text=READY=1");
    assert!(said.contains("version=1 "), "{said}");
    stage.wait_until("it serves", |status| status.serving.is_some());
}

#[test]
fn a_generation_of_before_cannot_say_it_for_the_next() {
    let stage = Stage::start(&["--ready", "notify"], "--version 1 --also-bind 127.0.0.1:0");
    let first = own_address(&stage.wait_for_log("puppet: listens on "));
    stage.next("--version 2 --ready none");
    stage.signal(Signal::SIGHUP);
    let second = candidate(&stage, 2).pid.unwrap();
    // By its own socket, which is about itself; and by the new one's.
    assert!(request(first, "/notify?text=READY=1").contains("version=1 "));
    let socket = environ(second)["NOTIFY_SOCKET"].replace('@', "%40").replace('/', "%2F");
    assert!(request(first, &format!("/notify?text=READY=1&socket={socket}")).contains("version=1 "));
    stage.wait_for_log("notify message from a process that is not of this generation: ignored");
    let status = stage.status();
    assert_eq!(status.serving.unwrap().0, 1);
    assert_eq!(status.upgrades[0].result, None, "{:?}", status.upgrades[0]);
}

#[test]
fn a_child_of_the_generation_can_say_it() {
    for _ in 0..5 {
        let stage = Stage::start(&["--ready", "notify", "--start-timeout", "20s"], "--version 1 --ready child");
        assert!(!stage.log().contains("ignored"), "{}", stage.log());
    }
}

#[test]
fn a_daemon_names_its_main_process() {
    let stage = Stage::start(&["--ready", "notify"], "--version 1 --daemonize");
    let log = stage.wait_for_log("has a new main process");
    let first: i32 = log.split("started generation=1 pid=").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    let daemon = stage.serving().pid.unwrap();
    assert_ne!(daemon, first);
    assert!(request(stage.address(), "/").contains(&format!("pid={daemon} ")));
    wait_for("the first process is gone", || !std::path::Path::new(&format!("/proc/{first}")).exists());
    // The daemon is what an upgrade drains …
    stage.next("--version 2 --daemonize");
    let output = stage.cli(&["upgrade", "--wait"]);
    assert!(output.status.success(), "{output:?}\n{}", stage.log());
    assert!(request(stage.address(), "/").contains("version=2 "));
    assert!(!processes_with("ZDDSUP_GENERATION=1\0").contains(&daemon));
    // … and whose end counts.
    kill(Pid::from_raw(stage.serving().pid.unwrap()), Signal::SIGKILL).unwrap();
    stage.wait_until("it was started again", |status| status.serving.is_some_and(|serving| serving.0 == 3));
    assert!(request(stage.address(), "/").contains("version=2 "));
}

#[test]
fn more_time_can_be_asked_for() {
    let flags = ["--ready", "notify", "--start-timeout", "4s"];
    let stage = Stage::start(&flags, "--version 1");
    stage.next("--version 2 --ready delay-ms=6000");
    assert!(fails(&stage).contains("not ready within 4s"));
    stage.wait_settled();
    stage.next("--version 3 --notify-raw EXTEND_TIMEOUT_USEC=60000000 --ready delay-ms=6000");
    stage.upgrade();
    assert!(waited(&last_report(&stage)) >= Duration::from_secs(5));
}

#[test]
fn what_a_failing_version_said_is_in_the_report() {
    let stage = Stage::start(&["--ready", "notify"], "--version 1");
    stage.next("--version 2 --notify-raw STATUS=no-database\\nERRNO=111 --ready none --exit-after-ms 200:5");
    let reason = fails(&stage);
    for word in ["exited with status 5", "no-database", "Connection refused"] {
        assert!(reason.contains(word), "{word} is not in {reason}");
    }
}

#[test]
fn a_barrier_is_closed_when_all_before_it_was_taken() {
    let stage = Stage::start(&["--ready", "notify"], "--version 1");
    for number in 0..20 {
        let answer = request(stage.address(), &format!("/barrier?text=STATUS=step-{number}"));
        assert!(answer.contains("version=1 "), "{answer}");
        assert_eq!(stage.serving().status, Some(format!("step-{number}")));
    }
}

#[test]
fn a_tcp_probe_asks_the_new_process() {
    let (_held, address) = reserved_port();
    let ready = format!("tcp:{}", address.port());
    let both = format!("--also-bind {address}");
    let stage = Stage::start(&["--ready", &ready], &format!("--version 1 {both}"));
    stage.next(&format!("--version 2 {both}"));
    stage.upgrade();
    stage.wait_settled();
    // The port answers, but it is the old generation's.
    stage.next("--version 3");
    stage.signal(Signal::SIGHUP);
    stage.wait_until("the old one was asked", |status| waits_for(status, NOT_OF_IT));
    called_off(&stage);
}

#[test]
fn an_http_probe_waits_for_a_good_answer_of_the_new_process() {
    let (_held, address) = reserved_port();
    let ready = format!("http://{address}/health");
    let both = format!("--also-bind {address}");
    let stage = Stage::start(&["--ready", &ready], &format!("--version 1 {both}"));
    stage.next(&format!("--version 2 --healthy-after-ms 1000 {both}"));
    stage.upgrade();
    assert!(waited(&last_report(&stage)) >= Duration::from_millis(900));
    stage.wait_settled();
    // Both listen on the port, the old one is well, and half of the connections are its own: neither answer counts.
    stage.next(&format!("--version 3 --healthy-after-ms 3600000 {both}"));
    stage.signal(Signal::SIGHUP);
    stage.wait_until("the new one was asked", |status| waits_for(status, "answered with status 503"));
    stage.wait_until("the old one was asked", |status| waits_for(status, NOT_OF_IT));
    called_off(&stage);
    assert!(request(stage.address(), "/").contains("version=2 "));
}

#[test]
fn a_command_is_asked_until_it_succeeds() {
    let stage =
        Stage::spawn(&["--ready", "exec:test -e ready-$ZDDSUP_GENERATION && kill -0 $ZDDSUP_PID"], "--version 1");
    stage.wait_until("the status says why it waits", |status| waits_for(status, "the command exited with status 1"));
    assert_eq!(stage.status().serving, None);
    std::fs::File::create(stage.dir.path().join("ready-1")).unwrap().write_all(b"").unwrap();
    stage.wait_until("it serves", |status| status.serving.is_some());
}

#[test]
fn a_delay_passes_first() {
    let stage = Stage::start(&["--ready", "delay:700ms"], "--version 1");
    assert!(waited(&last_report(&stage)) >= Duration::from_millis(700));
}

#[test]
fn one_that_never_says_anything_is_ready_after_a_second() {
    let supervisor = Supervisor::start(["--", "sleep", "1000"]);
    assert!(waited(&last_report(&supervisor)) >= Duration::from_secs(1));
    supervisor.wait_for_log("said nothing: taken as ready");
}

#[test]
fn one_that_spoke_once_has_to_speak() {
    let stage = Stage::start(&["--start-timeout", "5s"], "--version 1");
    // However slow this machine is: it was heard.
    stage.wait_until("it spoke", |status| status.generations[0].status.as_deref() == Some("version 1"));
    stage.next("--version 2 --ready none");
    assert!(fails(&stage).contains("not ready within 5s"));
}

#[test]
fn a_probe_of_a_shared_listener_is_refused() {
    let (_held, address) = reserved_port();
    for ready in [format!("tcp:{}", address.port()), format!("http://{address}/health")] {
        let listen = address.to_string();
        let mut supervisor =
            crate::common::Setup::new(["--listen", &listen, "--ready", &ready, "--", "sleep", "9"]).spawn();
        assert_eq!(supervisor.wait().code(), Some(2));
        supervisor.wait_for_log("the old one may answer");
    }
}
