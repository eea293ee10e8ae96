//! The same units under systemd 253 or later, with `Type=notify-reload` (`systemd/notify-reload.conf`).

use crate::common::{wait_for, PATIENCE};
use crate::stage::Systemd;
use crate::{printed, shipped, template};

/// A puppet at port 80, as the template and the drop-in for notify-reload have it.
fn puppet_at_80(more: &str) -> Option<Systemd> {
    let mut units = template(more);
    units.push(("zddsup@.service.d/notify-reload.conf", shipped("notify-reload.conf")));
    let systemd = Systemd::boot_newer(&units)?;
    let command = "/run/target/examples/puppet --script /run/stage/script";
    systemd.write("web.env", &format!("COMMAND={command}\nFLAGS=--listen 127.0.0.1:80\n"));
    Some(systemd)
}

#[test]
fn a_start_lasts_until_the_first_version_is_ready() {
    // It takes longer than systemd would wait by itself.
    let Some(systemd) = puppet_at_80("TimeoutStartSec=2\n") else { return };
    systemd.write("script", "--version 1\n--ready delay-ms=5000");
    systemd.must(&["start", "zddsup@web"]);
    assert_eq!(systemd.show("zddsup@web", "Type"), "notify-reload");
    assert_eq!(systemd.show("zddsup@web", "StatusText"), "generation 1 serves");
    systemd.load(80).stop().assert_clean();
}

#[test]
fn a_reload_under_load_waits_for_the_new_version() {
    // The second one takes longer than systemd would wait by itself.
    let Some(systemd) = puppet_at_80("TimeoutStartSec=4\n") else { return };
    systemd.write("script", "--version 1");
    systemd.must(&["start", "zddsup@web"]);
    let main = systemd.show("zddsup@web", "MainPID");
    let load = systemd.load(80);
    for (version, delay) in [(2, 100), (3, 7000), (4, 100)] {
        systemd.write("script", &format!("--version {version}\n--ready delay-ms={delay}"));
        systemd.must(&["reload", "zddsup@web"]);
        let status = systemd.show("zddsup@web", "StatusText");
        assert!(status.starts_with(&format!("generation {version} serves")), "{status}\n{}", systemd.log());
        assert!(load.saw(&version.to_string(), PATIENCE), "{}", load.so_far());
    }
    load.stop().assert_clean();
    assert_eq!(systemd.show("zddsup@web", "MainPID"), main);
    assert_eq!(systemd.show("zddsup@web", "SubState"), "running");
}

#[test]
fn a_reload_that_fails_is_told_by_the_status_and_the_old_version_serves_on() {
    let Some(systemd) = puppet_at_80("") else { return };
    systemd.write("script", "--version 1");
    systemd.must(&["start", "zddsup@web"]);
    let load = systemd.load(80);
    systemd.write("script", "--exit-before-ready 7");
    // The protocol has no word for it: systemctl succeeds.
    systemd.must(&["reload", "zddsup@web"]);
    let status = systemd.show("zddsup@web", "StatusText");
    assert!(status.starts_with("generation 1 serves") && status.contains("exited with status 7"), "{status}");
    assert_eq!(systemd.show("zddsup@web", "ActiveState"), "active");
    assert!(load.more(50, PATIENCE));
    let summary = load.stop();
    summary.assert_clean();
    assert_eq!(summary.order(), ["1"]);
}

#[test]
fn a_stop_waits_for_the_drain() {
    let Some(systemd) = puppet_at_80("TimeoutStopSec=2\n") else { return };
    systemd.write("script", "--version 1\n--drain-ms 5000");
    systemd.must(&["start", "zddsup@web"]);
    systemd.must(&["stop", "zddsup@web"]);
    assert_eq!(systemd.show("zddsup@web", "Result"), "success");
    assert_eq!(systemd.show("zddsup@web", "ExecMainStatus"), "0");
}

#[test]
fn a_supervisor_that_hangs_is_killed_and_started_again() {
    let Some(systemd) = puppet_at_80("WatchdogSec=3\n") else { return };
    systemd.write("script", "--version 1");
    systemd.must(&["start", "zddsup@web"]);
    let main = systemd.show("zddsup@web", "MainPID");
    systemd.must(&["kill", "--kill-whom=main", "--signal=STOP", "zddsup@web"]);
    wait_for("another one is there", || {
        let now = systemd.show("zddsup@web", "MainPID");
        now != main && now != "0" && systemd.show("zddsup@web", "ActiveState") == "active"
    });
    systemd.load(80).stop().assert_clean();
}

#[test]
fn an_unmodified_server_is_adopted_with_all_of_the_hardening() {
    let Some(systemd) = puppet_at_80("") else { return };
    let command = "/run/target/examples/puppet --bind 127.0.0.1:8080 --script /run/stage/script";
    let flags = "--user nobody --handoff adopt --ready tcp:127.0.0.1:8080";
    systemd.write("own.env", &format!("COMMAND={command}\nFLAGS={flags}\n"));
    systemd.serves_three_versions("zddsup@own", 8080);
}

#[test]
fn it_finds_nothing_wrong_with_the_units() {
    let server = ["--", "/run/target/examples/puppet"];
    let adopted = printed(&[&["--name", "adopted", "--user", "nobody"], &server[..]].concat());
    let listens = printed(&[&["--name", "listens", "--listen", "8080"], &server[..]].concat());
    let here = |text: String| text.replace(crate::common::ZDDSUP, "/run/target/zddsup");
    let Some(systemd) = Systemd::boot_newer(&[
        ("zddsup@.service", shipped("zddsup@.service")),
        ("zddsup@.service.d/notify-reload.conf", shipped("notify-reload.conf")),
        ("zddsup@.socket", shipped("zddsup@.socket")),
        ("zddsup@web.socket.d/listen.conf", "[Socket]\nListenStream=8080\n".to_owned()),
        ("web.service", shipped("examples/web.service")),
        ("web.socket", shipped("examples/web.socket")),
        ("adopted.service", here(adopted)),
        ("listens.service", here(listens)),
    ]) else {
        return;
    };
    for name in
        ["zddsup@web.service", "zddsup@web.socket", "web.service", "web.socket", "adopted.service", "listens.service"]
    {
        let args = ["verify", "--man=no", "--recursive-errors=no", &format!("/run/systemd/system/{name}")];
        let output = systemd.command("systemd-analyze", &args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let ours = said.lines().filter(|line| line.contains(name)).collect::<Vec<_>>();
        assert!(output.status.success() && ours.is_empty(), "{said}");
    }
}
