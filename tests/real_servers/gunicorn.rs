//! gunicorn: takes `LISTEN_FDS` and says READY=1.

use crate::common::real::installed;
use crate::stage::{lost_idle_ones_at_most, was_kept, Outcome, Site};

const SYNC: &str = "--listen 127.0.0.1:8080 --ready notify -- gunicorn --preload --workers 2 wsgi:app";
const THREADS: &str = "--listen 127.0.0.1:8080 --ready notify -- gunicorn --preload --workers 2 --threads 4 \
     --keep-alive 0 wsgi:app";

fn site() -> Option<Site> {
    if !installed("gunicorn", &["gunicorn", "--version"]) {
        return None;
    }
    let site = Site::new();
    site.write("wsgi.py", include_str!("files/wsgi.py"));
    site.write("version", "1");
    Some(site)
}

fn upgraded(command: &str, change: impl Fn(&str) -> String) -> Option<Outcome> {
    let site = site()?;
    let supervisor = site.start(command, change);
    Some(site.upgrade_under_load(supervisor, |version| site.write("version", version)))
}

/// This worker has no keep-alive at all.
#[test]
fn sync_workers() {
    let Some(outcome) = upgraded(SYNC, str::to_owned) else { return };
    outcome.per_request.assert_clean();
    outcome.keep_alive.assert_clean();
}

#[test]
fn threads() {
    let Some(outcome) = upgraded(THREADS, str::to_owned) else { return };
    outcome.per_request.assert_clean();
    outcome.keep_alive.assert_clean();
}

/// With keep-alive, a worker that stops closes the idle connections without a word.
#[test]
fn threads_with_keep_alive() {
    let change = |word: &str| if word == "0" { "2".to_owned() } else { word.to_owned() };
    let Some(outcome) = upgraded(THREADS, change) else { return };
    outcome.per_request.assert_clean();
    was_kept(&outcome.keep_alive);
    lost_idle_ones_at_most(&outcome.keep_alive);
}

/// With `--preload` the application is loaded before READY=1: one that cannot be loaded changes nothing.
#[test]
fn a_bad_application() {
    let Some(site) = site() else { return };
    let supervisor = site.start(SYNC, str::to_owned);
    let before = supervisor.serving();
    site.write("wsgi.py", "import no_such_module_as_this_one\n");
    site.upgrade_fails(&supervisor, &["No module named 'no_such_module_as_this_one'", "never stopped"]);
    assert_eq!(supervisor.serving().pid, before.pid);
}

const STEERED: &str = "--listen 127.0.0.1:8080 --switch steered --drain observe --ready http://127.0.0.1:8080/ -- \
     gunicorn --workers 2 wsgi:app";

/// Without `--preload` it accepts, and says READY=1, before its application is loaded. With a socket of its own it gets
/// nothing until it answers.
#[test]
fn steered() {
    let Some(outcome) = upgraded(STEERED, str::to_owned) else { return };
    outcome.per_request.assert_clean();
    outcome.keep_alive.assert_clean();
}

#[test]
fn a_bad_application_that_is_not_loaded_first() {
    let Some(site) = site() else { return };
    // One worker has answered the probe, and so has loaded its application; a second one may be about to.
    let supervisor = site.start(STEERED, |word| if word == "2" { "1" } else { word }.to_owned());
    let before = supervisor.serving();
    site.write("wsgi.py", "import no_such_module_as_this_one\n");
    site.upgrade_fails(&supervisor, &["No module named 'no_such_module_as_this_one'"]);
    assert_eq!(supervisor.serving().pid, before.pid);
}
