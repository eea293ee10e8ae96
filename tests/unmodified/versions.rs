//! New versions that are not as they should be. (One that crashes after it has listened is in `steering`.)

use std::fs;
use std::net::{TcpListener, TcpStream};

use crate::common::load::Load;
use crate::common::real::installed;
use crate::common::{processes_with, puppet, wait_for, Supervisor, PATIENCE};
use crate::stage::{upgrade_under_load, Site};

/// A server that is a shell script, under load.
struct Scripted {
    site: Site,
    supervisor: Supervisor,
    load: Load,
}

impl Scripted {
    /// Runs this script, in which `SERVE` is the command of a server.
    fn start(flags: &[&str], script: &str) -> Scripted {
        let site = Site::new();
        write(&site, script);
        let supervisor = site.start(&[flags, &["--", "sh", "server"]].concat());
        let load = Load::start(site.load());
        assert!(load.more(20, PATIENCE), "{}", load.so_far());
        Scripted { site, supervisor, load }
    }

    /// The next version is not taken, for this reason; nobody notices, and nothing of it is left.
    fn refuses(&self, script: &str, reason: &str) {
        write(&self.site, script);
        let output = self.supervisor.cli(&["upgrade"]);
        assert_eq!(output.status.code(), Some(3), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(reason), "{said}");
        self.supervisor.wait_settled();
        assert!(self.load.more(20, PATIENCE), "{}", self.load.so_far());
    }

    /// The next version is taken.
    fn takes(&self, script: &str, version: &str) {
        write(&self.site, script);
        self.supervisor.upgrade();
        assert!(self.load.saw(version, PATIENCE), "{}", self.load.so_far());
    }

    /// These versions answered, and each request was answered.
    fn ends_with(self, versions: &[&str]) {
        let summary = self.load.stop();
        summary.assert_clean();
        assert_eq!(summary.order(), versions, "{summary}");
        self.supervisor.wait_settled();
    }
}

fn write(site: &Site, script: &str) {
    site.write("server", &script.replace("SERVE", &format!("{} --ready none --bind ADDRESS --version", puppet())));
}

#[test]
fn one_that_never_listens() {
    let server = Scripted::start(&["--start-timeout", "2s"], "exec SERVE 1");
    server.refuses("exec sleep 1000", "it never called listen(2)");
    server.takes("exec SERVE 3", "3");
    server.ends_with(&["1", "3"]);
}

#[test]
fn one_that_wants_a_port_that_another_program_has() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap();
    let server = Scripted::start(&[], "exec SERVE 1");
    server.refuses(
        &format!("exec SERVE 2 --also-bind {taken}"),
        &format!("cannot listen on {taken}: Address already in use"),
    );
    server.ends_with(&["1"]);
}

#[test]
fn a_script_that_starts_a_daemon_and_exits() {
    let server = Scripted::start(&[], "SERVE 1 & exit 0");
    let first = server.supervisor.serving().pid;
    for version in ["2", "3", "4", "5", "6"] {
        server.takes(&format!("SERVE {version} & exit 0"), version);
    }
    assert_ne!(server.supervisor.serving().pid, first);
    server.ends_with(&["1", "2", "3", "4", "5", "6"]);
}

#[test]
fn a_script_that_exits_when_its_daemon_serves_already() {
    let server = Scripted::start(&[], "exec SERVE 1");
    server.takes("SERVE 2 & until test -e over; do sleep 0.1; done", "2");
    let before = server.supervisor.serving();
    server.site.write("over", "");
    let after = server.supervisor.wait_until("the daemon is the main process", |status| {
        status
            .generations
            .iter()
            .any(|generation| generation.pid.is_some() && generation.number.0 == 2 && generation.pid != before.pid)
    });
    assert_eq!(after.serving.unwrap().0, 2);
    server.takes("exec SERVE 3", "3");
    server.ends_with(&["1", "2", "3"]);
}

/// Which of them is the server cannot be known.
#[test]
fn a_script_that_starts_two_daemons_and_exits() {
    let server = Scripted::start(&[], "exec SERVE 1");
    server.refuses(
        "sleep 1000 & sleep 1001 & exit 0",
        "exited with status 0 before it was ready; let it stay in the foreground",
    );
    let directory = server.site.dir.path().to_str().unwrap().to_owned();
    wait_for("nothing of it is left", || processes_with(&directory).len() == 2);
    server.ends_with(&["1"]);
}

/// It also writes its title over its environment, by which its processes are found else.
#[test]
fn nginx_as_a_daemon() {
    if installed("nginx", &["nginx", "-v"]) {
        let site = Site::new();
        site.write(
            "nginx.conf",
            "worker_processes 2;\n\
             error_log stderr error;\n\
             events {}\n\
             http { access_log off; server { listen ADDRESS; location / { return 200 'nginx\\n'; } } }\n",
        );
        let nginx = ["nginx", "-p", ".", "-e", "stderr", "-c", "nginx.conf", "-g", "pid nginx-{generation}.pid;"];
        let words = [&["--stop-signal", "QUIT", "--"], &nginx[..]].concat();
        let supervisor = site.start(&words);
        upgrade_under_load(&supervisor, &site.load());
        let before = supervisor.serving().pid;
        supervisor.kill_alone();
        let supervisor = site.start(&words);
        supervisor
            .wait_until("the next one has taken over", |status| status.serving.is_some_and(|number| number.0 > 6));
        supervisor.wait_settled();
        assert_ne!(supervisor.serving().pid, before);
        assert!(supervisor.cli(&["stop"]).status.success());
        assert!(TcpStream::connect(site.address).is_err());
        let left = fs::read_dir(site.dir.path())
            .unwrap()
            .flatten()
            .filter(|file| file.path().extension() == Some("pid".as_ref()));
        assert_eq!(left.count(), 0, "each nginx removes its pid file at its end");
    }
}
