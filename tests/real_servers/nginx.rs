//! nginx: takes the numbers of its sockets in `NGINX`, the variable by which it hands them to its own next version. It
//! knows each by its address, which is in its configuration too.
//!
//! It says nothing when it is ready; it writes its pid file when it has read its configuration and got its sockets. Each
//! generation has a pid file of its own, and QUIT is its graceful stop.
//!
//! `nonblock`: nginx takes it that a socket which it was given does not block. With one that does, a worker that another
//! was quicker than waits in accept(2) for the next connection, and those that it has wait with it.

use crate::common::real::installed;
use crate::stage::{lost_idle_ones_at_most, was_kept, Outcome, Site};

const COMMAND: &str = "--listen 'web=127.0.0.1:8080?nonblock' --env 'NGINX={fd:web};' --stop-signal QUIT --ready \
                       'exec:grep -qx $ZDDSUP_PID nginx-$ZDDSUP_GENERATION.pid' -- nginx -p . -e stderr -c nginx.conf \
                       -g 'daemon off; pid nginx-{generation}.pid;'";

fn configuration(version: &str, keepalive: &str) -> String {
    include_str!("files/nginx.conf").replace("VERSION", version).replace("KEEPALIVE", keepalive)
}

fn upgraded(keepalive: &str) -> Option<Outcome> {
    if !installed("nginx", &["nginx", "-v"]) {
        return None;
    }
    let site = Site::new();
    let publish = |version: &str| site.write("nginx.conf", &configuration(version, keepalive));
    publish("1");
    let supervisor = site.start(COMMAND, str::to_owned);
    Some(site.upgrade_under_load(supervisor, publish))
}

#[test]
fn without_keep_alive() {
    let Some(outcome) = upgraded("0") else { return };
    outcome.per_request.assert_clean();
    outcome.keep_alive.assert_clean();
}

/// A worker that stops closes the idle connections without a word.
#[test]
fn with_keep_alive() {
    let Some(outcome) = upgraded("75s") else { return };
    outcome.per_request.assert_clean();
    was_kept(&outcome.keep_alive);
    lost_idle_ones_at_most(&outcome.keep_alive);
}

/// A configuration that nginx does not take changes nothing.
#[test]
fn a_bad_configuration() {
    if !installed("nginx", &["nginx", "-v"]) {
        return;
    }
    let site = Site::new();
    site.write("nginx.conf", &configuration("1", "0"));
    let supervisor = site.start(COMMAND, str::to_owned);
    let before = supervisor.serving();
    site.write("nginx.conf", "evnets {}\n");
    site.upgrade_fails(&supervisor, &["unknown directive \"evnets\"", "never stopped"]);
    assert_eq!(supervisor.serving().pid, before.pid);
}

/// nginx leaves that to whoever passes the socket. Without it the other tests fail at times only: a worker that waits in
/// accept(2) goes on with the next connection.
#[test]
fn its_socket_does_not_block() {
    if !installed("nginx", &["nginx", "-v"]) {
        return;
    }
    let site = Site::new();
    site.write("nginx.conf", &configuration("1", "0"));
    let supervisor = site.start(COMMAND, str::to_owned);
    let fd = format!("/proc/{}/fdinfo/3", supervisor.serving().pid.unwrap());
    let info = std::fs::read_to_string(&fd).unwrap();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
    let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
    assert_ne!(flags & libc::O_NONBLOCK, 0, "{info}");
}
