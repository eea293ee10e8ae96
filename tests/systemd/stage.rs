//! A systemd of the test's own, as PID 1 of private namespaces. It sees nothing of the machine's /run, /tmp, network and
//! processes, and dies with the test.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sched::{setns, CloneFlags};
use nix::unistd::geteuid;

use crate::common::load::{Config, Load, Target};
use crate::common::real::{installed, skipped};
use crate::common::{wait_for, PATIENCE, ZDDSUP};

/// The tree of another Debian with a newer systemd: `debootstrap --variant=minbase --include=systemd,iproute2 trixie DIR`.
const NEWER: &str = "ZDDSUP_TEST_SYSTEMD_ROOT";

/// What comes before systemd. $1: the test's directory, $2: that of the programs under test, $3: a cgroup's name, $4: the tree
/// that it runs in, if not the machine's; what is written there is gone with the test.
/// /tmp is hidden last, as all of them may lie in it: systemd would empty it.
const BOOT: &str = r#"
set -e
mount --make-rprivate /
root=
if [ -n "$4" ]; then
    mkdir "$1/tree"
    mount -t tmpfs none "$1/tree"
    root=$1/tree/root
    mkdir "$root" "$1/tree/upper" "$1/tree/work"
    mount -t overlay -o "lowerdir=$4,upperdir=$1/tree/upper,workdir=$1/tree/work" none "$root"
    for one in dev proc sys; do mount --rbind "/$one" "$root/$one"; done
fi
mount -t tmpfs none "$root/run"
mkdir -p "$root/run/systemd/system" "$root/run/stage" "$root/run/target"
mount --bind "$1" "$root/run/stage"
mount --bind "$2" "$root/run/target"
cp -r "$1"/units/. "$root/run/systemd/system/"
touch "$1/console"
mount -t cgroup2 none "$root/sys/fs/cgroup"
own=$root/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)/$3
mkdir "$own"
echo $$ > "$own/cgroup.procs"
mount --bind "$1/console" "$root/dev/console"
if [ -n "$root" ]; then
    cd "$root"
    pivot_root . mnt
    cd /
    umount -l /mnt
else
    mount -t tmpfs none /tmp
fi
exec unshare --pid --fork --kill-child --mount-proc --uts --ipc --cgroup --net sh -ec '
    umount /sys/fs/cgroup
    mount -t cgroup2 none /sys/fs/cgroup
    ip link set lo up
    exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        /lib/systemd/systemd --system --unit=test.target --log-target=console --show-status=no'
"#;

/// What the machine has left of a cgroup whose processes are gone. $1: its name.
const REMOVE: &str = r#"
mount --make-rprivate /
mount -t cgroup2 none /sys/fs/cgroup
find "/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)/$1" -depth -type d -exec rmdir {} +
"#;

static COUNT: AtomicU32 = AtomicU32::new(0);

/// systemd at work.
pub struct Systemd {
    child: Child,
    init: i32,
    dir: tempfile::TempDir,
    cgroup: String,
}

impl Systemd {
    /// Boots, with these units or other files below the directory of units. None where it cannot be had, with the reason
    /// printed.
    #[must_use]
    pub fn boot(units: &[(&str, String)]) -> Option<Systemd> {
        Systemd::boot_in("", units)
    }

    /// The same with a newer systemd, 253 or later.
    #[must_use]
    pub fn boot_newer(units: &[(&str, String)]) -> Option<Systemd> {
        Systemd::boot_in(&newer()?, units)
    }

