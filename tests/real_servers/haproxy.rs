//! haproxy: takes the number of its socket in its configuration.
//!
//! `-Ws` is better than `-db`: its master says READY=1 when the workers run, and ends when they have. SIGUSR1 is its soft
//! stop; SIGTERM, the hard one, cuts everything off.

use crate::common::real::installed;
use crate::stage::{lost_idle_ones_at_most, was_kept, Site};

const COMMAND: &str = "--listen web=127.0.0.1:8080 --env FD_WEB={fd:web} --ready notify --stop-signal USR1 \
                       -- haproxy -Ws -f haproxy.cfg";
const CONFIGURATION: &str = include_str!("files/haproxy.cfg");

#[test]
fn five_upgrades() {
    if !installed("haproxy", &["haproxy", "-v"]) {
        return;
    }
    let site = Site::new();
    let publish = |version: &str| site.write("haproxy.cfg", &CONFIGURATION.replace("VERSION", version));
    publish("1");
    let supervisor = site.start(COMMAND, str::to_owned);
    let outcome = site.upgrade_under_load(supervisor, publish);
    outcome.per_request.assert_clean();
    was_kept(&outcome.keep_alive);
    outcome.keep_alive.assert_clean();
}

/// Without `option idle-close-on-response`, idle connections are closed at its stop.
#[test]
fn with_its_default_for_idle_connections() {
    if !installed("haproxy", &["haproxy", "-v"]) {
        return;
    }
    let site = Site::new();
    let configuration = CONFIGURATION.replace("option idle-close-on-response", "");
    let publish = |version: &str| site.write("haproxy.cfg", &configuration.replace("VERSION", version));
    publish("1");
    let supervisor = site.start(COMMAND, str::to_owned);
    let outcome = site.upgrade_under_load(supervisor, publish);
    outcome.per_request.assert_clean();
    was_kept(&outcome.keep_alive);
    lost_idle_ones_at_most(&outcome.keep_alive);
}

/// A configuration that haproxy does not take changes nothing.
#[test]
fn a_bad_configuration() {
    if !installed("haproxy", &["haproxy", "-v"]) {
        return;
    }
    let site = Site::new();
    site.write("haproxy.cfg", &CONFIGURATION.replace("VERSION", "1"));
    let supervisor = site.start(COMMAND, str::to_owned);
    let before = supervisor.serving();
    site.write("haproxy.cfg", "frontend web\n    bnid fd@3\n");
    site.upgrade_fails(&supervisor, &["unknown keyword 'bnid'", "never stopped"]);
    assert_eq!(supervisor.serving().pid, before.pid);
}
