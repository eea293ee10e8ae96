//! `--switch steered`: each generation has a socket of its own at what `--listen` says.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use zddsup::control::types::{GenerationPhase, ServicePhase, Status, UpgradeResult};

use crate::common::load::{Config, Load, Target};
use crate::common::real::installed;
use crate::common::{example, puppet, request, try_request, Setup, Supervisor, PATIENCE};
use crate::stage::{clean, Stage};

const STEERED: [&str; 2] = ["--switch", "steered"];

fn start(flags: &[&str], puppet_flags: &str) -> Stage {
    Stage::start(&[&STEERED, flags].concat(), puppet_flags)
}

#[test]
fn five_upgrades_under_load() {
    let stage = start(&[], "--version 1");
    let loads = [stage.load(), stage.keep_alive_load()];
    for version in 2..=6 {
        stage.next(&format!("--version {version}"));
        stage.upgrade();
        for load in &loads {
            assert!(load.saw(&version.to_string(), PATIENCE), "{}\n{}", load.so_far(), stage.log());
        }
    }
    for summary in clean(loads) {
        assert_eq!(summary.order(), ["1", "2", "3", "4", "5", "6"], "{summary}");
    }
    stage.wait_settled();
    assert_eq!(stage.status().listeners.len(), 1);
}

#[test]
fn by_the_handoff_socket_too() {
    let hello = example("axum_hello").into_os_string().into_string().unwrap();
    let args =
        ["--listen", "127.0.0.1:0", "--handoff", "socket", "--switch", "steered", "--ready", "notify", "--", &hello];
    let supervisor = Supervisor::start(args.iter().chain(&["v"]));
    let target = || Config { workers: 2, ..Config::new(Target::Tcp(supervisor.address())) };
    let loads = [Load::start(target()), Load::start(target().keep_alive())];
    for _ in 0..3 {
        supervisor.upgrade();
        assert!(loads.iter().all(|load| load.more(20, PATIENCE)), "{}", supervisor.log());
    }
    clean(loads);
}

#[test]
fn one_that_accepts_before_it_is_ready_gets_nothing() {
    let stage = start(&["--ready", "notify", "--start-timeout", "2s"], "--version 1");
    let loads = [stage.load(), stage.keep_alive_load()];
    stage.next("--version 2 --ready none");
    assert_eq!(stage.cli(&["upgrade"]).status.code(), Some(3));
    stage.wait_settled();
    for load in &loads {
        assert!(load.more(20, PATIENCE));
    }
    for summary in clean(loads) {
        assert_eq!(summary.order(), ["1"], "{summary}");
    }
}

#[test]
fn one_that_does_not_stop_accepting_gets_nothing_new() {
    let stage = start(&["--drain-timeout", "2s", "--stop-timeout", "1s"], "--version 1 --ignore-term");
    let load = stage.load();
    stage.next("--version 2");
    stage.upgrade();
    assert!(stage.status().generations.iter().any(|old| old.number.0 == 1 && old.phase != GenerationPhase::Retired));
    for _ in 0..100 {
        assert!(request(stage.address(), "/").contains("version=2 "));
    }
    stage.wait_settled();
    let summary = load.stop();
    summary.assert_clean();
    assert_eq!(summary.order(), ["1", "2"], "{summary}");
}

#[test]
fn a_drain_can_be_observed() {
    // It ends at TERM whatever it has.
    let stage = start(&["--drain", "observe"], "--version 1 --ready notify");
    let mut client = TcpStream::connect(stage.address()).unwrap();
    let mut ask = || {
        client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut answer = [0; 4096];
        let read = client.read(&mut answer).unwrap();
        String::from_utf8_lossy(&answer[..read]).into_owned()
    };
    assert!(ask().contains("version=1 "));
    stage.next("--version 2");
    stage.upgrade();
    let draining = |status: &Status| {
        status.generations.iter().any(|old| old.phase == GenerationPhase::Draining && old.connections == Some(1))
    };
    stage.wait_until("its connection is seen", draining);
    assert!(ask().contains("version=1 "));
    assert!(!ask().contains("Connection: close"), "it was told to stop");
    drop(client);
    stage.wait_settled();
}

