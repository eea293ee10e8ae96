//! What becomes of new connections in each phase.

use std::io::{Read, Write};
use std::net::TcpStream;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use zddsup::control::types::{GenerationPhase, UpgradePhase};

use crate::common::load::Load;
use crate::common::{puppet, request, PATIENCE};
use crate::stage::Site;

/// A puppet that binds for itself, and does what the file says.
pub fn start(site: &Site, flags: &[&str], script: &str) -> crate::common::Supervisor {
    site.write("script", script);
    let puppet = puppet();
    let command = ["--", &puppet, "--bind", "ADDRESS", "--script", "script"];
    let words: Vec<_> = flags.iter().chain(&command).copied().collect();
    site.start(&words)
}

#[test]
fn one_that_listens_and_is_not_ready_gets_nothing() {
    let site = Site::new();
    let supervisor = start(&site, &["--ready", "notify", "--start-timeout", "2s"], "--version 1");
    site.write("script", "--version 2\n--ready none\n");
    let load = Load::start(site.load());
    assert!(load.more(20, PATIENCE));
    assert_eq!(supervisor.cli(&["upgrade"]).status.code(), Some(3));
    supervisor.wait_settled();
    assert!(load.more(20, PATIENCE));
    let summary = load.stop();
    summary.assert_clean();
    assert_eq!(summary.order(), ["1"], "{summary}");
}

#[test]
fn the_old_one_keeps_its_connection_and_gets_no_new_one() {
    let site = Site::new();
    let supervisor = start(&site, &[], "--version 1");
    let mut old = TcpStream::connect(site.address).unwrap();
    let ask = |stream: &mut TcpStream| {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut answer = [0; 4096];
        let read = stream.read(&mut answer).unwrap();
        String::from_utf8_lossy(&answer[..read]).into_owned()
    };
    assert!(ask(&mut old).contains("version=1 "));
    site.write("script", "--version 2\n");
    supervisor.upgrade();
    for _ in 0..50 {
        assert!(request(site.address, "/").contains("version=2 "));
    }
    assert!(ask(&mut old).contains("version=1 "));
    let draining = |status: &zddsup::control::types::Status| {
        status.generations.iter().any(|g| g.phase == GenerationPhase::Draining && g.connections == Some(1))
    };
    supervisor.wait_until("its last connection is seen", draining);
    drop(old);
    supervisor.wait_settled();
}

