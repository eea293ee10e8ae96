//! uvicorn: takes the number of its socket. It says nothing when it is ready; the application does.
//!
//! At its stop it closes each connection whose request it has not read yet, new ones as well as idle ones
//! (Kludex/uvicorn#2757). `defer-accept` makes that rare: a connection is accepted when its request is there. `nodelay`
//! is for uvicorn taking every socket for a Unix one, and so leaving Nagle's algorithm on: 40 ms for an answer.

use crate::common::real::installed;
use crate::stage::{lost_unread_ones_at_most, was_kept, Outcome, Site};

const COMMAND: &str = "--listen '127.0.0.1:8080?defer-accept=1&nodelay' --ready notify -- /usr/bin/python3 -m \
     uvicorn --fd {fd:listener} --header connection:close --no-access-log asgi:app";

fn upgraded(change: impl Fn(&str) -> String) -> Option<Outcome> {
    if !installed("uvicorn", &["/usr/bin/python3", "-c", "import uvicorn"]) {
        return None;
    }
    let site = Site::new();
    site.write("asgi.py", include_str!("files/asgi.py"));
    site.write("version", "1");
    let supervisor = site.start(COMMAND, change);
    Some(site.upgrade_under_load(supervisor, |version| site.write("version", version)))
}

#[test]
fn without_keep_alive() {
    let Some(outcome) = upgraded(str::to_owned) else { return };
    lost_unread_ones_at_most(&outcome.per_request);
    lost_unread_ones_at_most(&outcome.keep_alive);
}

#[test]
fn with_keep_alive() {
    let change = |word: &str| word.replace("connection:close", "x-served-by:uvicorn");
    let Some(outcome) = upgraded(change) else { return };
    lost_unread_ones_at_most(&outcome.per_request);
    was_kept(&outcome.keep_alive);
    lost_unread_ones_at_most(&outcome.keep_alive);
}
