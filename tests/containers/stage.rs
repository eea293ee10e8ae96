//! What a container engine makes, by hand: namespaces, a read-only root of bind mounts, a small /dev, a user that nobody
//! knows, and zddsup as PID 1. It dies with the test.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use nix::sched::{setns, CloneFlags};
use nix::sys::signal::{kill, Signal};
use nix::unistd::{geteuid, Pid};
use procfs::process::{all_processes, Process, Stat};

use crate::common::load::{Config, Load, Target};
use crate::common::real::{installed, skipped};
use crate::common::{wait_for, PATIENCE, ZDDSUP};

/// Makes the root and becomes PID 1 in it. $1: the test's directory, $2: that of the programs under test, $3: further mounts
/// (a script), $4: uid, or rootless, the rest: the command. The directory of the programs may lie in /tmp, so it is bound first.
const BOOT: &str = r#"
dir=$1 target=$2 mounts=$3 uid=$4
shift 4
mount --make-rprivate /
root=$dir/root
mkdir "$root"
mount -t tmpfs -o mode=755 none "$root"
cd "$root"
mkdir usr etc proc dev tmp old target volume
bind() { mount --bind "$1" "$2"; mount -o remount,bind,ro "$2"; }
bind /usr usr
bind "$target" target
bind "$dir/volume" volume
for link in bin sbin lib lib64; do ln -s usr/$link $link; done
echo root:x:0:0::/:/bin/sh > etc/passwd
mount -t tmpfs -o mode=755 none dev
for name in null zero full random urandom; do touch dev/$name; mount --bind /dev/$name dev/$name; done
mkdir dev/shm
mount -t proc proc proc
mount -t tmpfs -o mode=1777 none dev/shm
ip link set lo up
eval "$mounts"
mount -o remount,bind,ro dev
mount -o remount,ro .
pivot_root . old
exec chroot . sh -ec 'umount -l /old; [ ! -e /no-proc ] || umount /proc
    cd /; uid=$1; shift; set -- env -i PATH=/usr/bin:/bin "$@"
    # It dies with its parent: that is lost with the user, and so said at last.
    set -- setpriv --pdeathsig KILL "$@"
    [ "$uid" = rootless ] && set -- setpriv --reuid 65534 --regid 65534 --clear-groups unshare --user --map-root-user "$@" ||
        set -- setpriv --reuid "$uid" --regid 0 --clear-groups --inh-caps=-all --bounding-set=-all "$@"
    exec setsid "$@"' boot "$uid" "$@"
"#;

/// An uid that is in no `/etc/passwd`, as `OpenShift` chooses one.
const UID: &str = "1000680000";

const ROOTLESS: &str = "rootless";

/// What the container is like.
pub struct Container {
    mounts: String,
    uid: &'static str,
    env: Vec<String>,
    files: Vec<(&'static str, String)>,
}

/// A container at work.
pub struct Running {
    child: Child,
    init: i32,
    dir: tempfile::TempDir,
    uid: &'static str,
    env: Vec<String>,
}

impl Container {
    /// Nothing but /dev/shm can be written to; of an uid that nobody knows.
    pub fn new() -> Container {
        Container { mounts: String::new(), uid: UID, env: Vec::new(), files: Vec::new() }
    }

    /// With a tmpfs for everybody there.
    pub fn tmpfs(mut self, path: &str) -> Container {
        self.mounts += "mount -t tmpfs -o mode=1777 none .";
        self.mounts += path;
        self.mounts += "\n";
        self
    }

    /// With further mounts; the root is the current directory.
    pub fn mounts(mut self, script: &str) -> Container {
        self.mounts += script;
        self
    }

    /// As root, without any capability.
    pub fn root(mut self) -> Container {
        self.uid = "0";
        self
    }

    /// As root of a user namespace that an ordinary user made, as rootless engines do.
    pub fn rootless(mut self) -> Container {
        self.uid = ROOTLESS;
        self
    }

    /// With a file in its volume.
    pub fn file(mut self, name: &'static str, text: &str) -> Container {
        self.files.push((name, text.to_owned()));
        self
    }

    /// With a variable, of commands that are run in it later too.
    pub fn env(mut self, variable: &str) -> Container {
        self.env.push(variable.to_owned());
        self
    }

    /// Starts `zddsup run ARGS…` as PID 1. None where it cannot be had, with the reason printed.
    #[must_use]
    pub fn run(self, args: &[&str]) -> Option<Running> {
        if !geteuid().is_root() {
            skipped("only root may make the namespaces of a container");
            return None;
        }
        let tools = [("iproute2", "ip", "-V"), ("util-linux", "nsenter", "--version")];
        if !tools.iter().all(|(package, program, flag)| installed(package, &[program, flag])) {
            return None;
        }
        let namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc", "--net"];
        let allowed =
            Command::new(namespaces[0]).args(&namespaces[1..]).args(["mount", "--make-rprivate", "/"]).status();
        if !allowed.is_ok_and(|status| status.success()) {
            skipped("namespaces cannot be made here");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("volume")).unwrap();
        for (name, text) in &self.files {
            fs::write(dir.path().join("volume").join(name), text).unwrap();
        }
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).args(namespaces).args(["sh", "-ec", BOOT, "boot"]);
        command.arg(dir.path()).arg(Path::new(ZDDSUP).parent().unwrap()).args([&self.mounts, self.uid]);
        command.args(&self.env).args(["/target/zddsup", "run"]).args(args);
        let child = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        Some(Running { child, init: 0, dir, uid: self.uid, env: self.env })
    }

