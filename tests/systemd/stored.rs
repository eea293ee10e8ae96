//! systemd holds zddsup's sockets (`FileDescriptorStoreMax=`) while no zddsup is there: restarted, crashed, killed.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};

use crate::common::load::{Failure, Load, Summary, Target};
use crate::common::real::installed;
use crate::common::{try_request, wait_for, PATIENCE};
use crate::stage::Systemd;
use crate::{puppet_at_80, template};

const ADOPTED: &str = "--handoff adopt --ready tcp:127.0.0.1:8080";

/// An unmodified puppet at port 8080.
fn puppet_adopted(more: &str) -> Option<Systemd> {
    let systemd = Systemd::boot(&template(more))?;
    let command = "/run/target/examples/puppet --bind 127.0.0.1:8080 --script /run/stage/script";
    systemd.write("web.env", &format!("COMMAND={command}\nFLAGS={ADOPTED}\n"));
    Some(systemd)
}

fn start(systemd: &Systemd) {
    systemd.write("script", "--version 1");
    systemd.must(&["start", "zddsup@web"]);
}

fn zddsup(systemd: &Systemd) -> String {
    systemd.show("zddsup@web", "MainPID")
}

/// The generation that serves, as zddsup tells.
fn status(systemd: &Systemd) -> serde_json::Value {
    let args = ["status", "--control", "/run/zddsup/web.sock", "--json"];
    let output = systemd.command("/run/target/zddsup", &args).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}\n{}", systemd.log()))
}

fn pid(systemd: &Systemd) -> i64 {
    let status = status(systemd);
    let serving = status["serving"].clone();
    let generations = status["generations"].as_array().unwrap();
    generations.iter().find(|one| one["number"] == serving).unwrap()["pid"].as_i64().unwrap()
}

/// Sends zddsup alone a signal, and waits until systemd has started another one, which serves.
fn lose(systemd: &Systemd, signal: &str) {
    let before = zddsup(systemd);
    systemd.must(&["kill", "--kill-whom=main", &format!("--signal={signal}"), "zddsup@web"]);
    wait_for("another zddsup serves", || {
        let now = zddsup(systemd);
        now != before && now != "0" && systemd.show("zddsup@web", "ActiveState") == "active"
    });
}

fn saw(systemd: &Systemd, load: &Load, version: &str) {
    assert!(load.saw(version, PATIENCE), "{}\n{}", load.so_far(), systemd.log());
}

/// Connections that the service does not take: they wait in its queue, with a request each. (It is not stopped for that: as
/// its parent dies, the kernel wakes it.)
fn waiting(systemd: &Systemd, port: u16) -> Vec<TcpStream> {
    systemd.inside(move || {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        assert!(try_request(address, "/hang").is_ok());
        let connect = |_| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
            stream
        };
        (0..20).map(connect).collect()
    })
}

/// What is gone is not held.
fn holds(systemd: &Systemd, count: u32) {
    let held = || systemd.show("zddsup@web", "NFileDescriptorStore");
    wait_for(&format!("{count} fds are held"), || held() == count.to_string());
}

#[track_caller]
fn assert_answered(systemd: &Systemd, clients: Vec<TcpStream>, by: &str) {
    for mut client in clients {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = String::new();
        let read = client.read_to_string(&mut answer);
        assert!(read.is_ok() && answer.contains(by), "{read:?}: {answer:?}\n{}", systemd.log());
    }
}

/// What the dead service had accepted is lost with it. Nobody is refused, and nobody waits in vain.
#[track_caller]
fn assert_only_established_are_lost(summary: &Summary) {
    let lost = |failure: &Failure| matches!(failure, Failure::Reset | Failure::Eof);
    assert!(summary.failures.keys().all(lost), "{summary}");
    // Each of both clients has one at most.
    assert!(summary.failed() <= 2, "{summary}");
}

#[test]
fn a_restart_under_load_answers_every_request() {
    let Some(systemd) = puppet_at_80("", "") else { return };
    start(&systemd);
    let load = systemd.load(80);
    for version in 2..=4 {
        systemd.write("script", &format!("--version {version}\n--ready delay-ms=200"));
        systemd.must(&["restart", "zddsup@web"]);
        saw(&systemd, &load, &version.to_string());
    }
    let summary = load.stop();
    summary.assert_clean();
    assert_eq!(summary.order(), ["1", "2", "3", "4"]);
    // The listener, the state; the pipe and the notify socket of one generation.
    holds(&systemd, 4);
}

