//! More than the service can take: queues that overflow, busy processors, clients that all ask at once.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use nix::sys::signal::Signal;

use crate::common::{try_request, wait_for, PATIENCE};
use crate::stage::{clean, Stage};

/// What the kernel has accepted waits for the next version, however long the one before hangs.
#[test]
fn what_waits_in_the_queue_is_answered_by_the_next_version() {
    let stage = Stage::start(&["--drain-timeout", "500ms", "--stop-timeout", "200ms"], "--version 1 --ignore-term");
    let address = stage.address();
    assert!(try_request(address, "/hang").is_ok());
    let mut waiting: Vec<_> = (0..50).map(|_| TcpStream::connect(address).unwrap()).collect();
    for client in &mut waiting {
        client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    }
    stage.next("--version 2");
    stage.upgrade();
    for mut client in waiting {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("version=2 "), "{answer}");
    }
}

/// A queue of four: what does not fit is neither refused nor reset, it is tried again by the client's kernel.
#[test]
fn an_overflowing_queue_refuses_nobody() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let puppet = crate::common::puppet();
    let args = ["--listen", "127.0.0.1:0?backlog=4", "--", &puppet, "--version", "1"];
    let supervisor = crate::common::Setup::within(dir, args).start();
    let address = supervisor.address();
    assert!(try_request(address, "/hang").is_ok());
    let clients: Vec<_> = (0..20).map(|_| std::thread::spawn(move || try_request(address, "/"))).collect();
    supervisor.upgrade();
    for client in clients {
        let answer = client.join().unwrap();
        assert!(answer.as_ref().is_ok_and(|body| body.contains("generation=2")), "{answer:?}");
    }
}

#[test]
fn with_busy_processors_nothing_fails_either() {
    let stop = Arc::new(AtomicBool::new(false));
    let busy: Vec<_> = (0..4)
        .map(|_| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || while !stop.load(Ordering::Relaxed) {})
        })
        .collect();
    let stage = Stage::start(&["--max-draining", "10"], "--version 1");
    let loads = [stage.load(), stage.keep_alive_load()];
    for version in 2..6 {
        stage.next(&format!("--version {version}"));
        for _ in 0..50 {
            stage.signal(Signal::SIGHUP);
        }
        for load in &loads {
            assert!(load.saw(&version.to_string(), PATIENCE), "{}", load.so_far());
        }
    }
    stop.store(true, Ordering::Relaxed);
    for thread in busy {
        thread.join().unwrap();
    }
    clean(loads);
}

#[test]
fn clients_that_ask_for_everything_at_once_leave_one_serving() {
    let stage = Stage::start(&["--max-draining", "10", "--bake", "20ms"], "--version 1");
    let loads = [stage.load(), stage.keep_alive_load()];
    let asked = |what: &'static str| {
        let mut commands: Vec<_> = (0..8).map(|_| stage.cli_command(&[what])).collect();
        std::thread::spawn(move || {
            for command in &mut commands {
                let code = command.stderr(std::process::Stdio::null()).status().unwrap().code();
                // Done, rolled back or called off, refused: never anything else.
                assert!(matches!(code, Some(0 | 6 | 7)), "{what}: {code:?}");
            }
        })
    };
    for thread in ["upgrade", "rollback", "restart"].map(asked) {
        thread.join().unwrap();
    }
    stage.wait_settled();
    clean(loads);
    wait_for("one generation serves", || stage.status().serving.is_some());
}
