//! Promise 6: what a generation inherits, and nothing else, whatever zddsup itself was started with.

use std::fs::File;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::Arc;

use nix::sys::signal::Signal;

use crate::common::{puppet, request, Setup, Supervisor, PATIENCE};
use crate::seen::{environ, facts, inherited_fds, is_root};

/// What a puppet was started with, under a zddsup that `wrapper` starts.
fn inherited(wrapper: &[&str], flags: &[&str]) -> (Supervisor, String) {
    let puppet = puppet();
    let args = [&["--listen", "127.0.0.1:0"], flags, &["--", &puppet]].concat();
    let supervisor = Setup::new(args).through(wrapper).start();
    let text = request(supervisor.address(), "/inherited");
    (supervisor, text)
}

const PLAIN: [&str; 1] = ["env"];

/// What a program that changes nothing itself says about itself: stdout of `program` as the whole service.
fn stdout_of(wrapper: &[&str], flags: &[&str], program: &[&str]) -> String {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let file = dir.path().join("stdout");
    let args = [flags, &["--restart", "never", "--"], program].concat();
    let mut setup = Setup::within(Arc::clone(&dir), args).through(wrapper);
    setup.command().stdout(File::create(&file).unwrap());
    let mut supervisor = setup.spawn();
    supervisor.wait();
    let text = std::fs::read_to_string(file).unwrap();
    assert!(!text.is_empty(), "{}", supervisor.log());
    text
}

/// `NAME: value` lines of /proc/PID/status.
fn status_line<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).split_whitespace().collect()
}

#[test]
fn open_are_0_1_2_and_what_was_handed() {
    let careless = "exec 5</dev/zero 7>/dev/full 3</dev/zero 9</dev/zero; exec \"$@\"";
    for wrapper in [&PLAIN[..], &["sh", "-c", careless, "sh"]] {
        let (supervisor, text) = inherited(wrapper, &[]);
        let fds = inherited_fds(&text);
        assert_eq!(fds.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3, 4], "{text}");
        assert_eq!(fds[&0], "/dev/null");
        assert!(fds[&2].starts_with("pipe:") && fds[&3].starts_with("socket:") && fds[&4].starts_with("socket:"));
        // The next generation too, with the first one's fds open in zddsup.
        supervisor.upgrade();
        supervisor.wait_settled();
        let text = request(supervisor.address(), "/inherited");
        assert_eq!(inherited_fds(&text).len(), 5, "{text}");
    }
}

#[test]
fn signals_have_their_default_dispositions_and_none_is_blocked() {
    let careless = ["env", "--ignore-signal=PIPE,INT,HUP,USR1,CHLD", "--block-signal=TERM,USR2,CHLD,INT"];
    for wrapper in [&PLAIN[..], &careless] {
        let text = stdout_of(wrapper, &[], &["cat", "/proc/self/status"]);
        for set in ["SigIgn", "SigBlk", "SigCgt", "SigPnd", "ShdPnd"] {
            assert_eq!(status_line(&text, set), ["0000000000000000"], "{wrapper:?} {set}");
        }
    }
}

#[test]
fn zddsup_itself_works_with_signals_that_were_ignored_and_blocked() {
    let careless = ["env", "--ignore-signal=INT,HUP,CHLD,TERM", "--block-signal=TERM,CHLD,HUP"];
    let (mut supervisor, _) = inherited(&careless, &[]);
    supervisor.signal(Signal::SIGHUP);
    supervisor.wait_until("it was upgraded", |status| status.serving.is_some_and(|serving| serving.0 == 2));
    supervisor.wait_settled();
    supervisor.signal(Signal::SIGTERM);
    assert_eq!(supervisor.wait().code(), Some(0));
}

#[test]
fn it_leads_a_process_group_of_its_own_in_zddsups_session() {
    let (supervisor, text) = inherited(&PLAIN, &[]);
    let facts = facts(&text);
    assert_eq!(facts["pgrp"], facts["pid"]);
    let session = nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(supervisor.pid()))).unwrap();
    assert_eq!(facts["session"], session.to_string());
    assert_eq!(facts["PPid"], supervisor.pid().to_string());
}

#[test]
fn umask_and_niceness_are_zddsups_own_unless_they_are_given() {
    let wrapper = ["sh", "-c", "umask 027; exec nice -n 3 \"$@\"", "sh"];
    let (_supervisor, text) = inherited(&wrapper, &[]);
    assert_eq!((facts(&text)["Umask"], facts(&text)["nice"]), ("0027", "3"));
    let (_supervisor, text) = inherited(&wrapper, &["--umask", "077", "--nice", "5"]);
    assert_eq!((facts(&text)["Umask"], facts(&text)["nice"]), ("0077", "5"));
}

#[test]
fn limits_are_those_that_zddsup_was_started_with_unless_they_are_given() {
    let wrapper = ["sh", "-c", "ulimit -Sn 200; ulimit -Hn 400; exec \"$@\"", "sh"];
    let (supervisor, text) = inherited(&wrapper, &[]);
    assert!(text.contains("Max open files 200 400"), "{text}");
    // zddsup's own was raised, as it holds fds for many.
    let own = std::fs::read_to_string(format!("/proc/{}/limits", supervisor.pid())).unwrap();
    let own = own.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(own.split_whitespace().collect::<Vec<_>>()[3..5], ["400", "400"]);
    let (_supervisor, text) = inherited(&wrapper, &["--limit", "nofile=64:128", "--limit", "core=0"]);
    assert!(text.contains("Max open files 64 128") && text.contains("Max core file size 0 0"), "{text}");
}

