//! zddsup under a real systemd: the units of `systemd/`, with the paths of the test in the place of the installed ones.

mod cgroups;
#[path = "../common/mod.rs"]
mod common;
mod hardening;
mod newer;
mod protocol;
mod replacing;
mod sockets;
mod stage;
mod stored;

use common::real::installed;
use common::{puppet, wait_for, PATIENCE};
use stage::Systemd;

/// A unit of `systemd/`.
fn shipped(name: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(name);
    let text = std::fs::read_to_string(path).unwrap();
    text.replace("/usr/local/bin/zddsup", "/run/target/zddsup").replace("/etc/zddsup/", "/run/stage/")
}

/// What a test needs of a unit besides: no boot to wait for, and a log.
const HERE: &str = "[Unit]\nDefaultDependencies=no\n[Service]\nStandardError=append:/run/stage/log\n";

fn template(more: &str) -> Vec<(&'static str, String)> {
    vec![("zddsup@.service", shipped("zddsup@.service")), ("zddsup@.service.d/test.conf", format!("{HERE}{more}"))]
}

/// A supervised puppet at port 80, that does what `script` in the test's directory says.
fn puppet_at_80(more: &str, flags: &str) -> Option<Systemd> {
    let systemd = Systemd::boot(&template(more))?;
    let command = "/run/target/examples/puppet --script /run/stage/script";
    systemd.write("web.env", &format!("COMMAND={command}\nFLAGS=--listen 127.0.0.1:80 {flags}\n"));
    assert!(std::path::Path::new(&puppet()).exists());
    Some(systemd)
}

#[test]
fn started_is_when_the_first_version_is_ready() {
    let Some(systemd) = puppet_at_80("TimeoutStartSec=2\n", "") else { return };
    // Longer than systemd would wait by itself.
    systemd.write("script", "--version 1\n--ready delay-ms=5000");
    systemd.must(&["start", "--no-block", "zddsup@web"]);
    wait_for("it is being started", || systemd.show("zddsup@web", "ActiveState") == "activating");
    wait_for("it is started", || {
        let state = systemd.show("zddsup@web", "ActiveState");
        assert!(["activating", "active"].contains(&state.as_str()), "{state}\n{}", systemd.log());
        state == "active"
    });
    assert_eq!(systemd.show("zddsup@web", "StatusText"), "generation 1 serves");
    systemd.load(80).stop().assert_clean();
}

#[test]
fn a_reload_under_load_waits_for_the_new_version() {
    let Some(systemd) = puppet_at_80("", "") else { return };
    systemd.write("script", "--version 1");
    systemd.must(&["start", "zddsup@web"]);
    let main = systemd.show("zddsup@web", "MainPID");
    let load = systemd.load(80);
    for version in 2..=4 {
        systemd.write("script", &format!("--version {version}\n--ready delay-ms=200"));
        systemd.must(&["reload", "zddsup@web"]);
        assert!(systemd.show("zddsup@web", "StatusText").starts_with(&format!("generation {version} serves")));
        assert!(load.saw(&version.to_string(), PATIENCE), "{}", load.so_far());
    }
    load.stop().assert_clean();
    assert_eq!(systemd.show("zddsup@web", "MainPID"), main);
    assert_eq!(systemd.show("zddsup@web", "SubState"), "running");
}

#[test]
fn a_reload_that_fails_says_so_and_the_old_version_serves_on() {
    let Some(systemd) = puppet_at_80("", "") else { return };
    systemd.write("script", "--version 1");
    systemd.must(&["start", "zddsup@web"]);
    let load = systemd.load(80);
    systemd.write("script", "--exit-before-ready 7");
    let failed = systemd.ctl(&["reload", "zddsup@web"]);
    assert!(!failed.status.success(), "{failed:?}");
    assert_eq!(systemd.show("zddsup@web", "ActiveState"), "active");
    let status = systemd.show("zddsup@web", "StatusText");
    assert!(status.starts_with("generation 1 serves") && status.contains("exited with status 7"), "{status}");
    assert!(load.more(50, PATIENCE));
    let summary = load.stop();
    summary.assert_clean();
    assert_eq!(summary.order(), ["1"]);
}