#[test]
fn a_probe_asks_the_new_one_on_the_production_port() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let script = dir.path().join("script");
    let (_held, address) = crate::seen::reserved_port();
    let (puppet, path, address) = (puppet(), script.display().to_string(), address.to_string());
    std::fs::write(&script, "--version 1\n").unwrap();
    let ready = format!("http://{address}/health");
    let args = ["--listen", &address, "--switch", "steered", "--ready", &ready, "--", &puppet, "--script", &path];
    let supervisor = Setup::within(dir, args).start();
    let load = Load::start(Config { workers: 2, ..Config::new(Target::Tcp(supervisor.address())) });
    std::fs::write(&script, "--version 2\n--healthy-after-ms 3600000\n").unwrap();
    supervisor.signal(Signal::SIGHUP);
    let says_503 = |status: &Status| {
        let mut why = status.generations.iter().filter_map(|generation| generation.waiting_for.as_deref());
        why.any(|why| why.contains("answered with status 503"))
    };
    supervisor.wait_until("the new one was asked", says_503);
    assert!(supervisor.cli(&["rollback"]).status.success());
    supervisor.wait_for_report("it was called off", |report| report.result == Some(UpgradeResult::Cancelled));
    supervisor.wait_settled();
    // The other way round: the old one's bad answer counts for nothing either.
    assert!(request(supervisor.address(), "/sicken").contains("version=1 "));
    std::fs::write(&script, "--version 3\n").unwrap();
    supervisor.upgrade();
    assert!(load.saw("3", PATIENCE));
    let summary = load.stop();
    summary.assert_clean();
    assert_eq!(summary.order(), ["1", "3"], "{summary}");
}

#[test]
fn what_waits_for_a_dead_one_is_answered_by_the_next() {
    let stage = start(&[], "--version 1 --nonblocking");
    // Its socket is the second one, not the first.
    stage.next("--version 2 --nonblocking");
    stage.upgrade();
    stage.wait_settled();
    let address = stage.address();
    assert!(try_request(address, "/hang").is_ok());
    let mut waiting: Vec<_> = (0..30).map(|_| TcpStream::connect(address).unwrap()).collect();
    for client in &mut waiting {
        client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    }
    // Had it O_NONBLOCK still, this one would give up.
    stage.next("--version 3 --strict-blocking");
    kill(Pid::from_raw(stage.serving().pid.unwrap()), Signal::SIGKILL).unwrap();
    for mut client in waiting {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("version=3 "), "{answer:?}\n{}", stage.log());
    }
    assert!(request(address, "/").contains("version=3 "));
}

#[test]
fn with_nobody_alive_connections_wait() {
    let stage = start(&["--restart-limit", "infinity"], "--version 1");
    let address = stage.address();
    // Several starts fail before one succeeds.
    stage.next("--version 2 --exit-before-ready 1");
    kill(Pid::from_raw(stage.serving().pid.unwrap()), Signal::SIGKILL).unwrap();
    stage.wait_until("nobody serves", |status| status.serving.is_none() && status.restarts > 1);
    let mut client = TcpStream::connect(address).unwrap();
    client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    stage.wait_until("it was tried again", |status| status.restarts > 3);
    stage.next("--version 3");
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("version=3 "), "{answer:?}\n{}", stage.log());
}

#[test]
fn one_that_starts_while_the_old_one_dies_gets_what_comes() {
    let stage = start(&["--ready", "notify"], "--version 1");
    let address = stage.address();
    let first = stage.serving().pid.unwrap();
    stage.next("--version 2 --ready delay-ms=1500");
    stage.signal(Signal::SIGHUP);
    stage.wait_until("the new one runs", |status| {
        status.generations.iter().any(|generation| generation.number.0 == 2 && generation.pid.is_some())
    });
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    stage.wait_until("nobody serves, or the new one", |status| status.serving.is_none_or(|serving| serving.0 == 2));
    for _ in 0..20 {
        assert!(request(address, "/").contains("version=2 "));
    }
    stage.wait_settled();
    assert!(!stage.log().contains("are reset"), "{}", stage.log());
}

