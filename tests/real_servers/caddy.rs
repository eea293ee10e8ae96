//! caddy: takes the number of its socket in its configuration from 2.9 on, and says READY=1. Debian 12 has 2.6, which
//! binds its own: that is in tests/unmodified.
//!
//! `shutdown_delay` gives it time to say goodbye on each connection that is in use. What remains is Go's: the
//! `Shutdown` of its newer versions drops a new connection whose request it has not read yet (golang/go#75591).
//! `defer-accept` makes that rare: a connection is accepted when its request is there.

use std::process::Command;

use crate::common::real::{installed, path};
use crate::stage::{lost_unread_ones_at_most, was_kept, Site};

const BY_FD: &str = "--listen 'web=127.0.0.1:8080?defer-accept=1' --env FD_WEB={fd:web} --ready notify -- \
     caddy run --config Caddyfile";

/// Where another caddy than the one in `PATH` is.
const ANOTHER: &str = "ZDDSUP_TEST_CADDY";

#[test]
fn by_fd() {
    let another = std::env::var(ANOTHER).ok();
    let caddy = another.as_deref().unwrap_or("caddy");
    if !installed("caddy", &[caddy, "version"]) {
        return;
    }
    if !takes_fds(caddy) {
        // Not missing, but too old.
        assert!(another.is_none(), "{ANOTHER} is too old: fd/ came with caddy 2.9");
        println!("skipped: this caddy has no fd/, which came with 2.9; {ANOTHER} may name a newer one");
        return;
    }
    let site = Site::new();
    let publish = |version: &str| site.write("Caddyfile", &include_str!("files/Caddyfile").replace("VERSION", version));
    publish("1");
    let change = |word: &str| if word == "caddy" { caddy.to_owned() } else { word.to_owned() };
    let supervisor = site.start(BY_FD, change);
    let outcome = site.upgrade_under_load(supervisor, publish);
    lost_unread_ones_at_most(&outcome.per_request);
    was_kept(&outcome.keep_alive);
    lost_unread_ones_at_most(&outcome.keep_alive);
}

/// By its version: `v2.11.7 h1:…`, and Debian's `2.6.2`.
fn takes_fds(caddy: &str) -> bool {
    let output = Command::new(caddy).arg("version").env("PATH", path()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut numbers = text.trim().trim_start_matches('v').split(['.', ' ', '-']).map_while(|part| part.parse().ok());
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version >= (2, 9)
}
