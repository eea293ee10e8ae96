//! `demo.sh` with the programs that cargo built for this test: it shows what it says, and leaves nothing.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::common::{processes_with, wait_for, ZDDSUP};
use crate::{program, source};

/// The script, run in a directory that is not this repository's, with a place of its own for what it writes.
struct Demo {
    directory: tempfile::TempDir,
}

impl Demo {
    fn new() -> Demo {
        Demo { directory: tempfile::tempdir().unwrap() }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("bash");
        command.arg(source("demo.sh")).args(args).current_dir(self.directory.path()).stdin(Stdio::null());
        command.env("TMPDIR", self.directory.path()).env("ZDDSUP_DEMO_BIN", Path::new(ZDDSUP).parent().unwrap());
        command.env_remove("NOTIFY_SOCKET").env_remove("ZDDSUP_DEMO_SERVER");
        command
    }

    fn run(&self, server: &str) -> Output {
        self.command(&["4"]).env("ZDDSUP_DEMO_SERVER", server).output().unwrap()
    }

    /// No process and no file.
    fn assert_nothing_left(&self) {
        let place = self.directory.path().to_str().unwrap();
        assert_eq!(processes_with(place), [0; 0]);
        assert_eq!(std::fs::read_dir(place).unwrap().count(), 0);
    }
}

fn assert_shows_all(output: &Output) {
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(text.matches(": 0 failed\n").count(), 2, "{text}");
    for version in 2..=6 {
        assert!(text.contains(&format!("upgrade {version} succeeded: generation {version} serves")), "{text}");
    }
    assert!(text.contains("   1 s ") && text.contains(" failed   version 1 answered "), "{text}");
    assert!(text.ends_with("Five upgrades, no failed request.\n"), "{text}");
    assert!(!text.contains('\u{1b}'), "{text}");
}

#[test]
fn with_python() {
    let Some(_) = program(&["python3"], "--version") else { return };
    let demo = Demo::new();
    let output = demo.run("");
    assert_shows_all(&output);
    assert!(String::from_utf8_lossy(&output.stdout).contains("-- python3 server.py\n"), "{output:?}");
    demo.assert_nothing_left();
}

#[test]
fn without_python() {
    let demo = Demo::new();
    let output = demo.run("rust");
    assert_shows_all(&output);
    assert!(String::from_utf8_lossy(&output.stdout).contains("-- axum_hello\n"), "{output:?}");
    demo.assert_nothing_left();
}

/// Killed where it is left behind, and whatever it started.
struct Ended<'a>(Child, &'a Demo);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let _gone_already = self.0.kill();
        let _reaped_already = self.0.wait();
        for pid in processes_with(self.1.directory.path().to_str().unwrap()) {
            let _gone_already = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

#[test]
fn interrupted_it_leaves_nothing_either() {
    let demo = Demo::new();
    let mut command = demo.command(&["60"]);
    let child = command.env("ZDDSUP_DEMO_SERVER", "rust").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut demo_run = Ended(child.unwrap(), &demo);
    let mut lines = BufReader::new(demo_run.0.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains(" answered ") {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0, "it ended by itself");
    }
    kill(Pid::from_raw(demo_run.0.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    lines.read_to_end(&mut Vec::new()).unwrap();
    assert!(!demo_run.0.wait().unwrap().success());
    wait_for("it has tidied up", || processes_with(demo.directory.path().to_str().unwrap()).is_empty());
    demo.assert_nothing_left();
}

#[test]
fn a_wrong_argument_is_refused_before_anything_runs() {
    let demo = Demo::new();
    for wrong in ["0", "-1", "soon"] {
        let output = demo.command(&[wrong]).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains("usage: examples/demo.sh [SECONDS]"));
    }
    demo.assert_nothing_left();
}
