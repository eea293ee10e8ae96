//! What services write to stderr: passed on, kept, and never in their way.

use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::sys::signal::Signal;
use zddsup::core::End;
use zddsup::process::output::{Capture, Output};
use zddsup::process::reaper::Reaper;
use zddsup::process::spawn::spawn;

use crate::children::{alone, end, read_all, shell};

fn output() -> (OwnedFd, Output) {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    (read, Output::new(write).unwrap())
}

/// Writes what is left, and closes our end of the place where it goes.
async fn close(capture: Capture, output: Output) {
    drop(capture);
    // The task that pumped is dropped in its own turn.
    tokio::task::yield_now().await;
    output.flush(Duration::from_secs(60));
}

#[test]
fn stderr_passes_through_unchanged_and_its_last_lines_are_kept() {
    alone(async {
        let reaper = Reaper::new();
        let (read, output) = output();
        let (capture, write) = output.capture().unwrap();
        let mut launch = shell(r"for i in $(seq 30); do echo line $i >&2; done; printf '\033[31m\377 last words' >&2");
        launch.stderr = Some(write);
        let spawned = spawn(launch, &reaper).await.unwrap();
        assert_eq!(end(spawned, &reaper).await, End::Exited(0));
        capture.catch_up();
        let lines = capture.tail().lines();
        assert_eq!((lines.len(), lines[0].as_str(), lines[18].as_str()), (20, "line 12", "line 30"));
        assert_eq!(lines[19], "\\u{1b}[31m\u{fffd} last words");
        close(capture, output).await;
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut std::fs::File::from(read), &mut bytes).unwrap();
        assert!(bytes.starts_with(b"line 1\nline 2\n") && bytes.ends_with(b"line 30\n\x1b[31m\xff last words"));
    });
}

#[test]
fn the_pump_reads_by_itself_and_ends_with_the_last_writer() {
    alone(async {
        let reaper = Reaper::new();
        let (read, output) = output();
        let (capture, write) = output.capture().unwrap();
        // More than fits into the pipe.
        let mut launch = shell("yes 0123456789abcde | head -c 3000000 >&2; echo done >&2");
        launch.stderr = Some(write);
        let received = std::thread::spawn(move || read_all(read));
        let spawned = spawn(launch, &reaper).await.unwrap();
        assert_eq!(end(spawned, &reaper).await, End::Exited(0));
        close(capture, output).await;
        let text = received.join().unwrap();
        assert!(text.ends_with("done\n") && !text.contains("left out"));
        assert_eq!(text.len(), 3_000_005);
    });
}

#[test]
fn a_slow_stderr_of_ours_does_not_stop_a_service() {
    alone(async {
        let reaper = Reaper::new();
        // Nobody reads.
        let (_read, output) = output();
        let (capture, write) = output.capture().unwrap();
        let mut launch = shell("yes 0123456789abcde | head -c 20000000 >&2; echo done >&2");
        launch.stderr = Some(write);
        let spawned = spawn(launch, &reaper).await.unwrap();
        assert_eq!(end(spawned, &reaper).await, End::Exited(0));
        capture.catch_up();
        assert_eq!(capture.tail().lines().last().unwrap(), "done");
    });
}

#[test]
fn a_service_outlives_its_reader() {
    alone(async {
        let reaper = Reaper::new();
        let (_read, output) = output();
        let (capture, write) = output.capture().unwrap();
        let mut launch =
            shell("while [ ! -e /proc/$$/nothing ]; do read line <&3 || break; echo $line >&2 || exit 9; done");
        let (input, feed) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        launch.fds = vec![std::sync::Arc::new(input)];
        launch.stderr = Some(write);
        let spawned = spawn(launch, &reaper).await.unwrap();
        // As when zddsup is killed: the pipe has no other reader any more.
        drop(capture);
        nix::unistd::write(&feed, b"one\ntwo\n").unwrap();
        drop(feed);
        // Neither SIGPIPE nor EPIPE.
        assert_eq!(end(spawned, &reaper).await, End::Exited(0));
    });
}

#[test]
fn the_next_supervisor_goes_on_with_the_pipe() {
    alone(async {
        let reaper = Reaper::new();
        let (_read, output) = output();
        let (capture, write) = output.capture().unwrap();
        let mut launch = shell("echo before >&2; echo up; read line <&3; echo after >&2; exec sleep 60");
        let (input, feed) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let (up, stdout) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        launch.fds = vec![std::sync::Arc::new(input)];
        (launch.stdout, launch.stderr) = (Some(stdout), Some(write));
        let spawned = spawn(launch, &reaper).await.unwrap();
        assert_eq!(nix::unistd::read(&up, &mut [0; 8]).unwrap(), 3);
        capture.catch_up();
        assert_eq!(capture.tail().lines(), ["before"]);
        drop(capture);
        nix::unistd::write(&feed, b"go\n").unwrap();
        let capture = Capture::adopt(&spawned.pidfd.take_fd(2).unwrap(), &output).unwrap();
        while capture.tail().lines() != ["after"] {
            tokio::task::yield_now().await;
        }
        // The service's own fd did not become non-blocking.
        let flags = nix::fcntl::fcntl(spawned.pidfd.take_fd(2).unwrap(), nix::fcntl::FcntlArg::F_GETFL).unwrap();
        assert_eq!(flags & libc::O_NONBLOCK, 0);
        spawned.pidfd.signal(Signal::SIGKILL).unwrap();
        end(spawned, &reaper).await;
    });
}