#[test]
fn an_idle_connection_does_not_hold_the_old_one_and_what_is_under_way_does() {
    let site = Site::new();
    let supervisor = start(&site, &["--drain-idle", "4s"], "--version 1");
    let ask = |stream: &mut TcpStream, path: &str| {
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).unwrap();
        let mut answer = [0; 4096];
        let read = stream.read(&mut answer).unwrap();
        String::from_utf8_lossy(&answer[..read]).into_owned()
    };
    let connect = || {
        let mut stream = TcpStream::connect(site.address).unwrap();
        assert!(ask(&mut stream, "/").contains("version=1 "));
        stream
    };
    let (idle, mut active) = (connect(), connect());
    // It asked for far more than fits into the buffers, and does not read it.
    let mut stuck = TcpStream::connect(site.address).unwrap();
    stuck.write_all(b"GET /big?bytes=50000000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    site.write("script", "--version 2\n");
    supervisor.upgrade();
    let draining = |connections: u64| {
        let status = supervisor.status();
        let found = status.generations.iter().find(|g| g.phase == GenerationPhase::Draining);
        assert_eq!(found.and_then(|g| g.connections), Some(connections), "{}", supervisor.log());
    };
    // Longer than it takes to be idle.
    for _ in 0..60 {
        assert!(ask(&mut active, "/").contains("version=1 "));
        draining(3);
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    drop(active);
    supervisor.wait_until("the active one is gone", |status| {
        status.generations.iter().any(|g| g.phase == GenerationPhase::Draining && g.connections == Some(2))
    });
    // The one that does not read is still there, and in flight.
    for _ in 0..60 {
        draining(2);
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let mut rest = Vec::new();
    stuck.read_to_end(&mut rest).unwrap();
    assert!(rest.len() > 50_000_000, "{}", rest.len());
    supervisor.wait_settled();
    assert!(supervisor.log().contains("has drained: its other connections are gone"), "{}", supervisor.log());
    drop(idle);
}

/// Each look at the status counts connections, too.
#[test]
fn a_drain_is_not_over_sooner_because_somebody_looks() {
    let site = Site::new();
    let supervisor = start(&site, &[], "--version 1");
    supervisor.upgrade();
    let report = loop {
        let report = supervisor.status().upgrades.remove(0);
        if report.retired {
            break report;
        }
    };
    let drain = report.phases.iter().find(|time| time.phase == UpgradePhase::Draining).unwrap();
    // Handshakes that were under way at the switch have that time.
    assert!(drain.ms >= 490, "{:?}", report.phases);
}

#[test]
fn a_rollback_in_the_bake_is_a_switch_back() {
    let site = Site::new();
    let supervisor = start(&site, &["--bake", "60s"], "--version 1");
    let load = Load::start(site.load());
    assert!(load.more(20, PATIENCE));
    site.write("script", "--version 2\n");
    let mut upgrade = supervisor.cli_command(&["upgrade"]).spawn().unwrap();
    assert!(load.saw("2", PATIENCE), "{}", load.so_far());
    assert!(supervisor.cli(&["rollback"]).status.success());
    assert!(!upgrade.wait().unwrap().success());
    assert!(request(site.address, "/").contains("version=1 "));
    supervisor.wait_settled();
    assert!(request(site.address, "/").contains("version=1 "));
    load.stop().assert_clean();
}

#[test]
fn what_waits_for_a_dead_one_is_answered_by_the_next() {
    let site = Site::new();
    let supervisor = start(&site, &[], "--version 1");
    let first = supervisor.serving();
    assert!(crate::common::try_request(site.address, "/hang").is_ok());
    let mut waiting: Vec<_> = (0..30).map(|_| TcpStream::connect(site.address).unwrap()).collect();
    for client in &mut waiting {
        client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    }
    site.write("script", "--version 2\n");
    kill(Pid::from_raw(first.pid.unwrap()), Signal::SIGKILL).unwrap();
    for mut client in waiting {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("version=2 "), "{answer:?}\n{}", supervisor.log());
    }
}

#[test]
fn a_port_that_the_kernel_chose_is_kept() {
    let dir = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let puppet = puppet();
    let supervisor = crate::common::Setup::within(dir, ["--", &puppet, "--bind", "127.0.0.1:0"]).start();
    let address = supervisor.address();
    assert!(request(address, "/").contains("generation=1"));
    supervisor.upgrade();
    supervisor.wait_settled();
    assert!(request(address, "/").contains("generation=2"));
    assert_eq!(supervisor.address(), address);
}

#[test]
fn it_is_kept_beside_ports_that_were_asked_for_and_after_a_crash() {
    let site = Site::new();
    let any = ["--also-bind", "127.0.0.1:0", "--also-bind", "127.0.0.1:0"];
    let puppet = puppet();
    let words = [&["--", &puppet, "--bind", "127.0.0.1:0"], &any[..], &["--also-bind", "ADDRESS"]].concat();
    let supervisor = site.start(&words);
    let addresses = || {
        let listeners = supervisor.status().listeners;
        let mut addresses: Vec<_> = listeners.into_iter().map(|listener| listener.address).collect();
        addresses.sort();
        addresses
    };
    let before = addresses();
    assert_eq!(before.len(), 4, "{before:?}");
    supervisor.upgrade();
    supervisor.wait_settled();
    assert_eq!(addresses(), before);
    kill(Pid::from_raw(supervisor.serving().pid.unwrap()), Signal::SIGKILL).unwrap();
    supervisor.wait_until("the next one serves", |status| status.serving.is_some_and(|serving| serving.0 == 3));
    assert_eq!(addresses(), before);
    for address in before {
        let address = address.trim_start_matches("tcp://").parse().unwrap();
        assert!(request(address, "/").contains("generation=3"), "{address}\n{}", supervisor.log());
    }
}

#[test]
fn a_crash_after_listen_changes_nothing() {
    let site = Site::new();
    let supervisor = start(&site, &[], "--version 1");
    let load = Load::start(site.load());
    assert!(load.more(20, PATIENCE));
    site.write("script", "--version 2\n--ready none\n--exit-after-ms 50:7\n");
    assert_eq!(supervisor.cli(&["upgrade"]).status.code(), Some(3));
    assert!(load.more(20, PATIENCE));
    supervisor.wait_settled();
    site.write("script", "--version 3\n");
    supervisor.upgrade();
    assert!(load.saw("3", PATIENCE));
    let summary = load.stop();
    summary.assert_clean();
    assert_eq!(summary.order(), ["1", "3"], "{summary}");
}

#[test]
fn a_killed_supervisor_is_succeeded() {
    let site = Site::new();
    let first = start(&site, &[], "--version 1");
    let loads = [Load::start(site.load()), Load::start(site.load().keep_alive())];
    for load in &loads {
        assert!(load.more(20, PATIENCE));
    }
    first.kill_alone();
    let second = start(&site, &[], "--version 2");
    for load in &loads[..1] {
        assert!(load.saw("2", PATIENCE), "{}\n{}", load.so_far(), second.log());
    }
    for load in loads {
        load.stop().assert_clean();
    }
    second.wait_settled();
}

/// Addresses come and go with versions: one that is left is closed once nobody needs it, and a new one is learned.
#[test]
fn a_version_may_listen_at_fewer_addresses_and_at_others() {
    let site = Site::new();
    let other = Site::new();
    let both = |version: u32| format!("--version {version}\n--also-bind {}", other.address);
    let supervisor = start(&site, &[], &both(1));
    let load = Load::start(site.load());
    assert!(load.more(20, PATIENCE));
    assert!(request(other.address, "/").contains("version=1 "));

    site.write("script", "--version 2");
    supervisor.upgrade();
    supervisor.wait_settled();
    let place = format!("tcp:{}", other.address);
    supervisor.wait_for_log(&format!("nobody listens on {place} any more: closed"));
    assert!(supervisor.log().contains(&format!("does not listen on {place} any more")), "{}", supervisor.log());
    assert!(TcpStream::connect(other.address).is_err());

    for version in 3..=4 {
        site.write("script", &both(version));
        supervisor.upgrade();
        assert!(request(other.address, "/").contains(&format!("version={version} ")));
    }
    let summary = load.stop();
    summary.assert_clean();
    assert!(summary.order().contains(&"2"), "{summary}");
}

/// A proxy that binds the source of each connection upstream, with any port, is a client there: nothing of it is shared or
/// remembered, and it pays no more for the thousandth than for the first.
#[test]
fn what_a_server_binds_for_its_own_connections_is_left_alone() {
    const SERVER: &str = "
import http.server, socket, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        seen = set()
        for _ in range(3000):
            client = socket.socket()
            client.bind(('127.0.0.1', 0))
            seen.add(client.getsockopt(socket.SOL_SOCKET, 15))
            client.close()
        body = f'reuseport={sorted(seen)}'.encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()
";
    let site = Site::new();
    let supervisor = site.start(&["--", "/usr/bin/python3", "-c", SERVER, "PORT"]);
    assert_eq!(request(site.address, "/"), "reuseport=[0]", "{}", supervisor.log());
    supervisor.upgrade();
    assert_eq!(request(site.address, "/"), "reuseport=[0]", "{}", supervisor.log());
}
