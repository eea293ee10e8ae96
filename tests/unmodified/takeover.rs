//! A supervisor that is killed, and succeeded, where programs bind for themselves.

use std::sync::Arc;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use zddsup::control::types::UpgradeResult;

use crate::common::load::Load;
use crate::common::real::installed;
use crate::common::{puppet, request, try_request, Setup, PATIENCE};
use crate::leaving;
use crate::stage::Site;
use crate::steering::start;

/// While a candidate listens that is not ready: the next one's socket is the third of the address, and not the second.
#[test]
fn of_a_candidate_s_sockets_the_next_supervisor_knows() {
    let site = Site::new();
    let ready = ["--ready", "notify", "--drain-timeout", "3s"];
    let first = start(&site, &ready, "--version 1");
    let loads = [Load::start(site.load()), Load::start(site.load().keep_alive())];
    site.write("script", "--version 2\n--ready none\n--ignore-term\n");
    first.signal(Signal::SIGHUP);
    first.wait_until("the candidate listens", |_| first.log().matches("listens on tcp:").count() == 2);
    first.kill_alone();
    // It does not end before its drain time is over, and gets nothing meanwhile.
    let second = start(&site, &ready, "--version 3");
    second.wait_until("the new one serves", |status| status.serving.is_some_and(|serving| serving.0 == 3));
    for load in &loads {
        assert!(load.saw("3", PATIENCE), "{}\n{}", load.so_far(), second.log());
    }
    second.wait_settled();
    second.upgrade();
    for load in loads {
        assert!(load.more(20, PATIENCE), "{}", load.so_far());
        let summary = load.stop();
        summary.assert_clean();
        assert_eq!(summary.order(), ["1", "3"], "{summary}");
    }
}

/// What waited in it is reset with the one that held it. All else goes on, in the order that the kernel has now.
#[test]
fn while_a_socket_is_kept_for_the_next_generation() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("not checked: only root can become another user");
    }
    let site = Site::new();
    let first = leaving::start(&site, &crate::places::NOBODY);
    assert!(try_request(site.address, "/hang").is_ok());
    let clients = leaving::waiting(&site, 10);
    site.write("script", "--version 2");
    first.signal(Signal::SIGHUP);
    first.wait_until("its socket is kept", |status| status.upgrades.iter().any(|report| report.proof.kept == 10));
    first.wait_settled();
    let loads = [Load::start(site.load()), Load::start(site.load().keep_alive())];
    assert!(loads.iter().all(|load| load.more(20, PATIENCE)));
    first.kill_alone();
    site.write("script", "--version 3");
    let second = leaving::spawn(&site, &crate::places::NOBODY);
    for load in &loads {
        assert!(load.saw("3", PATIENCE), "{}\n{}", load.so_far(), second.log());
    }
    site.write("script", "--version 4");
    second.signal(Signal::SIGHUP);
    for load in loads {
        assert!(load.saw("4", PATIENCE), "{}\n{}", load.so_far(), second.log());
        load.stop().assert_clean();
    }
    drop(clients);
    second.wait_settled();
}

#[test]
fn a_port_that_the_kernel_chose_is_kept() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let puppet = puppet();
    let setup = || Setup::within(Arc::clone(&dir), ["--", &puppet, "--bind", "127.0.0.1:0"]);
    let first = setup().start();
    first.upgrade();
    let address = first.address();
    first.kill_alone();
    let second = setup().start();
    second.wait_until("the new one serves", |status| status.serving.is_some_and(|serving| serving.0 == 3));
    assert!(request(address, "/").contains("generation=3"), "{}", second.log());
    second.upgrade();
    assert!(request(address, "/").contains("generation=4"), "{}", second.log());
}

/// Each worker has a socket of its own, and the first process has none.
const WORKERS: &str = "
import os, signal, socket
workers = []
for _ in range(2):
    worker = os.fork()
    if worker:
        workers.append(worker)
        continue
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, 15, 1)  # SO_REUSE…
    listener.bind(('127.0.0.1', PORT))
    listener.listen(64)
    while True:
        client, _ = listener.accept()
        client.recv(4096)
        client.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 10\\r\\nConnection: close\\r\\n\\r\\nversion=NUMBER ')
        client.close()
def stop(*_):
    for worker in workers: os.kill(worker, signal.SIGTERM)
signal.signal(signal.SIGTERM, stop)
for worker in workers: os.waitpid(worker, 0)
";

#[test]
fn sockets_that_only_workers_have_are_found() {
    if !installed("python3", &["/usr/bin/python3", "--version"]) {
        return;
    }
    let site = Site::new();
    let version = |version: u32| site.write("server.py", &WORKERS.replace("NUMBER", &version.to_string()));
    version(1);
    let words = ["--", "/usr/bin/python3", "server.py"];
    let first = site.start(&words);
    let load = Load::start(site.load());
    assert!(load.more(20, PATIENCE), "{}", load.so_far());
    first.kill_alone();
    version(2);
    let second = site.start(&words);
    assert!(load.saw("2", PATIENCE), "{}\n{}", load.so_far(), second.log());
    second.wait_settled();
    version(3);
    second.upgrade();
    assert!(load.saw("3", PATIENCE), "{}\n{}", load.so_far(), second.log());
    let summary = load.stop();
    summary.assert_clean();
    assert_eq!(summary.order(), ["1", "2", "3"], "{summary}");
}

/// A candidate's socket is in the group when it dies.
#[test]
fn upgrades_go_on_after_a_candidate_that_listened_and_died() {
    for flags in [&["--ready", "notify"][..], &["--ready", "notify", "--handoff", "adopt", "--listen", "ADDRESS"]] {
        let site = Site::new();
        let supervisor = start(&site, flags, "--version 1");
        let loads = [Load::start(site.load()), Load::start(site.load().keep_alive())];
        for (failing, good) in [(2, "3"), (4, "5")] {
            site.write("script", &format!("--version {failing}\n--ready none\n"));
            supervisor.signal(Signal::SIGHUP);
            let candidate = supervisor.wait_until("the candidate listens", |status| {
                status.generations[0].number.0 == failing
                    && supervisor.log().matches("listens on tcp:").count() >= failing as usize
            });
            kill(Pid::from_raw(candidate.generations[0].pid.unwrap()), Signal::SIGKILL).unwrap();
            supervisor.wait_until("it is gone", |status| {
                status.pending.is_none() && status.upgrades[0].result == Some(UpgradeResult::Failed)
            });
            site.write("script", &format!("--version {good}\n"));
            supervisor.upgrade();
            assert!(loads[0].saw(good, PATIENCE), "{}\n{}", loads[0].so_far(), supervisor.log());
        }
        // Who keeps its connection keeps its version.
        for (load, versions) in loads.into_iter().zip([&["1", "3", "5"][..], &["1"]]) {
            let summary = load.stop();
            summary.assert_clean();
            assert_eq!(summary.order(), versions, "{summary}");
        }
        supervisor.wait_settled();
    }
}
