//! Probes on the production port: they reach the new generation alone, whoever else listens there.

use nix::sys::signal::Signal;
use zddsup::control::types::{Status, UpgradeResult};

use crate::common::load::Load;
use crate::common::real::installed;
use crate::common::{request, Supervisor, PATIENCE};
use crate::stage::Site;
use crate::steering::start;

const NEVER_WELL: &str = "--healthy-after-ms 3600000";

/// An upgrade to one that is never ready, which waits for this until it is called off.
fn waits_in_vain(supervisor: &Supervisor, what: &str) {
    supervisor.signal(Signal::SIGHUP);
    let waits = |status: &Status| {
        status
            .generations
            .iter()
            .any(|generation| generation.waiting_for.as_deref().is_some_and(|why| why.contains(what)))
    };
    supervisor.wait_until("the new one was asked", waits);
    assert!(supervisor.cli(&["rollback"]).status.success());
    supervisor.wait_for_report("it was called off", |report| report.result == Some(UpgradeResult::Cancelled));
    supervisor.wait_settled();
}

#[test]
fn a_good_answer_of_the_old_one_counts_for_nothing() {
    let site = Site::new();
    let supervisor = start(&site, &["--ready", "http://ADDRESS/health"], "--version 1");
    let loads = [Load::start(site.load()), Load::start(site.load().keep_alive())];
    site.write("script", &format!("--version 2\n{NEVER_WELL}\n"));
    waits_in_vain(&supervisor, "answered with status 503");
    for load in loads {
        assert!(load.more(20, PATIENCE));
        let summary = load.stop();
        summary.assert_clean();
        assert_eq!(summary.order(), ["1"], "{summary}");
    }
}

#[test]
fn a_bad_answer_of_the_old_one_counts_for_nothing() {
    let site = Site::new();
    let supervisor = start(&site, &["--ready", "http://ADDRESS/health"], "--version 1");
    assert!(request(site.address, "/sicken").contains("version=1 "));
    assert_eq!(request(site.address, "/health"), "not yet");
    let load = Load::start(site.load());
    site.write("script", "--version 2\n");
    supervisor.upgrade();
    assert!(load.saw("2", PATIENCE));
    let summary = load.stop();
    summary.assert_clean();
    assert_eq!(summary.order(), ["1", "2"], "{summary}");
}

#[test]
fn a_connection_is_enough_for_tcp() {
    let site = Site::new();
    let supervisor = start(&site, &["--ready", "tcp://ADDRESS"], "--version 1");
    let load = Load::start(site.load());
    site.write("script", "--version 2\n");
    supervisor.upgrade();
    assert!(load.saw("2", PATIENCE));
    load.stop().assert_clean();
}

#[test]
fn every_kind_of_address_is_reached() {
    for (bound, asked) in
        [("0.0.0.0", "127.0.0.1"), ("0.0.0.0", "0.0.0.0"), ("::1", "[::1]"), ("::", "[::1]"), ("::", "127.0.0.1")]
    {
        let site = Site::at(bound);
        let ready = format!("http://{asked}:PORT/health");
        let supervisor = start(&site, &["--ready", &ready], "--version 1");
        site.write("script", &format!("--version 2\n{NEVER_WELL}\n"));
        waits_in_vain(&supervisor, "answered with status 503");
        site.write("script", "--version 3\n");
        supervisor.upgrade();
        assert!(request(site.address, "/").contains("version=3 "), "{bound} by {asked}");
    }
}

#[test]
fn one_that_does_not_listen_there_is_not_asked() {
    let site = Site::new();
    let supervisor = start(&site, &["--ready", "http://ADDRESS/health"], "--version 1");
    let elsewhere = Site::new();
    // The last flag counts.
    site.write("script", &format!("--version 2\n--bind {}\n", elsewhere.address));
    waits_in_vain(&supervisor, "does not listen on");
    assert!(request(site.address, "/").contains("version=1 "));
}

#[test]
fn a_good_answer_does_not_do_while_it_listens_at_fewer_addresses() {
    let (site, more) = (Site::new(), Site::new());
    let both = format!("--also-bind {}", more.address);
    let supervisor = start(&site, &["--ready", "http://ADDRESS/health"], &format!("--version 1\n{both}"));
    // It takes two seconds to listen there too: a probe alone would have been satisfied before.
    site.write("script", &format!("--version 2\n{both}\n--also-bind-after-ms 2000\n"));
    supervisor.upgrade();
    assert!(request(site.address, "/").contains("version=2 "));
    assert!(request(more.address, "/").contains("version=2 "));
    assert!(!supervisor.log().contains("not waited for any longer"), "{}", supervisor.log());
}

const HTTPS: &str = "
import http.server, ssl
class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(STATUS)
        self.send_header('Content-Length', '0')
        self.end_headers()
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(('127.0.0.1', PORT), Hello)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain('cert.pem', 'key.pem')
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
";

#[test]
fn https_is_spoken_too() {
    if !installed("python3", &["/usr/bin/python3", "--version"]) {
        return;
    }
    for flags in [
        ["--ready", "https+insecure://ADDRESS/", "--probe-timeout", "5s"].as_slice(),
        &["--ready", "https://ADDRESS/", "--ready-ca", "cert.pem", "--ready-host", "web.example"],
    ] {
        let site = Site::new();
        let made = rcgen::generate_simple_self_signed(["web.example".to_owned()]).unwrap();
        site.write("cert.pem", &made.cert.pem());
        site.write("key.pem", &made.signing_key.serialize_pem());
        site.write("server.py", &HTTPS.replace("STATUS", "204"));
        let words = [flags, &["--", "/usr/bin/python3", "server.py"]].concat();
        let supervisor = site.start(&words);
        supervisor.upgrade();
        site.write("server.py", &HTTPS.replace("STATUS", "500"));
        waits_in_vain(&supervisor, "answered with status 500");
    }
}
