//! A puppet under a supervisor: what most tests begin with.

use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;

use crate::common::load::{Config, Load, Target};
use crate::common::{puppet, Setup, Supervisor, PATIENCE};

/// A supervised puppet, whose next generation does what [`Stage::next`] says.
pub struct Stage {
    pub supervisor: Supervisor,
    script: PathBuf,
}

impl Deref for Stage {
    type Target = Supervisor;
    fn deref(&self) -> &Supervisor {
        &self.supervisor
    }
}

impl Stage {
    /// `zddsup run --listen 127.0.0.1:0 FLAGS… -- puppet --script FILE`, until version 1 serves.
    pub fn start(flags: &[&str], puppet_flags: &str) -> Stage {
        Stage::start_on("127.0.0.1:0", flags, puppet_flags)
    }

    /// The same, with another listener.
    pub fn start_on(listen: &str, flags: &[&str], puppet_flags: &str) -> Stage {
        let stage = Stage::spawn_on(listen, flags, puppet_flags);
        stage.wait_until("the first generation serves", |status| status.serving.is_some());
        stage
    }

    /// As [`Stage::start`], and nothing is waited for.
    pub fn spawn(flags: &[&str], puppet_flags: &str) -> Stage {
        Stage::spawn_on("127.0.0.1:0", flags, puppet_flags)
    }

    /// As [`Stage::start`], by a link that [`Stage::put`] changes.
    pub fn start_by_link(flags: &[&str], puppet_flags: &str) -> Stage {
        let (setup, script) = Stage::setup("127.0.0.1:0", flags, puppet_flags);
        Stage { supervisor: setup.by_link("zddsup-link").start(), script }
    }

    /// From now on the program that this one was called by is that one.
    pub fn put(&self, program: &std::path::Path) {
        let (link, beside) = (self.dir.path().join("zddsup-link"), self.dir.path().join("beside"));
        std::os::unix::fs::symlink(program, &beside).unwrap();
        std::fs::rename(beside, link).unwrap();
    }

    fn spawn_on(listen: &str, flags: &[&str], puppet_flags: &str) -> Stage {
        let (setup, script) = Stage::setup(listen, flags, puppet_flags);
        Stage { supervisor: setup.spawn(), script }
    }

    fn setup(listen: &str, flags: &[&str], puppet_flags: &str) -> (Setup, PathBuf) {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let script = dir.path().join("script");
        write(&script, puppet_flags);
        let mut args = vec!["--listen", listen];
        args.extend(flags);
        let (puppet, path) = (puppet(), script.display().to_string());
        args.extend(["--", &puppet, "--script", &path]);
        (Setup::within(dir, args), script)
    }

    /// What the next generation does: flags of the puppet.
    pub fn next(&self, puppet_flags: &str) {
        write(&self.script, puppet_flags);
    }

    /// A connection per request.
    pub fn load(&self) -> Load {
        begin(self.config())
    }

    /// Requests on connections that are used again.
    pub fn keep_alive_load(&self) -> Load {
        begin(self.config().keep_alive())
    }

    fn config(&self) -> Config {
        Config { workers: 2, ..Config::new(Target::Tcp(self.address())) }
    }
}

fn begin(config: Config) -> Load {
    let load = Load::start(config);
    assert!(load.more(20, PATIENCE), "no answers: {}", load.so_far());
    load
}

/// One flag a line: ` --` begins the next.
fn write(script: &std::path::Path, flags: &str) {
    let beside = script.with_extension("new");
    std::fs::write(&beside, flags.trim().replace(" --", "\n--") + "\n").unwrap();
    std::fs::rename(beside, script).unwrap();
}

/// Both kinds of load, ended and clean.
#[track_caller]
pub fn clean(loads: [Load; 2]) -> [crate::common::load::Summary; 2] {
    loads.map(|load| {
        let summary = load.stop();
        summary.assert_clean();
        summary
    })
}
