//! A cgroup of the test's own.

use std::fs;
use std::path::Path;

use zddsup::process::cgroup::Cgroup;

/// A new one below our own. None where there cannot be any, with the reason printed.
pub fn made(name: &str) -> Option<Cgroup> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let mounted = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|fields| fields[2] == "cgroup2");
    let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = cgroups.lines().find_map(|line| line.strip_prefix("0::/"));
    let (Some(mounted), Some(own)) = (mounted, own) else {
        println!("skipped: there is no cgroup version 2 here");
        return None;
    };
    let path = Path::new(mounted[1]).join(own).join(format!("zddsup-test-{name}-{}", std::process::id()));
    match Cgroup::make(path.clone()).and_then(|cgroup| cgroup.entrance().map(|_| cgroup)) {
        Ok(cgroup) => Some(cgroup),
        Err(error) => {
            println!("skipped: no cgroup can be made at {}: {error}", path.display());
            None
        }
    }
}
