//! Unix sockets of servers that bind for themselves.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram, UnixStream};
use std::path::Path;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use socket2::{Domain, SockAddr, Socket, Type};
use zddsup::control::types::GenerationPhase;

use crate::common::load::{Config, Failure, Load, Target};
use crate::common::real::installed;
use crate::common::{puppet, Supervisor, PATIENCE};
use crate::stage::Site;

/// A puppet with a Unix socket in the site's directory.
fn start(site: &Site, flags: &[&str], more: &[&str]) -> Supervisor {
    site.write("script", "--version 1");
    let puppet = puppet();
    let command = ["--", &puppet, "--bind", "unix:web.sock", "--script", "script"];
    let words: Vec<_> = flags.iter().chain(&command).chain(more).copied().collect();
    site.start(&words)
}

fn load(site: &Site) -> Config {
    Config { workers: 2, limit: PATIENCE * 3, ..Config::new(Target::Unix(site.path("web.sock"))) }
}

fn request(path: &Path) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    ask(&mut stream, "close")
}

fn ask(stream: &mut UnixStream, connection: &str) -> String {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(format!("GET / HTTP/1.1\r\nHost: x\r\nConnection: {connection}\r\n\r\n").as_bytes()).unwrap();
    let mut answer = [0; 4096];
    let read = stream.read(&mut answer).unwrap();
    String::from_utf8_lossy(&answer[..read]).into_owned()
}

/// What stands beside the socket of what zddsup made.
fn hidden(site: &Site) -> Vec<String> {
    let names = fs::read_dir(site.dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(".zddsup")).collect()
}

#[test]
fn nobody_is_refused() {
    let site = Site::new();
    let mut supervisor = start(&site, &["--max-draining", "10"], &[]);
    let loads = [Load::start(load(&site)), Load::start(load(&site).keep_alive())];
    for load in &loads {
        assert!(load.more(20, PATIENCE), "{}", load.so_far());
    }
    for version in ["2", "3", "4", "5", "6"] {
        site.write("script", &format!("--version {version}"));
        supervisor.upgrade();
        assert!(loads[0].saw(version, PATIENCE), "{}\n{}", loads[0].so_far(), supervisor.log());
    }
    for load in loads {
        let summary = load.stop();
        println!("{summary}");
        summary.assert_clean();
    }
    supervisor.wait_settled();
    assert!(request(&site.path("web.sock")).contains("version=6 "));
    let listeners = supervisor.status().listeners;
    assert!(listeners.iter().any(|listener| listener.address.ends_with("/web.sock")), "{listeners:?}");
    // The second name of the one that serves.
    assert_eq!(hidden(&site).len(), 1, "{:?}", hidden(&site));
    supervisor.signal(Signal::SIGTERM);
    supervisor.wait();
    assert_eq!(hidden(&site), [""; 0]);
    assert!(!site.path("web.sock").exists());
}

#[test]
fn one_that_listens_and_is_not_ready_gets_nothing() {
    let site = Site::new();
    let supervisor = start(&site, &["--ready", "notify", "--start-timeout", "2s"], &[]);
    let load = Load::start(load(&site));
    assert!(load.more(20, PATIENCE));
    for unready in ["--version 2\n--ready none\n", "--version 2\n--ready none\n--exit-after-ms 50:7\n"] {
        site.write("script", unready);
        assert_eq!(supervisor.cli(&["upgrade"]).status.code(), Some(3));
        supervisor.wait_settled();
        assert!(load.more(20, PATIENCE));
        assert_eq!(hidden(&site).len(), 1, "{:?}", hidden(&site));
    }
    site.write("script", "--version 3");
    supervisor.upgrade();
    assert!(load.saw("3", PATIENCE));
    let summary = load.stop();
    summary.assert_clean();
    assert_eq!(summary.order(), ["1", "3"], "{summary}");
}