    fn boot_in(root: &str, units: &[(&str, String)]) -> Option<Systemd> {
        if !geteuid().is_root() {
            skipped("only root may make the namespaces for systemd");
            return None;
        }
        let tools = [("systemd", "/lib/systemd/systemd"), ("iproute2", "ip"), ("util-linux", "nsenter")];
        for (package, program) in tools {
            let version = if program == "ip" { "-V" } else { "--version" };
            if !installed(package, &[program, version]) {
                return None;
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let target = "[Unit]\nDefaultDependencies=no\n".to_owned();
        for (name, text) in units.iter().chain([&("test.target", target)]) {
            let path = dir.path().join("units").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let cgroup = format!("zddsup-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        // It dies with this thread: what is left of it with it, as it is PID 1 there.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "unshare", "--mount", "sh", "-c", BOOT, "boot"]);
        command.arg(dir.path()).arg(Path::new(ZDDSUP).parent().unwrap()).args([&cgroup, root]);
        let errors = fs::File::create(dir.path().join("boot")).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).spawn().unwrap();
        let mut systemd = Systemd { child, init: 0, dir, cgroup };
        systemd.wait_until_up();
        Some(systemd)
    }

    fn wait_until_up(&mut self) {
        let parent = i32::try_from(self.child.id()).unwrap();
        wait_for("systemd is PID 1", || {
            assert!(matches!(self.child.try_wait(), Ok(None)), "it did not boot: {}", self.log());
            let stats = procfs::process::all_processes().unwrap().flatten().filter_map(|process| process.stat().ok());
            let init = stats.into_iter().find(|stat| stat.ppid == parent && stat.comm == "systemd");
            self.init = init.map_or(0, |stat| stat.pid);
            self.init != 0
        });
        wait_for("systemd has booted", || {
            assert!(matches!(self.child.try_wait(), Ok(None)), "it did not boot: {}", self.log());
            self.ctl(&["is-active", "test.target"]).status.success()
        });
    }

    /// A command inside.
    #[must_use]
    pub fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args([
            "--target",
            &self.init.to_string(),
            "--mount",
            "--pid",
            "--net",
            "--uts",
            "--ipc",
            "--wd=/",
            "--",
        ]);
        command.arg(program).args(args).stdin(Stdio::null()).env_remove("XDG_RUNTIME_DIR");
        command
    }

    /// `systemctl ARGS…`
    #[must_use]
    pub fn ctl(&self, args: &[&str]) -> Output {
        self.command("systemctl", args).output().unwrap()
    }

    /// The same, which must succeed.
    #[track_caller]
    pub fn must(&self, args: &[&str]) {
        let output = self.ctl(args);
        assert!(output.status.success(), "systemctl {args:?}: {output:?}\n{}", self.log());
    }

    /// A property of a unit.
    #[must_use]
    pub fn show(&self, unit: &str, property: &str) -> String {
        let output = self.ctl(&["show", "--value", "--property", property, unit]).stdout;
        String::from_utf8(output).unwrap().trim().to_owned()
    }

    /// In its network. Threads that are made there inherit it.
    fn within<T: Send + 'static>(&self, what: impl FnOnce() -> T + Send + 'static) -> T {
        let network = fs::File::open(format!("/proc/{}/ns/net", self.init)).unwrap();
        let thread = std::thread::spawn(move || {
            setns(network, CloneFlags::CLONE_NEWNET).unwrap();
            what()
        });
        thread.join().unwrap()
    }

    /// A connection to a port inside, on which nothing is asked.
    pub fn connect(&self, port: u16) {
        self.within(move || drop(TcpStream::connect(("127.0.0.1", port)).unwrap()));
    }

    /// `zddsup self-upgrade` of the service web must succeed.
    pub fn self_upgrade(&self) {
        let replaced = self.command("/run/target/zddsup", &["self-upgrade", "--name", "web"]).output().unwrap();
        assert!(replaced.status.success(), "{replaced:?}\n{}", self.log());
    }

    /// Starts version 1 of the puppet in a unit, and then two more by a reload, without a request that fails.
    pub fn serves_three_versions(&self, unit: &str, port: u16) {
        self.write("script", "--version 1");
        self.must(&["start", unit]);
        let load = self.load(port);
        for version in 2..=3 {
            self.write("script", &format!("--version {version}"));
            self.must(&["reload", unit]);
            assert!(load.saw(&version.to_string(), PATIENCE), "{}\n{}", load.so_far(), self.log());
        }
        load.stop().assert_clean();
    }

    /// Requests to a port inside.
    #[must_use]
    pub fn load(&self, port: u16) -> Load {
        self.load_of(Target::Tcp(([127, 0, 0, 1], port).into()))
    }

    /// Requests to anywhere inside.
    #[must_use]
    pub fn load_of(&self, target: Target) -> Load {
        let load = self.within(move || Load::start(Config { workers: 2, ..Config::new(target) }));
        assert!(load.more(20, PATIENCE), "no answers: {}\n{}", load.so_far(), self.log());
        load
    }

    /// Something that is done in the network inside.
    pub fn inside<T: Send + 'static>(&self, act: impl FnOnce() -> T + Send + 'static) -> T {
        let network = fs::File::open(format!("/proc/{}/ns/net", self.init)).unwrap();
        // Threads inherit it from the one that makes them; this one is gone then.
        let thread = std::thread::spawn(move || {
            setns(network, CloneFlags::CLONE_NEWNET).unwrap();
            act()
        });
        thread.join().unwrap()
    }

    /// A file of the test's directory: /run/stage inside.
    pub fn write(&self, name: &str, text: &str) {
        let path = self.dir.path().join(name);
        fs::write(path.with_extension("new"), text).unwrap();
        fs::rename(path.with_extension("new"), path).unwrap();
    }

    /// Where such a file is outside.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What systemd and the services have said.
    #[must_use]
    pub fn log(&self) -> String {
        let read = |name| fs::read_to_string(self.dir.path().join(name)).unwrap_or_default();
        ["boot", "console", "log"].map(read).concat()
    }
}

/// The tree with a newer systemd. None where there is none, with the reason printed.
#[must_use]
pub fn newer() -> Option<String> {
    let root = std::env::var(NEWER).unwrap_or_default();
    if root.is_empty() {
        skipped(&format!("{NEWER} names no tree with a newer systemd"));
        return None;
    }
    assert!(Path::new(&root).join("lib/systemd/systemd").exists(), "{NEWER}={root}: no systemd is there");
    Some(root)
}

impl Drop for Systemd {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
        // The last of it is gone a moment after the first.
        let inside = |process: &procfs::process::Process| {
            let cgroups = process.cgroups().map(|all| all.0).unwrap_or_default();
            cgroups.iter().any(|cgroup| cgroup.pathname.contains(&format!("/{}/", self.cgroup)))
        };
        wait_for("all of it is gone", || !procfs::process::all_processes().unwrap().flatten().any(|one| inside(&one)));
        let _left = Command::new("unshare").args(["--mount", "sh", "-c", REMOVE, "remove", &self.cgroup]).status();
        if std::thread::panicking() {
            eprintln!("--- log of systemd and zddsup ---\n{}---", self.log());
        }
    }
}
