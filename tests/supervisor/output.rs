//! What a service writes: passed on unchanged, in order, and never a reason to wait.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::mpsc;
use std::sync::Arc;

use nix::sys::signal::Signal;
use zddsup::control::types::UpgradeResult;

use crate::common::{puppet, request, Setup, Supervisor, PATIENCE};
use crate::stage::Stage;

/// Every byte, and a line that is longer than any buffer; no line's end at the end. Less than what zddsup holds for a slow
/// stderr, so that nothing may be missing however slow this machine is.
fn difficult_bytes() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..=255).cycle().take(64 * 1024).collect();
    bytes.extend(b"\n\n\r\n\0\n");
    bytes.extend(std::iter::repeat_n(b'x', 300 * 1024));
    bytes.extend("\nä€ \x1b[31mred".as_bytes());
    bytes.extend(b"\xff\xfe no end");
    bytes
}

/// A shell script as the service, with zddsup's stdout and stderr in files; zddsup itself says nothing.
fn script(dir: &Arc<tempfile::TempDir>, script: &str) -> Supervisor {
    let args = ["--log-level", "error", "--ready", "delay:10ms", "--", "sh", "-c", script];
    let into_files = ["sh", "-c", "exec \"$@\" >stdout 2>stderr", "sh"];
    Setup::within(Arc::clone(dir), args).through(&into_files).start()
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

/// Compared without printing half a megabyte.
#[track_caller]
fn same(file: &Path, wanted: &[u8]) {
    let found = read(file);
    let differs = found.iter().zip(wanted).position(|(found, wanted)| found != wanted);
    assert_eq!((found.len(), differs), (wanted.len(), None), "{}", file.display());
}

#[test]
fn every_byte_passes_through_unchanged() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let bytes = difficult_bytes();
    std::fs::write(dir.path().join("bytes"), &bytes).unwrap();
    let mut supervisor = script(&dir, "cat bytes; cat bytes >&2; : >done; exec sleep 1000");
    crate::common::wait_for("all is written", || dir.path().join("done").exists());
    supervisor.signal(Signal::SIGTERM);
    assert_eq!(supervisor.wait().code(), Some(0));
    same(&dir.path().join("stdout"), &bytes);
    same(&dir.path().join("stderr"), &bytes);
}

#[test]
fn lines_stay_in_order() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let count = "i=0; while [ $i -lt 5000 ]; do i=$((i+1)); echo line $i; echo line $i >&2; done";
    let mut supervisor = script(&dir, &format!("{count}; : >done; exec sleep 1000"));
    crate::common::wait_for("all is written", || dir.path().join("done").exists());
    supervisor.signal(Signal::SIGTERM);
    assert_eq!(supervisor.wait().code(), Some(0));
    let wanted: String = (1..=5000).fold(String::new(), |text, i| text + &format!("line {i}\n"));
    same(&dir.path().join("stdout"), wanted.as_bytes());
    same(&dir.path().join("stderr"), wanted.as_bytes());
}

/// zddsup's own stderr is a pipe that is full and that nobody reads.
#[test]
fn a_stderr_that_nobody_reads_stops_nobody() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let puppet = puppet();
    let args = ["--listen", "127.0.0.1:0", "--ready", "notify", "--", &puppet];
    // Open for reading too, so that it is a full pipe and not a broken one.
    let stuck = ["sh", "-c", "mkfifo stuck; exec 2<>stuck; exec \"$@\"", "sh"];
    let mut supervisor = Setup::within(Arc::clone(&dir), args).through(&stuck).start();
    let address = supervisor.address();
    // More than the pipe, zddsup's queue and the service's own pipe hold together.
    let flood = |letter: &str| {
        for _ in 0..128 {
            let text = letter.repeat(32 * 1024 - 100);
            assert!(post(address, &text).contains("version="));
        }
    };
    flood("a");
    supervisor.upgrade();
    supervisor.wait_settled();
    flood("b");
    supervisor.signal(Signal::SIGHUP);
    supervisor.wait_until("the third serves", |status| status.serving.is_some_and(|serving| serving.0 == 3));
    supervisor.wait_settled();
    assert!(request(address, "/").contains("generation=3"));
    // Somebody reads again: what is missing is counted.
    let (sender, receiver) = mpsc::channel();
    let mut fifo = File::open(dir.path().join("stuck")).unwrap();
    std::thread::spawn(move || {
        let (mut text, mut buffer) = (Vec::<u8>::new(), vec![0; 64 * 1024]);
        while let Ok(1..) = fifo.read(&mut buffer).inspect(|&count| text.extend(&buffer[..count])) {
            let note = b"bytes of output were left out\n";
            if text.windows(note.len()).any(|window| window == note) {
                let _test_is_over = sender.send(());
                return;
            }
        }
    });
    receiver.recv_timeout(PATIENCE).expect("a note about what was left out");
    supervisor.signal(Signal::SIGTERM);
    assert_eq!(supervisor.wait().code(), Some(0));
}

/// `/stderr?text=…`: a request whose head is as long as the text.
fn post(address: std::net::SocketAddr, text: &str) -> String {
    request(address, &format!("/stderr?text={text}"))
}

#[test]
fn a_zddsup_that_stops_with_a_stuck_stderr_ends_all_the_same() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let puppet = puppet();
    let args = ["--listen", "127.0.0.1:0", "--ready", "notify", "--", &puppet];
    let stuck = ["sh", "-c", "mkfifo stuck; exec 2<>stuck; exec \"$@\"", "sh"];
    let mut supervisor = Setup::within(Arc::clone(&dir), args).through(&stuck).start();
    for _ in 0..8 {
        post(supervisor.address(), &"x".repeat(32 * 1024 - 100));
    }
    supervisor.signal(Signal::SIGTERM);
    assert_eq!(supervisor.wait().code(), Some(0));
}

#[test]
fn the_last_lines_of_each_failed_version_are_in_its_report() {
    let stage = Stage::start(&["--ready", "notify"], "--version 1 --stderr of-the-first");
    let lines: String = (1..=30).fold(String::new(), |text, i| text + &format!(" --stderr second-{i}"));
    stage.next(&format!("--version 2{lines} --exit-before-ready 2"));
    assert_eq!(stage.cli(&["upgrade"]).status.code(), Some(3));
    stage.next("--version 3 --stderr of-the-third --exit-before-ready 3");
    let output = stage.cli(&["upgrade"]);
    assert_eq!(output.status.code(), Some(3));
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(printed.contains("of-the-third") && !printed.contains("second-"), "{printed}");
    let failed = stage.status().upgrades.into_iter().filter(|report| report.result == Some(UpgradeResult::Failed));
    let stderr: Vec<_> = failed.map(|report| report.stderr).collect();
    let last: Vec<String> = (11..=30).map(|i| format!("second-{i}")).collect();
    assert_eq!(stderr, [vec!["of-the-third".to_owned()], last]);
    // All of it passed through.
    assert!((1..=30).all(|i| stage.log().contains(&format!("second-{i}\n"))), "{}", stage.log());
}