#[test]
fn the_oom_score_is_zddsups_own_unless_it_is_given() {
    let own = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap();
    let (_supervisor, text) = inherited(&PLAIN, &[]);
    assert_eq!(facts(&text)["oom_score_adj"], own.trim());
    let (_supervisor, text) = inherited(&PLAIN, &["--oom-score-adj", "900"]);
    assert_eq!(facts(&text)["oom_score_adj"], "900");
}

#[test]
fn it_runs_as_its_user_and_group_with_no_more_rights() {
    if !is_root("--user") {
        return;
    }
    let script = "cat /proc/self/status; env; echo to-stderr >/dev/stderr";
    let program = ["sh", "-c", script];
    let text = stdout_of(&PLAIN, &["--chdir", "/", "--user", "nobody", "--group", "54321"], &program);
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    let uid = nobody.uid.to_string();
    assert_eq!(status_line(&text, "Uid"), [uid.as_str(); 4]);
    assert_eq!(status_line(&text, "Gid"), ["54321"; 4]);
    assert!(!status_line(&text, "Groups").contains(&"0"), "{text}");
    for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
        assert_eq!(status_line(&text, set), ["0000000000000000"], "{set}");
    }
    for variable in ["USER=nobody", "LOGNAME=nobody", &format!("HOME={}", nobody.dir.display())] {
        assert!(text.lines().any(|line| line == variable), "{variable} is not in {text}");
    }
}

/// The runtime directory of root is closed to others: READY=1 arrives all the same.
#[test]
fn a_service_of_another_user_can_say_that_it_is_ready() {
    if !is_root("--user") {
        return;
    }
    let dir = Arc::new(tempfile::tempdir().unwrap());
    // Where it may be executed by anybody, wherever the build directory is.
    let program =
        PathBuf::from("/tmp").join(format!("zddsup-test-{}", dir.path().file_name().unwrap().to_str().unwrap()));
    std::fs::copy(puppet(), &program).unwrap();
    let path = program.display().to_string();
    let args = [
        "--listen",
        "127.0.0.1:0",
        "--user",
        "nobody",
        "--chdir",
        "/",
        "--ready",
        "notify",
        "--",
        &path,
        "--version",
        "1",
    ];
    let supervisor = Setup::within(dir, args).start();
    std::fs::remove_file(&program).unwrap();
    let text = request(supervisor.address(), "/inherited");
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    assert!(facts(&text)["Uid"].starts_with(&nobody.uid.to_string()), "{text}");
    assert!(environ(supervisor.serving().pid.unwrap())["NOTIFY_SOCKET"].starts_with('@'));
}

#[test]
fn its_directory_is_found_anew_and_its_variables_are_set() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    std::fs::create_dir(dir.path().join("below")).unwrap();
    let puppet = puppet();
    let args = ["--listen", "127.0.0.1:0", "--chdir", "below", "--env", "A=1", "--env", "B=x=y z", "--", &puppet];
    let supervisor = Setup::within(Arc::clone(&dir), args).start();
    let text = request(supervisor.address(), "/inherited");
    assert_eq!(facts(&text)["cwd"], dir.path().canonicalize().unwrap().join("below").display().to_string());
    let env = environ(supervisor.serving().pid.unwrap());
    assert_eq!((env["A"].as_str(), env["B"].as_str()), ("1", "x=y z"));
}

#[test]
fn variables_that_are_meant_for_zddsup_stay_with_it() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let above = format!("zddsup-test/{}", dir.path().display());
    let socket = std::os::unix::net::SocketAddr::from_abstract_name(&above).unwrap();
    let manager = UnixDatagram::bind_addr(&socket).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let puppet = puppet();
    let mut setup = Setup::within(dir, ["--listen", "127.0.0.1:0", "--", &puppet]);
    setup.command().envs([
        ("NOTIFY_SOCKET", format!("@{above}").as_str()),
        ("WATCHDOG_USEC", "600000000"),
        ("LISTEN_FDS", "9"),
        ("LISTEN_PID", "1"),
        ("LISTEN_FDNAMES", "theirs"),
        ("LISTEN_ADDRESS", "the service's own"),
        ("EINHORN_FD_0", "8"),
        ("SERVER_STARTER_PORT", "80=9"),
        ("ZDDSUP_SOCKET", "8"),
        ("ZDDSUP_GENERATION", "77"),
        ("ZDDSUP_LOG", "info"),
        ("OTHER", "stays"),
    ]);
    let supervisor = setup.start();
    let pid = supervisor.serving().pid.unwrap();
    let env = environ(pid);
    assert!(env["NOTIFY_SOCKET"].starts_with("@zddsup/"), "{env:?}");
    let of = |name: &str| env.get(name).map(String::as_str);
    assert_eq!((of("LISTEN_FDS"), of("LISTEN_FDNAMES")), (Some("1"), Some("listener")));
    assert_eq!(of("LISTEN_PID"), Some(pid.to_string().as_str()));
    assert_eq!((of("ZDDSUP_GENERATION"), of("ZDDSUP_SOCKET")), (Some("1"), Some("4")));
    for gone in ["WATCHDOG_USEC", "EINHORN_FD_0", "SERVER_STARTER_PORT", "ZDDSUP_LOG"] {
        assert_eq!(of(gone), None, "{gone}");
    }
    assert_eq!((of("OTHER"), of("LISTEN_ADDRESS")), (Some("stays"), Some("the service's own")));
    // zddsup's own socket was used by zddsup itself.
    let mut said = String::new();
    while !said.contains("READY=1") {
        let mut datagram = [0; 4096];
        let length = manager.recv(&mut datagram).expect("READY=1 from zddsup");
        said += &String::from_utf8_lossy(&datagram[..length]);
    }
}
