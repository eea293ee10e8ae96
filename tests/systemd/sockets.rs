//! Socket activation: `systemd/zddsup@.socket`, started by the first connection. Under the machine's systemd and a newer one.

use crate::common::load::Failure;
use crate::common::{wait_for, PATIENCE};
use crate::protocol::Boot;
use crate::stage::Systemd;
use crate::{shipped, template, HERE};

/// systemd listens at ports 80 and 81, under the names `web` and `admin`; nothing else runs.
fn lazy(boot: Boot, more: &str) -> Option<Systemd> {
    let listen = |port: u16| format!("[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=127.0.0.1:{port}\n");
    let mut units = template(&format!("{more}[Unit]\nAfter=zddsup@web.socket admin.socket\n"));
    let admin = shipped("zddsup@.socket").replace("=%i", "=admin");
    units.extend([
        ("zddsup@.socket", shipped("zddsup@.socket")),
        ("zddsup@web.socket.d/listen.conf", listen(80)),
        ("admin.socket", admin),
        ("admin.socket.d/listen.conf", format!("{}Service=zddsup@web.service\n", listen(81))),
    ]);
    let systemd = boot(&units)?;
    systemd.write("web.env", "COMMAND=/run/target/examples/puppet --script /run/stage/script\nFLAGS=--ready notify\n");
    systemd.write("script", "--version 1");
    systemd.must(&["start", "zddsup@web.socket", "admin.socket"]);
    assert_eq!(systemd.show("zddsup@web.service", "ActiveState"), "inactive");
    Some(systemd)
}

fn the_first_connection_starts_it_and_a_restart_refuses_none(boot: Boot) {
    let Some(systemd) = lazy(boot, "") else { return };
    // The first connection of all waits until there is a service, and is answered.
    let loads = [systemd.load(80), systemd.load(81)];
    wait_for("it is started", || systemd.show("zddsup@web.service", "ActiveState") == "active");
    let status = systemd.command("/run/target/zddsup", &["status", "--name", "web"]).output().unwrap();
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    for listener in ["web ", "admin "] {
        assert!(status.contains(listener), "no {listener}: {status}");
    }
    systemd.write("script", "--version 2");
    systemd.must(&["restart", "zddsup@web.service"]);
    systemd.self_upgrade();
    systemd.write("script", "--version 3");
    systemd.must(&["reload", "zddsup@web.service"]);
    for load in loads {
        assert!(load.saw("3", PATIENCE), "{}\n{}", load.so_far(), systemd.log());
        let summary = load.stop();
        summary.assert_clean();
        assert_eq!(summary.order(), ["1", "2", "3"]);
    }
}

#[test]
fn the_first_connection_starts_it() {
    the_first_connection_starts_it_and_a_restart_refuses_none(Systemd::boot);
}

#[test]
fn a_newer_systemd_starts_it_by_the_first_connection() {
    the_first_connection_starts_it_and_a_restart_refuses_none(Systemd::boot_newer);
}

/// What the watchdog kills is lost with the service; all others wait in the queue, which is systemd's.
fn a_watchdog_refuses_nobody(boot: Boot) {
    let Some(systemd) = lazy(boot, "WatchdogSec=3\n") else { return };
    let load = systemd.load(80);
    let main = systemd.show("zddsup@web.service", "MainPID");
    systemd.write("script", "--version 2");
    systemd.must(&["kill", "--kill-whom=main", "--signal=STOP", "zddsup@web.service"]);
    assert!(load.saw("2", PATIENCE), "{}\n{}", load.so_far(), systemd.log());
    assert!(load.more(50, PATIENCE));
    let summary = load.stop();
    let cut = [Failure::Eof, Failure::Reset];
    assert!(summary.failures.keys().all(|failure| cut.contains(failure)), "{summary}");
    // No more than one for each that asked.
    assert!(summary.failed() <= 2, "{summary}");
    assert_ne!(systemd.show("zddsup@web.service", "MainPID"), main);
}

#[test]
fn a_watchdog_that_kills_it_under_load_refuses_nobody() {
    a_watchdog_refuses_nobody(Systemd::boot);
}

#[test]
fn a_newer_systemds_watchdog_refuses_nobody() {
    a_watchdog_refuses_nobody(Systemd::boot_newer);
}

#[test]
fn a_service_for_each_connection_is_refused_with_the_remedy() {
    let socket = "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=127.0.0.1:80\nAccept=yes\n".to_owned();
    let service = shipped("examples/web.service").replace("/srv/web/current/server", "/run/target/examples/puppet");
    let service = service.replace("Requires=web.socket\nAfter=web.socket\n", "");
    let units = [("web.socket", socket), ("web@.service", service), ("web@.service.d/test.conf", HERE.to_owned())];
    let Some(systemd) = Systemd::boot(&units) else { return };
    systemd.must(&["start", "web.socket"]);
    systemd.connect(80);
    wait_for("it is refused", || systemd.log().contains("set Accept=no in the .socket unit"));
    // It is not tried again: exit code 2.
    wait_for("it has ended", || {
        let units = systemd.ctl(&["list-units", "--all", "--plain", "--no-legend", "web@*.service"]).stdout;
        let units = String::from_utf8_lossy(&units).into_owned();
        assert!(!units.contains(" running "), "{units}");
        units.contains(" failed ")
    });
}