    /// The same with this script of the puppet, and waits until it serves.
    #[must_use]
    pub fn puppet(self, flags: &[&str], script: &str) -> Option<Running> {
        let command = ["--", "/target/examples/puppet", "--script", "/volume/script"];
        let container = self.file("script", script);
        let mut running = container.run(&[&["--listen", "127.0.0.1:8080"], flags, &command].concat())?;
        running.wait_until_ready();
        Some(running)
    }
}

impl Running {
    /// Waits until zddsup is PID 1 and a generation serves.
    pub fn wait_until_ready(&mut self) {
        self.wait_until_up();
        wait_for("a generation serves", || {
            assert!(matches!(self.child.try_wait(), Ok(None)), "it ended: {}", self.log());
            self.zddsup(&["status", "--ready"]).status.success()
        });
    }

    /// Waits until zddsup is PID 1.
    pub fn wait_until_up(&mut self) {
        let parent = i32::try_from(self.child.id()).unwrap();
        wait_for("zddsup is PID 1", || {
            assert!(matches!(self.child.try_wait(), Ok(None)), "it did not start: {}", self.log());
            let init = stats().into_iter().find(|stat| stat.ppid == parent && stat.comm == "zddsup");
            self.init = init.map_or(0, |stat| stat.pid);
            self.init != 0
        });
    }

    /// A command inside, as `docker exec` and `kubectl exec` run it: not a descendant of PID 1.
    #[must_use]
    pub fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init.to_string(), "--mount", "--pid", "--net", "--uts", "--ipc"]);
        if self.uid == ROOTLESS {
            command.args(["--user", "--setuid=0", "--setgid=0", "--"]);
        } else {
            command.args(["--", "setpriv", "--reuid", self.uid, "--regid", "0", "--clear-groups"]);
            command.args(["--bounding-set=-all", "--inh-caps=-all"]);
        }
        command.args(["env", "-i", "PATH=/usr/bin:/bin"]).args(&self.env);
        command.arg(program).args(args).stdin(Stdio::null());
        command
    }

    /// `zddsup ARGS…` inside.
    #[must_use]
    pub fn zddsup(&self, args: &[&str]) -> Output {
        self.command("/target/zddsup", args).output().unwrap()
    }

    /// The same, which must succeed: what it says.
    #[track_caller]
    pub fn must(&self, args: &[&str]) -> String {
        let output = self.zddsup(args);
        assert!(output.status.success(), "zddsup {args:?}: {output:?}\n{}", self.log());
        String::from_utf8(output.stdout).unwrap()
    }

    /// A signal to PID 1 from outside, as `docker kill` and the kubelet send it.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.init), signal).unwrap();
    }

    /// PID 1, by its number outside.
    #[must_use]
    pub fn init(&self) -> Process {
        Process::new(self.init).unwrap()
    }

    /// Children of PID 1.
    #[must_use]
    pub fn children(&self) -> Vec<Stat> {
        stats().into_iter().filter(|stat| stat.ppid == self.init).collect()
    }

    /// Requests to port 8080 inside.
    #[must_use]
    pub fn load(&self) -> Load {
        let network = fs::File::open(format!("/proc/{}/ns/net", self.init)).unwrap();
        // Threads inherit it from the one that makes them; this one is gone then.
        let begin = std::thread::spawn(move || {
            setns(network, CloneFlags::CLONE_NEWNET).unwrap();
            Load::start(Config { workers: 2, ..Config::new(Target::Tcp(([127, 0, 0, 1], 8080).into())) })
        });
        let load = begin.join().unwrap();
        assert!(load.more(20, PATIENCE), "no answers: {}\n{}", load.so_far(), self.log());
        load
    }

    /// A file of the volume, which can be written to from outside only: /volume inside.
    pub fn write(&self, name: &str, text: &str) {
        let path = self.dir.path().join("volume").join(name);
        fs::write(path.with_extension("new"), text).unwrap();
        fs::rename(path.with_extension("new"), path).unwrap();
    }

    /// Waits for its end: what the engine is told.
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_for("the container ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// What zddsup and its service have said.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // PID 1, as far as it has come: all that is inside goes with it.
        let parent = i32::try_from(self.child.id()).unwrap();
        for stat in stats().into_iter().filter(|stat| stat.ppid == parent) {
            let _gone = kill(Pid::from_raw(stat.pid), Signal::SIGKILL);
        }
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of the container ---\n{}---", self.log());
        }
    }
}

fn stats() -> Vec<Stat> {
    all_processes().unwrap().flatten().filter_map(|process| process.stat().ok()).collect()
}