#[test]
fn an_upgrade_by_signal_is_seen_as_a_reload() {
    let Some(systemd) = puppet_at_80("", "") else { return };
    systemd.write("script", "--version 1");
    systemd.must(&["start", "zddsup@web"]);
    systemd.write("script", "--version 2\n--ready delay-ms=4000");
    systemd.must(&["kill", "--kill-whom=main", "--signal=HUP", "zddsup@web"]);
    wait_for("it reloads", || systemd.show("zddsup@web", "ActiveState") == "reloading");
    wait_for("it has reloaded", || systemd.show("zddsup@web", "ActiveState") == "active");
    assert!(systemd.show("zddsup@web", "StatusText").starts_with("generation 2 serves"));
}

#[test]
fn a_stop_waits_for_the_drain() {
    // Longer than systemd would wait by itself.
    let Some(systemd) = puppet_at_80("TimeoutStopSec=2\n", "") else { return };
    systemd.write("script", "--version 1\n--drain-ms 5000");
    systemd.must(&["start", "zddsup@web"]);
    systemd.must(&["stop", "zddsup@web"]);
    assert_eq!(systemd.show("zddsup@web", "Result"), "success");
    assert_eq!(systemd.show("zddsup@web", "ExecMainStatus"), "0");
}

#[test]
fn a_supervisor_that_hangs_is_killed_and_started_again() {
    let Some(systemd) = puppet_at_80("WatchdogSec=3\n", "") else { return };
    systemd.write("script", "--version 1");
    systemd.must(&["start", "zddsup@web"]);
    let main = systemd.show("zddsup@web", "MainPID");
    // A loop that turns is left alone for longer than that.
    let fed = std::time::Instant::now();
    wait_for("twice its limit is over", || fed.elapsed().as_secs() >= 7);
    assert_eq!(systemd.show("zddsup@web", "MainPID"), main, "{}", systemd.log());
    systemd.must(&["kill", "--kill-whom=main", "--signal=STOP", "zddsup@web"]);
    wait_for("another one is there", || {
        let now = systemd.show("zddsup@web", "MainPID");
        now != main && now != "0" && systemd.show("zddsup@web", "ActiveState") == "active"
    });
    assert_eq!(systemd.show("zddsup@web", "NRestarts"), "1");
    systemd.load(80).stop().assert_clean();
}

#[test]
fn an_unmodified_server_is_adopted_with_all_of_the_hardening() {
    adopts("", "--user nobody");
}

#[test]
fn zddsup_and_an_unmodified_server_run_as_an_ordinary_user() {
    adopts("User=nobody\nEnvironment=XDG_RUNTIME_DIR=/run\n", "");
}

fn adopts(more: &str, flags: &str) {
    let Some(systemd) = Systemd::boot(&template(more)) else { return };
    let command = "/run/target/examples/puppet --bind 127.0.0.1:8080 --script /run/stage/script";
    systemd.write("web.env", &format!("COMMAND={command}\nFLAGS={flags} --handoff adopt --ready tcp:127.0.0.1:8080\n"));
    systemd.serves_three_versions("zddsup@web", 8080);
}

#[test]
fn the_example_wraps_an_unmodified_server() {
    if !installed("python3", &["/usr/bin/python3", "--version"]) {
        return;
    }
    let Some(systemd) = Systemd::boot(&template("")) else { return };
    systemd.write("http.env", &shipped("examples/http.env"));
    systemd.must(&["start", "zddsup@http"]);
    let load = systemd.load(8080);
    systemd.must(&["reload", "zddsup@http"]);
    assert!(systemd.show("zddsup@http", "StatusText").starts_with("generation 2 serves"));
    assert!(load.more(50, PATIENCE), "{}", load.so_far());
    load.stop().assert_clean();
}