#[test]
fn both_versions_of_ip_are_steered() {
    let stage =
        Stage::start_on(":0", &["--switch", "steered", "--ready", "notify", "--start-timeout", "2s"], "--version 1");
    let port: u16 = stage.status().listeners[0].address.rsplit(':').next().unwrap().parse().unwrap();
    let answers = |version: &str| {
        for ip in [std::net::IpAddr::from([127, 0, 0, 1]), "::1".parse().unwrap()] {
            for _ in 0..20 {
                let answer = request((ip, port).into(), "/");
                assert!(answer.contains(version), "{ip}: {answer}");
            }
        }
    };
    answers("version=1 ");
    stage.next("--version 2 --ready none");
    stage.signal(Signal::SIGHUP);
    stage.wait_until("the new one runs", |status| {
        status.generations.iter().any(|generation| generation.number.0 == 2 && generation.pid.is_some())
    });
    answers("version=1 ");
    stage.wait_for_report("it failed", |report| report.result == Some(UpgradeResult::Failed));
    stage.next("--version 3");
    stage.upgrade();
    answers("version=3 ");
}

#[test]
fn a_listener_that_was_shut_down_is_replaced() {
    let stage = start(&[], "--version 1 --shutdown-listener --drain-ms 500 --listen-backlog 1");
    let address = stage.address();
    kill(Pid::from_raw(stage.serving().pid.unwrap()), Signal::SIGTERM).unwrap();
    stage.next("--version 2");
    // Refused by that call, until it was noticed.
    stage.wait_for_log("for whoever comes next");
    assert!(request(address, "/").contains("version=2 "));
    stage.wait_settled();
    stage.next("--version 3");
    stage.upgrade();
    assert!(request(address, "/").contains("version=3 "));
}

fn steered(dir: &Arc<tempfile::TempDir>, address: &str, switch: &str, version: &str) -> Setup {
    let puppet = puppet();
    let args = ["--listen", address, "--switch", switch, "--ready", "notify", "--", &puppet, "--version", version];
    Setup::within(Arc::clone(dir), args)
}

#[test]
fn a_killed_supervisor_is_succeeded() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let first = steered(&dir, "127.0.0.1:0", "steered", "1").start();
    // The sockets are not the first ones any more.
    first.upgrade();
    first.wait_settled();
    let address = first.address();
    let config = || Config { workers: 2, ..Config::new(Target::Tcp(address)) };
    let loads = [Load::start(config()), Load::start(config().keep_alive())];
    first.kill_alone();
    for load in &loads {
        assert!(load.more(20, PATIENCE));
    }
    let second = steered(&dir, &address.to_string(), "steered", "2").start();
    for load in &loads {
        assert!(load.saw("2", PATIENCE), "{}\n{}", load.so_far(), second.log());
    }
    second.wait_settled();
    second.upgrade();
    second.wait_settled();
    // To sockets that are shared, it goes as well.
    second.kill_alone();
    let third = steered(&dir, &address.to_string(), "shared", "3").start();
    for load in &loads {
        assert!(load.saw("3", PATIENCE), "{}\n{}", load.so_far(), third.log());
    }
    third.wait_settled();
    third.upgrade();
    assert!(loads.iter().all(|load| load.more(20, PATIENCE)), "{}", third.log());
    clean(loads);
}

#[test]
fn from_a_supervisor_that_shared_it_is_refused() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let first = steered(&dir, "127.0.0.1:0", "shared", "1").start();
    let address = first.address();
    first.kill_alone();
    let mut second = steered(&dir, &address.to_string(), "steered", "2").spawn();
    assert_eq!(second.wait().code(), Some(2), "{}", second.log());
    assert!(second.log().contains("go on with --switch shared"), "{}", second.log());
    assert!(request(address, "/").contains("version=1 "));
    drop(steered(&dir, &address.to_string(), "shared", "2").start());
}

/// Takes its time with each connection, and is gone at TERM, whatever waits.
const SLOW: &str = "
import socket, time
listener = socket.socket(fileno=3)
while True:
    client, _ = listener.accept()
    client.recv(4096)
    client.sendall(b'HTTP/1.1 200 OK\\r\\nConnection: close\\r\\n\\r\\nversion=VERSION ')
    client.close()
    time.sleep(0.2)
";

