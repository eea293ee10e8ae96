//! Another zddsup in the place of a unit's main process.

use crate::common::PATIENCE;
use crate::puppet_at_80;

#[test]
fn self_upgrades_under_load_are_no_restart() {
    let Some(systemd) = puppet_at_80("WatchdogSec=5\n", "") else { return };
    systemd.write("script", "--version 1");
    systemd.must(&["start", "zddsup@web"]);
    let main = systemd.show("zddsup@web", "MainPID");
    let load = systemd.load(80);
    for version in 2..5 {
        systemd.write("script", &format!("--version {version}"));
        systemd.self_upgrade();
        systemd.must(&["kill", "--kill-whom=main", "--signal=USR2", "zddsup@web"]);
        systemd.must(&["reload", "zddsup@web"]);
        assert!(load.saw(&version.to_string(), PATIENCE), "{}", load.so_far());
    }
    load.stop().assert_clean();
    assert_eq!(systemd.show("zddsup@web", "MainPID"), main);
    assert_eq!(systemd.show("zddsup@web", "NRestarts"), "0");
    assert_eq!(systemd.show("zddsup@web", "ActiveState"), "active");
    assert!(systemd.show("zddsup@web", "StatusText").starts_with("generation 4 serves"));
    systemd.must(&["stop", "zddsup@web"]);
    assert_eq!(systemd.show("zddsup@web", "Result"), "success");
}