#[test]
fn one_that_removes_the_file_does_so_for_a_moment() {
    let site = Site::new();
    let supervisor = start(&site, &["--max-draining", "10"], &["--unlinks"]);
    let load = Load::start(load(&site));
    assert!(load.more(20, PATIENCE));
    for version in ["2", "3", "4", "5", "6"] {
        site.write("script", &format!("--version {version}"));
        supervisor.upgrade();
        assert!(load.saw(version, PATIENCE), "{}\n{}", load.so_far(), supervisor.log());
        // The old one removes what is not its own any more when it ends.
        supervisor.wait_settled();
        assert!(load.more(20, PATIENCE), "{}\n{}", load.so_far(), supervisor.log());
    }
    let summary = load.stop();
    println!("{summary}");
    // While there is no file, and in no other way: whoever connected is answered.
    assert_eq!(summary.failed(), summary.failures.get(&Failure::Refused).copied().unwrap_or(0), "{summary}");
    assert!(summary.failed() < 50, "{summary}\n{}", supervisor.log());
    assert!(request(&site.path("web.sock")).contains("version=6 "));
}

#[test]
fn what_waits_for_a_dead_one_is_answered_by_the_next() {
    for more in [&[][..], &["--unlinks"]] {
        let site = Site::new();
        let supervisor = start(&site, &[], more);
        let first = Pid::from_raw(supervisor.serving().pid.unwrap());
        crate::common::freeze(first);
        let waiting: Vec<_> = (0..30).map(|_| UnixStream::connect(site.path("web.sock")).unwrap()).collect();
        site.write("script", "--version 2\n");
        kill(first, Signal::SIGKILL).unwrap();
        for mut client in waiting {
            let answer = ask(&mut client, "close");
            assert!(answer.contains("version=2 "), "{answer:?}\n{}", supervisor.log());
        }
        site.write("script", "--version 3\n");
        supervisor.upgrade();
        assert!(request(&site.path("web.sock")).contains("version=3 "));
    }
}

#[test]
fn connections_are_counted_and_waited_for() {
    let site = Site::new();
    let supervisor = start(&site, &[], &[]);
    let mut old = UnixStream::connect(site.path("web.sock")).unwrap();
    assert!(ask(&mut old, "keep-alive").contains("version=1 "));
    site.write("script", "--version 2\n");
    supervisor.upgrade();
    assert!(request(&site.path("web.sock")).contains("version=2 "));
    supervisor.wait_until("its last connection is seen", |status| {
        status.generations.iter().any(|g| g.phase == GenerationPhase::Draining && g.connections == Some(1))
    });
    assert!(ask(&mut old, "keep-alive").contains("version=1 "));
    drop(old);
    supervisor.wait_settled();
}

#[test]
fn a_rollback_in_the_bake_is_a_rename_back() {
    let site = Site::new();
    let supervisor = start(&site, &["--bake", "60s"], &[]);
    let load = Load::start(load(&site));
    assert!(load.more(20, PATIENCE));
    site.write("script", "--version 2\n");
    let mut upgrade = supervisor.cli_command(&["upgrade"]).spawn().unwrap();
    assert!(load.saw("2", PATIENCE), "{}", load.so_far());
    assert!(supervisor.cli(&["rollback"]).status.success());
    assert!(!upgrade.wait().unwrap().success());
    assert!(request(&site.path("web.sock")).contains("version=1 "));
    supervisor.wait_settled();
    assert!(request(&site.path("web.sock")).contains("version=1 "));
    load.stop().assert_clean();
}

#[test]
fn its_file_looks_as_it_would_without_zddsup() {
    let site = Site::new();
    let supervisor = start(&site, &["--umask", "027"], &[]);
    let mode = || fs::metadata(site.path("web.sock")).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(), 0o750);
    site.write("script", "--version 2\n");
    supervisor.upgrade();
    assert_eq!(mode(), 0o750);
    site.write("script", "--version 3\n--chmod 666\n");
    supervisor.upgrade();
    assert_eq!(mode(), 0o666);
    assert!(request(&site.path("web.sock")).contains("version=3 "));
}

#[test]
fn as_another_user_too() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("skipped: only root runs a service as another user");
    }
    let site = Site::new();
    fs::set_permissions(site.dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let supervisor = start(&site, &["--user", "nobody"], &[]);
    let load = Load::start(load(&site));
    assert!(load.more(20, PATIENCE));
    for version in ["2", "3"] {
        site.write("script", &format!("--version {version}"));
        supervisor.upgrade();
        assert!(load.saw(version, PATIENCE), "{}\n{}", load.so_far(), supervisor.log());
        assert_eq!(fs::metadata(site.path("web.sock")).unwrap().uid(), 65534);
    }
    load.stop().assert_clean();
}