#[test]
fn sockets_of_two_units_start_the_service_and_outlive_it() {
    let server = "/run/target/examples/puppet --script /run/stage/script";
    let admin = shipped("examples/web.socket").replace("=8080", "=127.0.0.1:8081").replace("=web\n", "=admin\n");
    let socket = |text: String| text.replace("[Unit]", "[Unit]\nDefaultDependencies=no");
    let Some(systemd) = Systemd::boot(&[
        ("web.service", shipped("examples/web.service").replace("/srv/web/current/server", server)),
        ("web.service.d/test.conf", HERE.replace("[Service]", "After=web-admin.socket\n[Service]")),
        ("web.socket", socket(shipped("examples/web.socket").replace("=8080", "=127.0.0.1:8080"))),
        ("web-admin.socket", socket(admin)),
    ]) else {
        return;
    };
    systemd.write("script", "--version 1");
    systemd.must(&["start", "web.socket", "web-admin.socket"]);
    assert_eq!(systemd.show("web.service", "ActiveState"), "inactive");
    // The first connection starts it, and waits.
    let loads = [systemd.load(8080), systemd.load(8081)];
    wait_for("it is started", || systemd.show("web.service", "ActiveState") == "active");
    let status = systemd.command("/run/target/zddsup", &["status", "--name", "web"]).output().unwrap();
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(["web", "admin"].iter().all(|name| status.contains(name)), "{status}");
    systemd.write("script", "--version 2");
    systemd.must(&["reload", "web.service"]);
    // Restarted as a whole, nobody is refused either: the sockets are systemd's.
    systemd.write("script", "--version 3");
    systemd.must(&["restart", "web.service"]);
    for load in loads {
        assert!(load.saw("3", PATIENCE), "{}", load.so_far());
        let summary = load.stop();
        summary.assert_clean();
        assert_eq!(summary.order(), ["1", "2", "3"]);
    }
}

/// `zddsup unit ARGS…`
fn printed(args: &[&str]) -> String {
    let output = std::process::Command::new(common::ZDDSUP).arg("unit").args(args).current_dir("/").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    if !installed("systemd", &["systemd-analyze", "--version"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| {
        // Who is not installed where the units say is not looked for.
        let text = text.replace("/run/target/zddsup", common::ZDDSUP);
        std::fs::write(dir.path().join(name), text).unwrap();
    };
    write("zddsup@.service", shipped("zddsup@.service"));
    write("web.service", shipped("examples/web.service"));
    write("web.socket", shipped("examples/web.socket"));
    write(
        "adopted.service",
        printed(&["--name", "adopted", "--user", "nobody", "--", "server", "--odd", "a b;$c 100% \"d\""]),
    );
    write("listens.service", printed(&["--listen", "8080", "--drain-timeout", "infinity", "--", "server"]));
    for name in ["zddsup@web.service", "web.service", "web.socket", "adopted.service", "listens.service"] {
        let mut verify = std::process::Command::new("systemd-analyze");
        verify.args(["verify", "--man=no", "--recursive-errors=no"]).arg(dir.path().join(name));
        let output = verify.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        // Other units of the machine are not ours.
        let ours = said.lines().filter(|line| line.contains(name)).collect::<Vec<_>>();
        assert!(output.status.success() && ours.is_empty(), "{said}");
    }
}

#[test]
fn a_printed_unit_runs_what_was_asked_for() {
    let odd = "a  b;'$HOME' \"100%h\" \\ ;";
    let unit = printed(&[
        "--name",
        "odd",
        "--listen",
        "127.0.0.1:80",
        "--",
        "/run/target/examples/puppet",
        "--stderr",
        odd,
        "--script",
        "/run/stage/script",
    ]);
    let unit = unit.replace(common::ZDDSUP, "/run/target/zddsup");
    let Some(systemd) = Systemd::boot(&[("odd.service", unit), ("odd.service.d/test.conf", HERE.to_owned())]) else {
        return;
    };
    systemd.write("script", "--version 1");
    systemd.must(&["start", "odd"]);
    let load = systemd.load(80);
    systemd.write("script", "--version 2");
    systemd.must(&["reload", "odd"]);
    assert!(load.saw("2", PATIENCE), "{}", load.so_far());
    load.stop().assert_clean();
    assert!(systemd.log().contains(odd), "{}", systemd.log());
}
