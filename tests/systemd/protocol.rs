//! What zddsup says to systemd, and what that makes of it. Under the machine's systemd and a newer one.

use crate::common::PATIENCE;
use crate::stage::Systemd;
use crate::template;

pub type Boot = fn(&[(&str, String)]) -> Option<Systemd>;

fn a_start_that_fails(boot: Boot) {
    let Some(systemd) = boot(&template("Restart=no\n")) else { return };
    let command = "/run/target/examples/puppet --exit-before-ready 7";
    systemd.write("web.env", &format!("COMMAND={command}\nFLAGS=--listen 127.0.0.1:80 --log-level debug\n"));
    assert!(!systemd.ctl(&["start", "zddsup@web"]).status.success());
    let status = systemd.show("zddsup@web", "StatusText");
    assert!(status.contains("never became ready: generation 1 exited with status 7"), "{status}\n{}", systemd.log());
    // The barrier was passed.
    assert!(!systemd.log().contains("has not heard"), "{}", systemd.log());
}

#[test]
fn a_start_that_fails_says_why_in_the_status() {
    a_start_that_fails(Systemd::boot);
}

#[test]
fn a_start_that_fails_under_a_newer_systemd_says_why_in_the_status() {
    a_start_that_fails(Systemd::boot_newer);
}

/// By `ExecReload`, longer than systemd would wait by itself.
fn a_long_reload(boot: Boot) {
    let Some(systemd) = boot(&template("TimeoutStartSec=3\n")) else { return };
    let command = "/run/target/examples/puppet --script /run/stage/script";
    systemd.write("web.env", &format!("COMMAND={command}\nFLAGS=--listen 127.0.0.1:80\n"));
    systemd.write("script", "--version 1");
    systemd.must(&["start", "zddsup@web"]);
    let load = systemd.load(80);
    systemd.write("script", "--version 2\n--ready delay-ms=6000");
    systemd.must(&["reload", "zddsup@web"]);
    assert!(systemd.show("zddsup@web", "StatusText").starts_with("generation 2 serves"));
    assert!(load.saw("2", PATIENCE), "{}\n{}", load.so_far(), systemd.log());
    load.stop().assert_clean();
}

#[test]
fn a_long_reload_is_waited_for() {
    a_long_reload(Systemd::boot);
}

#[test]
fn a_newer_systemd_waits_for_a_long_reload() {
    a_long_reload(Systemd::boot_newer);
}
