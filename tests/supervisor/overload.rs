//! More than a service, or the machine, can take.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::Signal;
use zddsup::control::types::UpgradeResult;

use crate::common::load::Failure;
use crate::common::{request, PATIENCE};
use crate::stage::{clean, Stage};
use crate::watched::lives;

/// Threads that use all of the machine until dropped.
struct Pressure {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Pressure {
    fn start(threads: usize) -> Pressure {
        let over = Arc::new(AtomicBool::new(false));
        let busy = |_| {
            let over = Arc::clone(&over);
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })
        };
        let threads = (0..threads).map(busy).collect();
        Pressure { over, threads }
    }
}

impl Drop for Pressure {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _it_only_spins = thread.join();
        }
    }
}

#[test]
fn what_the_kernel_completed_is_answered_by_the_next_version_although_the_queue_overflowed() {
    const CLIENTS: usize = 50;
    let flags = ["--stop-timeout", "200ms", "--drain-timeout", "200ms"];
    let stage = Stage::start_on("127.0.0.1:0?backlog=4", &flags, "--version 1");
    let address = stage.address();
    // It accepts nothing any more.
    let mut hung = TcpStream::connect(address).unwrap();
    hung.write_all(b"GET /hang HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    stage.wait_until("it is connected", |status| status.generations.iter().any(|one| one.connections == Some(1)));
    let mut answer = [0; 1];
    assert_eq!(hung.read(&mut answer).unwrap(), 1);

    let client = move || {
        // Past the queue's end the kernel drops what comes, and the client's kernel tries again, after 1 s, 2 s, ….
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        std::io::Result::Ok(answer)
    };
    let clients: Vec<_> = (0..CLIENTS).map(|_| std::thread::spawn(client)).collect();
    // Connections that are waiting to be accepted, as the kernel counts them: more than it was to be.
    crate::common::wait_for("the queue is full", || waiting(address) > 4);
    stage.next("--version 2");
    stage.upgrade();
    let (mut answered, mut not_completed) = (0, 0);
    for client in clients {
        match client.join().unwrap() {
            Ok(answer) => {
                assert!(answer.contains("version=2 "), "{answer}");
                answered += 1;
            }
            Err(error) if error.kind() == std::io::ErrorKind::TimedOut => not_completed += 1,
            Err(error) => panic!("a connection that the kernel completed: {error}"),
        }
    }
    println!("{answered} answered, {not_completed} were never connected");
    assert!(answered > 4);
}

/// Connections in a listener's accept queue (the column `rx_queue` of `/proc/net/tcp`).
fn waiting(address: std::net::SocketAddr) -> u32 {
    let entries = procfs::net::tcp().unwrap();
    let ours =
        entries.iter().find(|entry| entry.local_address == address && entry.state == procfs::net::TcpState::Listen);
    ours.map_or(0, |entry| entry.rx_queue)
}

#[test]
fn a_storm_of_hangups_on_a_busy_machine() {
    let stage = Stage::start(&["--max-draining", "20"], "--version 1");
    let _pressure = Pressure::start(2);
    let loads = [stage.load(), stage.keep_alive_load()];
    for version in 2..=10 {
        stage.next(&format!("--version {version}"));
        for _ in 0..100 {
            stage.signal(Signal::SIGHUP);
        }
        assert!(loads[0].more(5, PATIENCE), "{}", loads[0].so_far());
    }
    for load in &loads {
        assert!(load.saw("10", PATIENCE), "{}", load.so_far());
    }
    stage.wait_settled();
    clean(loads);
}

#[test]
fn the_new_version_serves_although_the_old_one_does_not_go() {
    let flags = ["--drain-timeout", "2s", "--stop-timeout", "2s"];
    let stage = Stage::start(&flags, "--version 1 --ignore-term");
    let load = stage.load();
    let old = stage.serving().pid.unwrap();
    stage.next("--version 2");
    stage.upgrade();
    // Both accept from one queue: the old one does not hear that it should not.
    assert!(load.saw("2", PATIENCE), "{}", load.so_far());
    assert!(lives(old));
    stage.wait_settled();
    assert!(!lives(old));
    assert!(request(stage.address(), "/").contains("version=2 "));
    // What it had accepted may have died with it; nobody was refused.
    let summary = load.stop();
    assert!(!summary.failures.contains_key(&Failure::Refused), "{summary}");
    assert!(summary.failed() <= 2, "{summary}");
}

#[test]
fn two_clients_that_ask_for_everything_all_the_time() {
    const TURNS: usize = 30;
    let stage = Stage::start(&["--max-draining", "50"], "--version 1");
    let loads = [stage.load(), stage.keep_alive_load()];
    let client = |first: usize| {
        let wishes = ["upgrade", "rollback", "restart"];
        for turn in 0..TURNS {
            let output = stage.cli(&[wishes[(first + turn) % wishes.len()]]);
            // 0: done; otherwise another one's wish came between, or there is nothing to go back to yet.
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.code().is_some_and(|code| code < 100), "{said}");
            assert!(!said.contains("panicked"), "{said}");
        }
    };
    std::thread::scope(|scope| {
        let clients = [scope.spawn(|| client(0)), scope.spawn(|| client(1))];
        for client in clients {
            client.join().unwrap();
        }
    });
    for load in &loads {
        assert!(load.more(20, PATIENCE));
    }
    clean(loads);
    let status = stage.wait_settled();
    assert!(status.upgrades.iter().all(|report| report.result != Some(UpgradeResult::Failed)), "{status:#?}");
    assert_eq!(status.restarts, 0);
    let pid = stage.serving().pid.unwrap();
    assert!(request(stage.address(), "/").contains(&format!("pid={pid} ")));
    assert!(!stage.log().contains("panicked"));
}