#[test]
fn datagrams_wait_while_nobody_is_there() {
    let Some(systemd) = puppet_at_80("RestartSec=3\n", "--listen udp://127.0.0.1:53") else { return };
    start(&systemd);
    systemd.write("script", "--version 2");
    systemd.must(&["kill", "--kill-whom=main", "--signal=KILL", "zddsup@web"]);
    wait_for("all are gone", || systemd.show("zddsup@web", "SubState") == "auto-restart");
    let client = systemd.inside(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.send_to(b"hello", "127.0.0.1:53").unwrap();
    let mut answer = [0; 100];
    let (length, _) = client.recv_from(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer[..length]);
    assert!(answer.starts_with("version=2 "), "{answer}\n{}", systemd.log());
}

#[test]
fn a_restart_under_load_of_an_unmodified_server_answers_every_request() {
    let Some(systemd) = puppet_adopted("") else { return };
    start(&systemd);
    let load = systemd.load(8080);
    for version in 2..=4 {
        systemd.write("script", &format!("--version {version}"));
        systemd.must(&["restart", "zddsup@web"]);
        saw(&systemd, &load, &version.to_string());
    }
    let summary = load.stop();
    summary.assert_clean();
    assert_eq!(summary.order(), ["1", "2", "3", "4"]);
    // Its calls besides.
    holds(&systemd, 5);
}

#[test]
fn a_zddsup_that_is_killed_with_its_service_refuses_nobody() {
    for signal in ["KILL", "ABRT"] {
        let Some(systemd) = puppet_at_80("", "") else { return };
        start(&systemd);
        let load = systemd.load(80);
        systemd.write("script", "--version 2");
        lose(&systemd, signal);
        saw(&systemd, &load, "2");
        assert_only_established_are_lost(&load.stop());
        let clients = waiting(&systemd, 80);
        systemd.write("script", "--version 3");
        lose(&systemd, signal);
        assert_answered(&systemd, clients, "version=3 ");
    }
}

#[test]
fn so_it_is_with_an_unmodified_server() {
    let Some(systemd) = puppet_adopted("") else { return };
    start(&systemd);
    let load = systemd.load(8080);
    systemd.write("script", "--version 2");
    lose(&systemd, "KILL");
    saw(&systemd, &load, "2");
    assert_only_established_are_lost(&load.stop());
    let clients = waiting(&systemd, 8080);
    systemd.write("script", "--version 3");
    lose(&systemd, "KILL");
    assert_answered(&systemd, clients, "version=3 ");
    // All goes on as usual.
    let load = systemd.load(8080);
    systemd.write("script", "--version 4");
    systemd.must(&["reload", "zddsup@web"]);
    saw(&systemd, &load, "4");
    load.stop().assert_clean();
    holds(&systemd, 5);
}

/// The address has two sockets then, and what is new is steered to one.
#[test]
fn so_it_is_while_a_candidate_listens() {
    let Some(systemd) = puppet_adopted("") else { return };
    let command = "/run/target/examples/puppet --bind 127.0.0.1:8080 --script /run/stage/script";
    systemd.write("web.env", &format!("COMMAND={command}\nFLAGS=--handoff adopt --ready notify\n"));
    start(&systemd);
    let load = systemd.load(8080);
    systemd.write("script", "--version 2\n--ready none");
    systemd.must(&["kill", "--kill-whom=main", "--signal=HUP", "zddsup@web"]);
    wait_for("it listens", || systemd.log().matches("puppet: listens").count() == 2);
    systemd.write("script", "--version 3");
    lose(&systemd, "KILL");
    saw(&systemd, &load, "3");
    let summary = load.stop();
    assert_only_established_are_lost(&summary);
    assert_eq!(summary.order(), ["1", "3"], "{summary}");
    systemd.load(8080).stop().assert_clean();
    holds(&systemd, 5);
}

#[test]
fn so_it_is_where_zddsup_listens_and_steers() {
    for flags in ["--switch steered", "--handoff adopt"] {
        let Some(systemd) = puppet_at_80("", flags) else { return };
        let bind = if flags == "--handoff adopt" { "\n--bind 127.0.0.1:80" } else { "" };
        systemd.write("script", &format!("--version 1{bind}"));
        systemd.must(&["start", "zddsup@web"]);
        let load = systemd.load(80);
        systemd.write("script", &format!("--version 2{bind}"));
        systemd.must(&["restart", "zddsup@web"]);
        saw(&systemd, &load, "2");
        load.stop().assert_clean();
        let clients = waiting(&systemd, 80);
        systemd.write("script", &format!("--version 3{bind}"));
        lose(&systemd, "KILL");
        assert_answered(&systemd, clients, "version=3 ");
        let load = systemd.load(80);
        systemd.write("script", &format!("--version 4{bind}"));
        systemd.must(&["reload", "zddsup@web"]);
        saw(&systemd, &load, "4");
        load.stop().assert_clean();
    }
}

#[test]
fn with_kill_mode_process_the_service_serves_on_and_is_upgraded() {
    for signal in ["KILL", "ABRT"] {
        let Some(systemd) = puppet_at_80("KillMode=process\n", "") else { return };
        serves_on(&systemd, 80, signal);
    }
}

#[test]
fn with_kill_mode_process_an_unmodified_server_serves_on_and_is_upgraded() {
    // Only systemd has the state then.
    let Some(systemd) = puppet_adopted("KillMode=process\nRuntimeDirectoryPreserve=no\n") else { return };
    serves_on(&systemd, 8080, "KILL");
}

#[test]
fn so_it_is_for_an_ordinary_user() {
    let more = "KillMode=process\nUser=nobody\nEnvironment=XDG_RUNTIME_DIR=/run\n";
    let Some(systemd) = puppet_adopted(more) else { return };
    serves_on(&systemd, 8080, "KILL");
}

fn serves_on(systemd: &Systemd, port: u16, signal: &str) {
    start(systemd);
    let load = systemd.load(port);
    let before = pid(systemd);
    systemd.write("script", "--version 2");
    lose(systemd, signal);
    saw(systemd, &load, "2");
    assert!(systemd.log().contains("found alive, its supervisor was killed: it serves on"), "{}", systemd.log());
    assert_eq!(status(systemd)["serving"], 2);
    // Its last words were heard, and it is gone.
    wait_for("it is gone", || {
        !systemd.command("test", &["-e", &format!("/proc/{before}")]).status().unwrap().success()
    });
    systemd.write("script", "--version 3");
    systemd.must(&["reload", "zddsup@web"]);
    saw(systemd, &load, "3");
    let summary = load.stop();
    summary.assert_clean();
    assert_eq!(summary.order(), ["1", "2", "3"], "{summary}");
}

/// What systemd holds is kept in step by the program that goes on, and the calls that it takes are held still.
#[test]
fn so_it_is_after_self_upgrades() {
    let Some(systemd) = puppet_adopted("KillMode=process\n") else { return };
    start(&systemd);
    // The state, its socket, its stderr, its calls, its notify socket.
    holds(&systemd, 5);
    let load = systemd.load(8080);
    for version in 2..=3 {
        systemd.self_upgrade();
        systemd.write("script", &format!("--version {version}"));
        systemd.must(&["reload", "zddsup@web"]);
        saw(&systemd, &load, &version.to_string());
        holds(&systemd, 5);
    }
    systemd.write("script", "--version 4");
    lose(&systemd, "KILL");
    saw(&systemd, &load, "4");
    let summary = load.stop();
    summary.assert_clean();
    assert_eq!(summary.order(), ["1", "2", "3", "4"], "{summary}");
}

/// It binds some more while no zddsup is there: the call waits for the next one, which reads what it said of it, too.
#[test]
fn calls_that_are_made_while_no_zddsup_is_there_wait() {
    let Some(systemd) = puppet_adopted("KillMode=process\nRestartSec=5\n") else { return };
    let also = "--also-bind 127.0.0.1:8081";
    systemd.write("script", &format!("--version 1\n{also}\n--also-bind-after-ms 2000"));
    systemd.must(&["start", "zddsup@web"]);
    let load = systemd.load(8080);
    systemd.write("script", &format!("--version 2\n{also}"));
    lose(&systemd, "KILL");
    wait_for("both have bound it", || systemd.log().matches("puppet: listens on 127.0.0.1:8081").count() == 2);
    saw(&systemd, &load, "2");
    let summary = load.stop();
    summary.assert_clean();
    assert_eq!(summary.order(), ["1", "2"], "{summary}");
    systemd.load(8081).stop().assert_clean();
}

#[test]
fn after_a_stop_nothing_is_held_and_the_next_start_begins_anew() {
    let Some(systemd) = puppet_at_80("", "--listen unix:///run/stage/socket") else { return };
    start(&systemd);
    assert_ne!(systemd.show("zddsup@web", "NFileDescriptorStore"), "0");
    systemd.must(&["stop", "zddsup@web"]);
    assert_eq!(systemd.show("zddsup@web", "NFileDescriptorStore"), "0");
    let refused = systemd.inside(|| TcpStream::connect("127.0.0.1:80").unwrap_err());
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    systemd.must(&["start", "zddsup@web"]);
    systemd.load(80).stop().assert_clean();
    systemd.load_of(Target::Unix(systemd.path("socket"))).stop().assert_clean();
}

#[test]
fn listeners_that_are_asked_for_no_more_are_in_nobodys_way() {
    let Some(systemd) = puppet_at_80("", "--listen udp://127.0.0.1:53 --listen old=127.0.0.1:81") else { return };
    start(&systemd);
    let command = "/run/target/examples/puppet --script /run/stage/script";
    let flags = "--listen 0.0.0.0:80 --listen new=0.0.0.0:81 --listen dns=udp://0.0.0.0:53";
    systemd.write("web.env", &format!("COMMAND={command}\nFLAGS={flags}\n"));
    systemd.write("script", "--version 2");
    systemd.must(&["restart", "zddsup@web"]);
    let loads = [systemd.load(80), systemd.load(81)];
    loads.into_iter().for_each(|load| load.stop().assert_clean());
    // From --listen to a program that binds the very address for itself, and back.
    let adopted = "/run/target/examples/puppet --bind 127.0.0.1:81 --script /run/stage/script";
    systemd.write("web.env", &format!("COMMAND={adopted}\nFLAGS=--handoff adopt\n"));
    systemd.must(&["restart", "zddsup@web"]);
    let load = systemd.load(81);
    systemd.write("web.env", &format!("COMMAND={command}\nFLAGS=--listen 127.0.0.1:81\n"));
    systemd.write("script", "--version 3");
    systemd.must(&["restart", "zddsup@web"]);
    saw(&systemd, &load, "3");
    load.stop().assert_clean();
}

#[test]
fn unix_sockets_are_reached_by_their_paths_across_a_restart() {
    let Some(systemd) = puppet_at_80("", "--listen unix:///run/stage/socket") else { return };
    start(&systemd);
    restarts_at(&systemd, "socket");
}

#[test]
fn so_are_those_of_an_unmodified_server() {
    let Some(systemd) = Systemd::boot(&template("")) else { return };
    let command = "/run/target/examples/puppet --bind unix:/run/stage/socket --script /run/stage/script";
    systemd.write("web.env", &format!("COMMAND={command}\nFLAGS=--handoff adopt\n"));
    start(&systemd);
    restarts_at(&systemd, "socket");
    // Whoever starts after a stop finds the path free.
    systemd.must(&["stop", "zddsup@web"]);
    systemd.must(&["start", "zddsup@web"]);
    systemd.load_of(Target::Unix(systemd.path("socket"))).stop().assert_clean();
}

fn restarts_at(systemd: &Systemd, socket: &str) {
    let load = systemd.load_of(Target::Unix(systemd.path(socket)));
    for version in ["2", "3"] {
        systemd.write("script", &format!("--version {version}"));
        systemd.must(&["restart", "zddsup@web"]);
        saw(systemd, &load, version);
    }
    load.stop().assert_clean();
}

#[test]
fn a_restart_under_load_of_nginx_answers_every_request() {
    if !installed("nginx", &["/usr/sbin/nginx", "-v"]) {
        return;
    }
    let Some(systemd) = Systemd::boot(&template("")) else { return };
    let command = "/usr/sbin/nginx -p /run/stage -e stderr -c nginx.conf";
    systemd.write("web.env", &format!("COMMAND={command}\nFLAGS=--stop-signal QUIT --ready tcp:127.0.0.1:8080\n"));
    let config = |version: u32| {
        let answer = format!("server {{ listen 127.0.0.1:8080; return 200 'version={version} '; }}");
        let text =
            format!("daemon off; worker_processes 2; pid nginx.pid; events {{}} http {{ access_log off; {answer} }}");
        systemd.write("nginx.conf", &text);
    };
    config(1);
    systemd.must(&["start", "zddsup@web"]);
    let load = systemd.load(8080);
    for version in 2..=4 {
        config(version);
        systemd.must(&["restart", "zddsup@web"]);
        saw(&systemd, &load, &version.to_string());
    }
    let summary = load.stop();
    summary.assert_clean();
    assert_eq!(summary.order(), ["1", "2", "3", "4"], "{summary}");
}

#[test]
fn a_real_server_that_knows_nothing_of_it_refuses_nobody_in_a_restart() {
    if !installed("python3", &["/usr/bin/python3", "--version"]) {
        return;
    }
    let Some(systemd) = Systemd::boot(&template("")) else { return };
    systemd.write("web.env", "COMMAND=/usr/bin/python3 -m http.server --bind 127.0.0.1 8080\nFLAGS=\n");
    systemd.must(&["start", "zddsup@web"]);
    let load = systemd.load(8080);
    for _ in 0..3 {
        systemd.must(&["restart", "zddsup@web"]);
        assert!(load.more(20, PATIENCE), "{}\n{}", load.so_far(), systemd.log());
    }
    // TERM ends it at once, whatever it is at.
    let summary = load.stop();
    let lost = |failure: &Failure| matches!(failure, Failure::Reset | Failure::Eof);
    assert!(summary.failures.keys().all(lost), "{summary}");
}
