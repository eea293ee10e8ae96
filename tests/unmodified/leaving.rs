//! What waits for a generation that is gone, and what an upgrade says of it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Output;
use std::sync::Arc;

use zddsup::control::types::Proof;

use crate::common::load::Load;
use crate::common::{puppet, try_request, Setup, Supervisor, PATIENCE};
use crate::stage::Site;

const FLAGS: [&str; 4] = ["--drain-timeout", "500ms", "--stop-timeout", "200ms"];

/// A puppet that binds for itself, and does what the file says.
pub fn start(site: &Site, wrapper: &[&str]) -> Supervisor {
    site.write("script", "--version 1");
    let supervisor = spawn(site, wrapper);
    supervisor.wait_until("the first generation serves", |status| status.serving.is_some());
    supervisor
}

/// The same, as the file says already, and nothing is waited for.
pub fn spawn(site: &Site, wrapper: &[&str]) -> Supervisor {
    let (puppet, address) = (puppet(), site.address.to_string());
    let command = ["--", &puppet, "--bind", &address, "--script", "script"];
    let words: Vec<_> = FLAGS.iter().chain(&command).copied().collect();
    let setup = Setup::within(Arc::clone(&site.dir), words);
    if wrapper.is_empty() {
        return setup.spawn();
    }
    std::os::unix::fs::chown(site.dir.path(), Some(65534), Some(65534)).unwrap();
    setup.through(wrapper).spawn()
}

/// Connections that are made while nobody accepts, with a request on each.
pub fn waiting(site: &Site, count: usize) -> Vec<TcpStream> {
    let ask = |_| {
        let mut client = TcpStream::connect(site.address).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        client
    };
    (0..count).map(ask).collect()
}

#[track_caller]
pub fn answered(clients: Vec<TcpStream>, by: &str, supervisor: &Supervisor) {
    for mut client in clients {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap_or_else(|error| panic!("{error}\n{}", supervisor.log()));
        assert!(answer.contains(by), "{answer:?}\n{}", supervisor.log());
    }
}

fn upgrade(supervisor: &Supervisor) -> (Output, Proof) {
    let output = supervisor.cli(&["upgrade", "--wait"]);
    let report = supervisor.status().upgrades.remove(0);
    assert!(report.retired, "{report:?}");
    (output, report.proof)
}

#[test]
fn an_upgrade_that_loses_nothing_says_so_in_numbers() {
    let site = Site::new();
    let supervisor = start(&site, &[]);
    let load = Load::start(site.load());
    assert!(load.more(20, PATIENCE));
    site.write("script", "--version 2");
    let (output, proof) = upgrade(&supervisor);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}\n{}", supervisor.log());
    assert!(said.contains(", 0 cut, 0 waited when the old one was gone, 0 reset"), "{said}");
    assert_eq!(proof, Proof { queued_at_switch: proof.queued_at_switch, drained: proof.drained, ..Proof::default() });
    load.stop().assert_clean();
}

/// A process that hangs accepts nothing any more; it is killed, and the kernel moves its queue.
#[test]
fn what_waits_for_one_that_hangs_is_served_by_the_next() {
    let site = Site::new();
    let supervisor = start(&site, &[]);
    assert!(try_request(site.address, "/hang").is_ok());
    let clients = waiting(&site, 30);
    site.write("script", "--version 2");
    let (output, proof) = upgrade(&supervisor);
    answered(clients, "version=2 ", &supervisor);
    assert!(output.status.success(), "{output:?}");
    let wanted = Proof { queued_at_switch: 30, queued_when_gone: 30, moved: 30, ..Proof::default() };
    assert_eq!(proof, Proof { drained: 0, cut: 0, ..wanted }, "{}", supervisor.log());
    assert!(supervisor.log().contains("30 connections waited"), "{}", supervisor.log());
}

/// Where the kernel may not be told to move it, the socket waits for the generation after the next.
#[test]
fn as_an_ordinary_user_what_waits_is_kept_for_the_generation_after_the_next() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("not checked: only root can become another user");
    }
    let site = Site::new();
    let supervisor = start(&site, &crate::places::NOBODY);
    let next = |version: &str, number: u32| {
        site.write("script", version);
        supervisor.signal(nix::sys::signal::Signal::SIGHUP);
        let served = |status: &zddsup::control::types::Status| {
            status.serving.is_some_and(|serving| serving.0 == number) && status.upgrades[0].retired
        };
        supervisor.wait_until("the next one serves alone", served).upgrades.remove(0).proof
    };
    assert!(try_request(site.address, "/hang").is_ok());
    let clients = waiting(&site, 30);
    let proof = next("--version 2", 2);
    assert_eq!((proof.queued_when_gone, proof.kept, proof.reset), (30, 30, 0), "{}", supervisor.log());
    assert!(supervisor.log().contains("net.ipv4.tcp_migrate_req=1"), "{}", supervisor.log());
    let load = Load::start(site.load());
    assert!(load.more(20, PATIENCE));
    let proof = next("--version 3", 3);
    answered(clients, "version=3 ", &supervisor);
    assert!(load.saw("3", PATIENCE));
    load.stop().assert_clean();
    assert!(proof.is_clean(), "{proof:?}\n{}", supervisor.log());
}

#[test]
fn what_waits_at_the_end_is_counted() {
    let site = Site::new();
    let mut supervisor = start(&site, &[]);
    assert!(try_request(site.address, "/hang").is_ok());
    let _clients = waiting(&site, 7);
    supervisor.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(supervisor.wait().success());
    assert!(supervisor.log().contains("7 connections wait at tcp:127.0.0.1:"), "{}", supervisor.log());
}

#[test]
fn what_is_cut_at_the_drain_time_is_counted_and_the_exit_code_tells() {
    let site = Site::new();
    let supervisor = start(&site, &[]);
    let idle = || {
        let mut stream = TcpStream::connect(site.address).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
        stream
    };
    let _kept = [idle(), idle(), idle()];
    site.write("script", "--version 2");
    let (output, proof) = upgrade(&supervisor);
    assert_eq!(output.status.code(), Some(9), "{output:?}\n{}", supervisor.log());
    assert!(String::from_utf8_lossy(&output.stderr).contains("3 drained, 3 cut"), "{output:?}");
    assert_eq!(proof, Proof { drained: 3, cut: 3, ..Proof::default() });
    assert!(supervisor.log().contains("3 connections were left when its drain time was over"), "{}", supervisor.log());
    let shown = supervisor.cli(&["status"]);
    assert!(String::from_utf8_lossy(&shown.stdout).contains("3 cut"), "{shown:?}");
}
