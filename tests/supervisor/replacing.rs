//! Promise 8: another zddsup takes the place of the running one, whatever is under way, and no connection notices.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use zddsup::control::types::{GenerationPhase, ServicePhase};

use crate::common::load::Load;
use crate::common::{request, wait_for, PATIENCE, ZDDSUP};
use crate::seen::own_address;
use crate::stage::Stage;
use crate::watched::Rest;

/// How often in a row.
const MANY: u64 = 200;

fn loads(stage: &Stage) -> [Load; 2] {
    [stage.load(), stage.keep_alive_load()]
}

/// Nothing failed, and these versions answered, one after the other.
#[track_caller]
fn clean(stage: &Stage, loads: [Load; 2], versions: &[&str]) {
    for load in loads {
        assert!(load.saw(versions[versions.len() - 1], PATIENCE), "{}\n{}", load.so_far(), stage.log());
        assert!(load.more(20, PATIENCE), "{}\n{}", load.so_far(), stage.log());
        let summary = load.stop();
        summary.assert_clean();
        assert_eq!(summary.order(), versions, "{summary}");
    }
}

/// A program that is a script.
fn script(stage: &Stage, name: &str, text: &str) -> PathBuf {
    let path = stage.dir.path().join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    path
}

fn begin(stage: &Stage, args: &[&str]) -> Child {
    stage.cli_command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[track_caller]
fn ends_well(stage: &Stage, child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}\n{}", stage.log());
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_service_that_serves_notices_nothing() {
    let stage = Stage::start(&[], "--version 1 --spawn-grandchild");
    let loads = loads(&stage);
    let (serving, history) = (stage.serving(), stage.status().upgrades);
    for _ in 0..3 {
        stage.self_upgrade();
        assert_eq!(stage.serving().pid, serving.pid, "{}", stage.log());
    }
    let status = stage.status();
    assert_eq!(status.upgrades, history, "what was done is remembered");
    assert_eq!(status.supervisor.version, env!("CARGO_PKG_VERSION"));
    stage.next("--version 2");
    stage.upgrade();
    stage.wait_settled();
    stage.self_upgrade();
    clean(&stage, loads, &["1", "2"]);
    assert!(stage.cli(&["rollback"]).status.success(), "{}", stage.log());
    assert_eq!(stage.serving().number.0, 3);
    // What it started is its own child still.
    stage.signal(Signal::SIGTERM);
    let mut stage = stage;
    assert!(stage.supervisor.wait().success(), "{}", stage.log());
}

/// The first socket of the address, which zddsup bound, is closed by then: the next ones are what goes on.
#[test]
fn where_each_generation_has_a_socket_of_its_own() {
    for flags in [&["--switch", "steered"][..], &["--switch", "steered", "--bake", "300ms"]] {
        let stage = Stage::start(flags, "--version 1");
        let loads = loads(&stage);
        for version in 2..5 {
            stage.next(&format!("--version {version}"));
            stage.upgrade();
            stage.wait_settled();
            stage.self_upgrade();
        }
        clean(&stage, loads, &["1", "2", "3", "4"]);
    }
}

#[test]
fn while_a_candidate_starts() {
    let stage = Stage::start(&[], "--version 1");
    let loads = loads(&stage);
    stage.next("--version 2 --ready none --also-bind 127.0.0.1:0");
    let upgrade = begin(&stage, &["upgrade"]);
    stage.wait_for_log("puppet: listens on ");
    let own = own_address(&stage.log());
    stage.self_upgrade();
    let status = stage.status();
    assert_eq!(status.phase, ServicePhase::Upgrading);
    assert!(status.generations.iter().any(|one| one.number.0 == 2 && one.phase == GenerationPhase::Starting));
    // Its notify socket is the same.
    assert!(request(own, "/notify?text=READY=1").contains("version=2 "));
    ends_well(&stage, upgrade);
    for load in loads {
        assert!(load.saw("2", PATIENCE));
        load.stop().assert_clean();
    }
}

#[test]
fn while_it_bakes_and_back() {
    let stage = Stage::start(&["--bake", "60s"], "--version 1");
    let loads = loads(&stage);
    stage.next("--version 2");
    stage.signal(Signal::SIGHUP);
    stage.wait_until("it bakes", |status| status.phase == ServicePhase::Baking);
    stage.self_upgrade();
    let status = stage.status();
    assert_eq!(status.phase, ServicePhase::Baking);
    // The one on standby is switched back to at once.
    let output = stage.cli(&["rollback"]);
    assert!(output.status.success(), "{output:?}\n{}", stage.log());
    assert_eq!(stage.serving().number.0, 1);
    for load in loads {
        assert!(load.more(20, PATIENCE));
        load.stop().assert_clean();
    }
    stage.wait_settled();
}

#[test]
fn while_an_old_generation_drains_and_whoever_waits_is_answered() {
    let stage = Stage::start(&[], "--version 1 --drain-ms 1500");
    let loads = loads(&stage);
    stage.next("--version 2");
    let waiting = begin(&stage, &["upgrade", "--wait"]);
    let events = begin(&stage, &["events"]);
    stage.wait_until("the old one drains", |status| {
        status.generations.iter().any(|one| one.phase == GenerationPhase::Draining)
    });
    stage.self_upgrade();
    assert!(stage.status().generations.iter().any(|one| one.phase == GenerationPhase::Draining), "{}", stage.log());
    let said = ends_well(&stage, waiting);
    assert!(said.contains("generation 2 serves in the place of generation 1"), "{said}");
    let status = stage.wait_settled();
    let retired = status.generations.iter().find(|one| one.number.0 == 1).unwrap();
    assert_eq!(retired.end.as_deref(), Some("exited with status 0"), "its end is known: it is our child still");
    clean(&stage, loads, &["1", "2"]);
    stage.signal(Signal::SIGTERM);
    let said = ends_well(&stage, events);
    assert!(said.contains("retired"), "it was followed on: {said}");
}

#[test]
fn while_nobody_serves_and_the_next_start_is_due() {
    let stage = Stage::start(&["--restart-limit", "off"], "--version 1");
    let address = stage.address();
    stage.next("--version 2 --exit-before-ready 3");
    kill(Pid::from_raw(stage.serving().pid.unwrap()), Signal::SIGKILL).unwrap();
    stage.wait_until("it is tried again and again", |status| {
        status.phase == ServicePhase::Restarting && status.restarts > 2
    });
    // What is spawned just then is waited for.
    stage.self_upgrade();
    stage.next("--version 3");
    assert!(stage.cli(&["upgrade"]).status.success(), "{}", stage.log());
    assert!(request(address, "/").contains("version=3 "));
}

#[test]
fn while_it_is_a_lame_duck() {
    let stage = Stage::start(&["--lame-duck", "60s"], "--version 1");
    let load = stage.load();
    stage.signal(Signal::SIGTERM);
    stage.wait_until("it is one", |status| status.phase == ServicePhase::LameDuck);
    stage.self_upgrade();
    assert_eq!(stage.status().phase, ServicePhase::LameDuck);
    assert!(load.more(20, PATIENCE));
    load.stop().assert_clean();
    stage.signal(Signal::SIGTERM);
    let mut stage = stage;
    assert!(stage.supervisor.wait().success(), "{}", stage.log());
}

#[test]
fn an_upgrade_of_both_at_once() {
    let stage = Stage::start(&[], "--version 1");
    let loads = loads(&stage);
    stage.next("--version 2");
    // In whatever moment of its spawn the other comes.
    stage.signal(Signal::SIGHUP);
    stage.signal(Signal::SIGUSR2);
    stage.wait_until("both are done", |status| {
        status.supervisor.replaced == 1 && status.serving.is_some_and(|serving| serving.0 == 2)
    });
    stage.next("--version 3");
    stage.signal(Signal::SIGUSR2);
    stage.signal(Signal::SIGHUP);
    stage.wait_until("both are done again", |status| {
        status.supervisor.replaced == 2 && status.serving.is_some_and(|serving| serving.0 == 3)
    });
    clean(&stage, loads, &["1", "2", "3"]);
}

#[test]
fn two_hundred_times_with_flat_fds_and_memory() {
    let stage = Stage::start(&["--bake", "0"], "--version 1 --fdstore cache --spawn-grandchild");
    stage.wait_until("something is stored", |status| status.stored_fds == 1);
    stage.next("--version 1 --spawn-grandchild");
    let rest = Rest::of(&stage);
    let loads = loads(&stage);
    for number in 1..=MANY {
        stage.self_upgrade();
        if number % 50 == 0 {
            stage.upgrade();
        }
    }
    for load in loads {
        load.stop().assert_clean();
    }
    stage.wait_settled();
    assert_eq!(request(stage.address(), "/stored"), "cache=1");
    rest.is_back();
}

#[test]
fn its_end_is_known_whenever_it_comes() {
    let stage = Stage::start(&["--restart-limit", "off"], "--version 1");
    for number in 2..12 {
        let serving = stage.serving();
        stage.signal(Signal::SIGUSR2);
        kill(Pid::from_raw(serving.pid.unwrap()), Signal::SIGKILL).unwrap();
        let status = stage.wait_until("another one serves", |status| {
            status.serving.is_some_and(|serving| serving.0 == number)
                && status.supervisor.replaced == u64::from(number) - 1
        });
        let dead = status.generations.iter().find(|one| one.number == serving.number).unwrap();
        assert_eq!(dead.end.as_deref(), Some("was killed by SIGKILL"), "{}", stage.log());
    }
}

#[test]
fn a_program_that_cannot_changes_nothing() {
    let stage = Stage::start_by_link(&["--drain-timeout", "60s"], "--version 1");
    let loads = loads(&stage);
    let serving = stage.serving();
    let corrupt = stage.dir.path().join("corrupt");
    let mut file = fs::File::create(&corrupt).unwrap();
    // Its beginning, as of a copy that was cut off.
    let whole = fs::read(ZDDSUP).unwrap();
    file.write_all(&whole[..100_000]).unwrap();
    drop(file);
    fs::set_permissions(&corrupt, Permissions::from_mode(0o755)).unwrap();
    let text = stage.dir.path().join("text");
    fs::write(&text, "no program").unwrap();
    fs::set_permissions(&text, Permissions::from_mode(0o755)).unwrap();
    let plain = stage.dir.path().join("plain");
    fs::write(&plain, "").unwrap();
    for (program, part) in [
        (corrupt, "cannot"),
        (text, "cannot be executed"),
        (plain, "chmod +x"),
        (stage.dir.path().join("none"), "there is no program"),
        ("/bin/true".into(), "did not say that it can"),
        (script(&stage, "newer", "echo 'zddsup: the state has format 1' >&2; exit 1"), "the state has format 1"),
        (script(&stage, "shouts", "yes"), "did not answer within"),
        (script(&stage, "crashes", "kill -SEGV $$"), "was killed by SIGSEGV"),
    ] {
        stage.put(&program);
        let output = stage.cli(&["self-upgrade"]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(6), "{program:?}: {said}\n{}", stage.log());
        assert!(said.contains(part), "{program:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        let status = stage.status();
        assert_eq!((status.supervisor.replaced, status.serving), (0, Some(serving.number)));
    }
    // The same by a signal: the log says it.
    stage.put(Path::new("/bin/true"));
    stage.signal(Signal::SIGUSR2);
    wait_for("the log says it", || stage.log().matches("the program is not replaced: ").count() == 9);
    stage.put(Path::new(ZDDSUP));
    stage.self_upgrade();
    stage.next("--version 2");
    stage.upgrade();
    clean(&stage, loads, &["1", "2"]);
}

/// After the trial there is no way back but this: the old one goes on with all that it had.
#[test]
fn a_program_that_cannot_be_executed_after_all_changes_nothing() {
    let stage = Stage::start_by_link(&[], "--version 1");
    let loads = loads(&stage);
    let passes = "echo 'zddsup can go on with this service'";
    for (number, (name, then)) in [("locked", "chmod -x \"$0\""), ("changed", "echo >> \"$0\"")].into_iter().enumerate()
    {
        stage.put(&script(&stage, name, &format!("{then}; {passes}")));
        let output = stage.cli(&["self-upgrade"]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}\n{}", stage.log());
        assert!(said.contains("the old one goes on"), "{said}");
        assert_eq!(stage.status().supervisor.replaced, 0);
        // It hears its generations still.
        let text = format!("heard{number}");
        assert!(request(stage.address(), &format!("/notify?text=STATUS={text}")).contains("version=1 "));
        stage.wait_until("it is heard", |status| {
            status.generations.iter().any(|one| one.status.as_deref() == Some(text.as_str()))
        });
    }
    stage.next("--version 2");
    stage.upgrade();
    stage.put(Path::new(ZDDSUP));
    stage.self_upgrade();
    clean(&stage, loads, &["1", "2"]);
}

/// A document that is kept as it was written once.
fn recorded(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// What zddsup says to a state.
fn tried(state: &Path, args: &[&str]) -> (Option<i32>, String, String) {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(ZDDSUP);
    command.args(["run", "--name", "web"]).args(args).args(["--", "/bin/true"]);
    command.env("ZDDSUP_TRIAL", "1").env("XDG_RUNTIME_DIR", dir.path()).stdin(fs::File::open(state).unwrap());
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn the_states_of_former_formats_can_be_gone_on_with() {
    for name in ["state-1-steered.txt", "state-1-adopt.txt"] {
        let listen: &[&str] = if name.contains("adopt") { &[] } else { &["--listen", "http=127.0.0.1:0"] };
        let (code, said, complained) = tried(&recorded(name), listen);
        assert_eq!((code, said.trim()), (Some(0), "zddsup can go on with this service"), "{name}: {complained}");
    }
}

#[test]
fn a_state_that_is_none_or_another_one_s_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let good = fs::read_to_string(recorded("state-1-adopt.txt")).unwrap();
    let newer = good.replacen("\"format\":1", "\"format\":2", 1);
    let other = good.replacen("\"service\":\"web\"", "\"service\":\"api\"", 1);
    for (state, args, part) in [
        ("", &[][..], "not a supervisor's state"),
        (&good[..good.len() / 2], &[], "cannot be read"),
        (&newer, &[], "format 2"),
        (&other, &[], "of service api"),
        (&good, &["--listen", "127.0.0.1:0"], "listeners"),
        (&good, &["--env-file", "/nonexistent"], "/nonexistent"),
        (&good, &["--user", "nobody-of-that-name"], "nobody-of-that-name"),
    ] {
        fs::write(&path, state).unwrap();
        let (code, said, complained) = tried(&path, args);
        assert_ne!(code, Some(0), "{part}: {said}");
        assert!(complained.contains(part) && complained.lines().count() == 1, "{part}: {complained}");
    }
}

#[test]
fn a_variable_that_somebody_else_set_is_refused() {
    for value in ["", "x", "1", "1000000", "99999999999"] {
        let mut command = Command::new(ZDDSUP);
        command.args(["run", "--", "/bin/true"]).env("ZDDSUP_STATE", value).stdin(Stdio::null());
        let output = command.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("ZDDSUP_STATE") && said.contains("unset it"), "{said}");
    }
}