#[test]
fn what_the_old_one_has_not_accepted_yet_it_accepts_before_it_is_told_to_stop() {
    if !installed("python3", &["/usr/bin/python3", "--version"]) {
        return;
    }
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let script = dir.path().join("server.py");
    let version = |version| std::fs::write(&script, SLOW.replace("VERSION", version)).unwrap();
    version("1");
    let path = script.display().to_string();
    let args =
        ["--listen", "127.0.0.1:0", "--switch", "steered", "--ready", "delay:300ms", "--", "/usr/bin/python3", &path];
    let supervisor = Setup::within(Arc::clone(&dir), args).start();
    let address = supervisor.address();
    let mut clients: Vec<_> = (0..12).map(|_| TcpStream::connect(address).unwrap()).collect();
    for client in &mut clients {
        client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    }
    version("2");
    supervisor.upgrade();
    assert!(request(address, "/").contains("version=2 "));
    for mut client in clients {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("version=1 "), "{answer:?}\n{}", supervisor.log());
    }
    supervisor.wait_settled();
}

#[test]
fn a_canary_under_load_is_given_up_and_promoted_and_loses_nothing() {
    let stage = start(&["--drain", "observe"], "--version 1");
    let loads = [stage.load(), stage.keep_alive_load()];
    let begin = |version: &str| {
        stage.next(&format!("--version {version}"));
        let output = stage.cli(&["upgrade", "--wait=canary", "--canary", "30%"]);
        assert!(output.status.success(), "{output:?}\n{}", stage.log());
        assert!(loads[0].saw(version, PATIENCE), "{}\n{}", loads[0].so_far(), stage.log());
    };
    begin("2");
    assert!(stage.cli(&["abort"]).status.success(), "{}", stage.log());
    stage.wait_settled();
    for _ in 0..50 {
        assert!(request(stage.address(), "/").contains("version=1 "));
    }
    begin("3");
    assert!(stage.cli(&["promote"]).status.success(), "{}", stage.log());
    for _ in 0..50 {
        assert!(request(stage.address(), "/").contains("version=3 "));
    }
    stage.next("--version 4");
    stage.upgrade();
    assert!(loads[0].saw("4", PATIENCE));
    clean(loads);
    stage.wait_settled();
}

#[test]
fn after_a_candidate_that_failed_the_next_upgrade_goes_as_ever() {
    let stage = start(&["--ready", "notify", "--start-timeout", "2s"], "--version 1");
    let loads = [stage.load(), stage.keep_alive_load()];
    for (failing, good) in [("--version 2 --exit-before-ready 1", "3"), ("--version 4 --ready none", "5")] {
        stage.next(failing);
        assert_eq!(stage.cli(&["upgrade"]).status.code(), Some(3), "{}", stage.log());
        stage.next(&format!("--version {good}"));
        stage.upgrade();
        for load in &loads {
            assert!(load.saw(good, PATIENCE), "{}\n{}", load.so_far(), stage.log());
        }
    }
    for summary in clean(loads) {
        assert_eq!(summary.order(), ["1", "3", "5"], "{summary}");
    }
    stage.wait_settled();
}

#[test]
fn a_rollback_in_the_bake_is_a_switch_back_and_upgrades_go_on() {
    let stage = start(&["--bake", "60s"], "--version 1");
    let load = stage.load();
    stage.next("--version 2");
    let mut upgrade = stage.cli_command(&["upgrade"]).stderr(std::process::Stdio::null()).spawn().unwrap();
    stage.wait_until("it bakes", |status| status.phase == ServicePhase::Baking);
    assert!(request(stage.address(), "/").contains("version=2 "));
    assert!(stage.cli(&["rollback"]).status.success(), "{}", stage.log());
    assert_eq!(upgrade.wait().unwrap().code(), Some(7));
    for _ in 0..50 {
        assert!(request(stage.address(), "/").contains("version=1 "));
    }
    stage.wait_settled();
    // The one that bakes dies: the one on standby is there.
    stage.next("--version 3");
    let mut upgrade = stage.cli_command(&["upgrade"]).stderr(std::process::Stdio::null()).spawn().unwrap();
    stage.wait_until("it bakes", |status| status.phase == ServicePhase::Baking);
    kill(Pid::from_raw(stage.serving().pid.unwrap()), Signal::SIGTERM).unwrap();
    assert_eq!(upgrade.wait().unwrap().code(), Some(3), "{}", stage.log());
    for _ in 0..50 {
        assert!(request(stage.address(), "/").contains("version=1 "));
    }
    stage.wait_settled();
    load.stop().assert_clean();
}
