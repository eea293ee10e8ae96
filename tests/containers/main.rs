//! zddsup as PID 1 of a container: read-only root, an uid that nobody knows, no /run, no terminal, no capability.

#[path = "../common/mod.rs"]
mod common;
mod examples;
mod init;
mod places;
mod stage;

use common::real::installed;
use common::{wait_for, PATIENCE};
use stage::Container;

#[test]
fn upgrades_under_load_are_asked_for_from_outside_of_it() {
    let Some(mut pod) = Container::new().tmpfs("/tmp").puppet(&[], "--version 1") else { return };
    let status = pod.init().status().unwrap();
    assert_eq!((status.capeff, status.capbnd, status.euid, status.egid), (0, Some(0), 1_000_680_000, 0));
    assert_eq!(status.nspid.unwrap().last(), Some(&1));
    let load = pod.load();
    for version in 2..=4 {
        pod.write("script", &format!("--version {version}\n--ready delay-ms=100"));
        if version == 3 {
            pod.signal(nix::sys::signal::Signal::SIGHUP);
        } else {
            pod.must(&["upgrade", "--wait"]);
        }
        assert!(load.saw(&version.to_string(), PATIENCE), "{}\n{}", load.so_far(), pod.log());
    }
    // A version that cannot start changes nothing, and whoever asked hears of it.
    pod.write("script", "--exit-before-ready 7");
    assert_eq!(pod.zddsup(&["upgrade"]).status.code(), Some(3));
    assert!(load.more(50, PATIENCE));
    load.stop().assert_clean();
    assert!(pod.must(&["status", "--ready"]).contains("generation 4 serves"));
    pod.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(pod.wait().code(), Some(0), "{}", pod.log());
}

#[test]
fn an_unmodified_server_is_upgraded_under_load() {
    if !installed("python3", &["/usr/bin/python3", "--version"]) {
        return;
    }
    let server =
        ["--", "/usr/bin/python3", "-m", "http.server", "--bind", "127.0.0.1", "--directory", "/volume", "8080"];
    let ready = ["--ready", "tcp:127.0.0.1:8080"];
    let Some(mut pod) = Container::new().tmpfs("/tmp").run(&[&ready[..], &server].concat()) else { return };
    pod.wait_until_ready();
    let load = pod.load();
    for generation in 2..=4 {
        assert!(pod.must(&["upgrade", "--wait"]).contains(&format!("generation {generation} serves")), "{}", pod.log());
        assert!(load.more(50, PATIENCE), "{}", load.so_far());
    }
    load.stop().assert_clean();
}

#[test]
fn a_rootless_container_adopts_as_well() {
    let server = ["--handoff", "adopt", "--", "/target/examples/puppet", "--bind", "127.0.0.1:8080"];
    let script = ["--script", "/volume/script"];
    let container = Container::new().rootless().tmpfs("/tmp").file("script", "--version 1");
    let Some(mut pod) = container.run(&[&server[..], &script].concat()) else { return };
    pod.wait_until_ready();
    assert_eq!(pod.init().status().unwrap().euid, 65534);
    let load = pod.load();
    for version in 2..=3 {
        pod.write("script", &format!("--version {version}"));
        pod.must(&["upgrade", "--wait"]);
        assert!(load.saw(&version.to_string(), PATIENCE), "{}\n{}", load.so_far(), pod.log());
    }
    load.stop().assert_clean();
    pod.must(&["stop"]);
    assert_eq!(pod.wait().code(), Some(0), "{}", pod.log());
}

#[test]
fn it_is_not_ready_before_it_serves_nor_while_it_leaves() {
    let flags = ["--ready", "notify", "--lame-duck", "1h"];
    let command = ["--listen", "127.0.0.1:8080", "--", "/target/examples/puppet", "--script", "/volume/script"];
    let container = Container::new().file("script", "--version 1\n--ready none");
    let Some(mut pod) = container.run(&[&flags[..], &command].concat()) else { return };
    pod.wait_until_up();
    wait_for("it answers", || pod.zddsup(&["status"]).status.success());
    let starting = pod.zddsup(&["status", "--ready"]);
    assert_eq!(starting.status.code(), Some(1), "{starting:?}");
    assert!(String::from_utf8_lossy(&starting.stdout).contains("no generation serves"), "{starting:?}");

    let Some(mut pod) = Container::new().puppet(&flags, "--version 1") else { return };
    pod.signal(nix::sys::signal::Signal::SIGTERM);
    wait_for("it leaves", || pod.zddsup(&["status", "--ready"]).status.code() == Some(1));
    // It serves on all the while.
    pod.load().stop().assert_clean();
    pod.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(pod.wait().code(), Some(0), "{}", pod.log());
}

#[test]
fn a_stop_from_inside_drains_before_the_container_ends() {
    let Some(mut pod) = Container::new().puppet(&[], "--version 1\n--drain-ms 1000") else { return };
    let begin = std::time::Instant::now();
    // It ends before PID 1 does, which would take it along.
    assert_eq!(pod.must(&["stop"]), "stopped\n");
    assert_eq!(pod.wait().code(), Some(0), "{}", pod.log());
    assert!(begin.elapsed().as_millis() >= 1000, "{}", pod.log());
}

#[test]
fn the_end_of_a_service_that_is_not_started_again_is_that_of_the_container() {
    let flags = ["--restart", "never", "--ready", "delay:10ms", "--", "sh", "-c", "sleep 1; exit 7"];
    let Some(mut pod) = Container::new().run(&flags) else { return };
    assert_eq!(pod.wait().code(), Some(7), "{}", pod.log());
}
