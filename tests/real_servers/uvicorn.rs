//! uvicorn: takes the number of its socket. It says nothing; the application does.

use crate::common::real::installed;
use crate::stage::Site;

const CLOSING: &str = "zddsup run --listen '127.0.0.1:8080?defer-accept=1' --ready notify -- /usr/bin/python3 -m \
                       uvicorn --fd {fd:listener} --header connection:close --no-access-log asgi:app";

const PROBE: [&str; 3] = ["/usr/bin/python3", "-c", "import uvicorn"];

/// At its stop, uvicorn closes a connection that it has accepted and not read yet. With `defer-accept` it accepts only
/// what it can read at once, so that this is rare, and it cannot be ruled out.
#[test]
fn with_a_connection_for_each_request() {
    if !installed("uvicorn", &PROBE) {
        return;
    }
    let site = Site::new();
    site.write("asgi.py", include_str!("files/asgi.py"));
    site.write("version", "1");
    let supervisor = site.start(CLOSING, str::to_owned);
    site.upgrade_under_load(&supervisor, |version| site.write("version", version))
        .per_request_loses_what_is_under_way_at_most()
        .keep_alive_loses_what_is_under_way_at_most();
}

/// As it comes: idle connections are closed at its stop, and new ones that have sent nothing yet.
#[test]
fn with_keep_alive() {
    if !installed("uvicorn", &PROBE) {
        return;
    }
    let site = Site::new();
    site.write("asgi.py", include_str!("files/asgi.py"));
    site.write("version", "1");
    let change = |word: &str| word.replace("?defer-accept=1", "").replace("connection:close", "x-served-by:uvicorn");
    let supervisor = site.start(CLOSING, change);
    site.upgrade_under_load(&supervisor, |version| site.write("version", version))
        .per_request_loses_what_is_under_way_at_most()
        .keep_alive_was_kept()
        .keep_alive_loses_what_is_under_way_at_most();
}