#[test]
fn datagrams_are_answered() {
    let site = Site::new();
    site.write("script", "--version 1");
    let puppet = puppet();
    let supervisor = site.start(&["--", &puppet, "--unix-datagrams", "in.sock", "--script", "script"]);
    let client = UnixDatagram::bind(site.path("client.sock")).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let ask = |version: &str| {
        client.send_to(b"x", site.path("in.sock")).unwrap();
        let mut answer = [0; 200];
        let length = client.recv(&mut answer).unwrap();
        let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
        assert!(answer.starts_with(&format!("version={version} ")), "{answer}");
    };
    ask("1");
    for version in ["2", "3"] {
        site.write("script", &format!("--version {version}"));
        supervisor.upgrade();
        (0..20).for_each(|_| ask(version));
    }
    supervisor.wait_settled();
    ask("3");
}

#[test]
fn packets_with_a_connection_are_no_other_matter() {
    let site = Site::new();
    site.write("script", "--version 1");
    let puppet = puppet();
    let supervisor = site.start(&["--", &puppet, "--bind", "unixpacket:in.sock", "--script", "script"]);
    let connect = || {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        socket.connect(&SockAddr::unix(site.path("in.sock")).unwrap()).unwrap();
        UnixStream::from(OwnedFd::from(socket))
    };
    let mut old = connect();
    assert!(ask(&mut old, "keep-alive").contains("version=1 "));
    site.write("script", "--version 2\n");
    supervisor.upgrade();
    (0..20).for_each(|_| assert!(ask(&mut connect(), "close").contains("version=2 ")));
    assert!(ask(&mut old, "close").contains("version=1 "));
    supervisor.wait_settled();
}

#[test]
fn an_abstract_name_is_shared() {
    let site = Site::new();
    site.write("script", "--version 1");
    let name = format!("zddsup-test-{}", site.address.port());
    let bind = format!("unix:@{name}");
    let puppet = puppet();
    let supervisor = site.start(&["--", &puppet, "--bind", &bind, "--script", "script"]);
    let request = || {
        let mut stream = UnixStream::connect_addr(&UnixAddr::from_abstract_name(&name).unwrap()).unwrap();
        ask(&mut stream, "close")
    };
    assert!(request().contains("version=1 "));
    for version in ["2", "3"] {
        site.write("script", &format!("--version {version}"));
        supervisor.upgrade();
        // Either of them, and never nobody.
        (0..20).for_each(|_| assert!(request().contains("version=")));
        supervisor.wait_settled();
        assert!(request().contains(&format!("version={version} ")));
    }
    assert!(supervisor.log().contains("only one socket can have"), "{}", supervisor.log());
}

#[test]
fn a_killed_supervisor_is_succeeded() {
    let site = Site::new();
    let first = start(&site, &[], &[]);
    let load = Load::start(load(&site));
    assert!(load.more(20, PATIENCE));
    site.write("script", "--version 2\n");
    first.upgrade();
    first.wait_settled();
    first.kill_alone();
    assert!(load.more(20, PATIENCE));
    let mut second = start(&site, &[], &["--version", "3"]);
    assert!(load.saw("3", PATIENCE), "{}\n{}", load.so_far(), second.log());
    second.wait_settled();
    assert!(load.more(20, PATIENCE));
    load.stop().assert_clean();
    second.signal(Signal::SIGTERM);
    second.wait();
    assert_eq!(hidden(&site), [""; 0]);
}

/// Five upgrades of a server on a Unix socket. Those that remove the file when they start or end do so for a moment.
fn upgraded(site: &Site, flags: &[&str], command: &[&str]) {
    let words: Vec<_> = ["--max-draining", "10"].iter().chain(flags).chain(&["--"]).chain(command).copied().collect();
    let supervisor = site.start(&words);
    let load = Load::start(load(site));
    assert!(load.more(20, PATIENCE), "{}\n{}", load.so_far(), supervisor.log());
    for _ in 0..5 {
        supervisor.upgrade();
        assert!(load.more(20, PATIENCE), "{}\n{}", load.so_far(), supervisor.log());
    }
    supervisor.wait_settled();
    assert!(load.more(20, PATIENCE), "{}\n{}", load.so_far(), supervisor.log());
    let summary = load.stop();
    println!("{summary}");
    let refused = summary.failures.get(&Failure::Refused).copied().unwrap_or(0);
    assert!(summary.failed() == refused && refused < 100, "{summary}\n{}", supervisor.log());
}

#[test]
fn nginx() {
    if installed("nginx", &["nginx", "-v"]) {
        let site = Site::new();
        site.write(
            "nginx.conf",
            "worker_processes 2;\nerror_log stderr error;\nevents {}\nhttp {\n access_log off;\n \
             server { listen unix:web.sock; location / { return 200 'nginx\\n'; } }\n}\n",
        );
        let command =
            ["nginx", "-p", ".", "-e", "stderr", "-c", "nginx.conf", "-g", "daemon off; pid nginx-{generation}.pid;"];
        upgraded(&site, &["--stop-signal", "QUIT"], &command);
    }
}

#[test]
fn gunicorn() {
    if installed("gunicorn", &["/usr/bin/gunicorn", "--version"]) {
        let site = Site::new();
        site.write(
            "wsgi.py",
            "def app(environ, start_response):\n    start_response('200 OK', [('Content-Length', '9')])\n    return [b'gunicorn\\n']\n",
        );
        let command = ["/usr/bin/gunicorn", "--workers", "2", "--threads", "4", "--bind", "unix:web.sock", "wsgi:app"];
        upgraded(&site, &[], &command);
    }
}

#[test]
fn a_static_go_binary() {
    if installed("go", &["go", "version"]) {
        let site = Site::new();
        site.write(
            "main.go",
            "package main\n\
             import (\"context\"; \"fmt\"; \"net\"; \"net/http\"; \"os\"; \"os/signal\"; \"syscall\")\n\
             func main() {\n\
             \tlistener, err := net.Listen(\"unix\", \"web.sock\")\n\
             \tif err != nil { panic(err) }\n\
             \tserver := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, \"go\") })}\n\
             \tstop := make(chan os.Signal, 1)\n\
             \tsignal.Notify(stop, syscall.SIGTERM)\n\
             \tgo func() { <-stop; server.Shutdown(context.Background()); os.Exit(0) }()\n\
             \tserver.Serve(listener)\n\
             \tselect {}\n\
             }\n",
        );
        let mut build = std::process::Command::new("go");
        build.args(["build", "-o", "server", "main.go"]).current_dir(site.dir.path());
        build.env("CGO_ENABLED", "0").env("GO111MODULE", "off").env("GOFLAGS", "").env("HOME", site.dir.path());
        let output = build.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        upgraded(&site, &[], &["./server"]);
    }
}

#[test]
fn in_a_canary_the_file_stays_the_old_one_s_until_the_switch() {
    let site = Site::new();
    let address = site.address.to_string();
    let supervisor = start(&site, &[], &["--also-bind", &address]);
    let all_by = |version: &str| {
        for _ in 0..30 {
            let answer = request(&site.path("web.sock"));
            assert!(answer.contains(version), "{answer}\n{}", supervisor.log());
        }
    };
    let load = Load::start(load(&site));
    for (decision, version) in [("abort", "version=1 "), ("promote", "version=2 ")] {
        site.write("script", "--version 2");
        let output = supervisor.cli(&["upgrade", "--wait=canary", "--canary", "50%"]);
        assert!(output.status.success(), "{output:?}\n{}", supervisor.log());
        all_by("version=1 ");
        let output = supervisor.cli(&[decision]);
        assert!(output.status.success(), "{output:?}\n{}", supervisor.log());
        supervisor.wait_settled();
        all_by(version);
        assert_eq!(hidden(&site).len(), 1, "{:?}", hidden(&site));
    }
    let summary = load.stop();
    summary.assert_clean();
    assert_eq!(summary.order(), ["1", "2"], "{summary}");
}
