//! Each example under a real `zddsup run`: what it shows is true.
//!
//! | file | what it is about |
//! |---|---|
//! | `servers` | the HTTP servers, in each language: five upgrades under load, no failed request |
//! | `live` | `echo_live`: live connections pass from generation to generation, and are finished at the end |
//! | `demo` | `demo.sh`, the README's first command |
//!
//! What needs go, node or python3 says so and passes where they are missing; with `ZDDSUP_REQUIRE_REAL=1` it fails then.

#[path = "../common/mod.rs"]
mod common;

mod demo;
mod live;
mod servers;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A file of this repository's `examples/`.
fn source(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name).display().to_string()
}

/// A program that somebody may not have, if asking it for its version works.
fn program(names: &[&str], version: &str) -> Option<PathBuf> {
    let works = |name: &&&str| {
        let asked = Command::new(name).arg(version).stdout(Stdio::null()).stderr(Stdio::null()).status();
        asked.is_ok_and(|status| status.success())
    };
    let found = names.iter().find(works).map(PathBuf::from);
    if found.is_none() {
        assert!(std::env::var_os("ZDDSUP_REQUIRE_REAL").is_none_or(|value| value != "1"), "{} is missing", names[0]);
        println!("skipped: {} is missing", names[0]);
    }
    found
}

/// The files below a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn the_readme_has_each_of_them() {
    let directory = source("");
    let readme = std::fs::read_to_string(source("README.md")).unwrap();
    for path in files(Path::new(&directory)) {
        let name = path.strip_prefix(&directory).unwrap().display().to_string();
        assert!(name == "README.md" || readme.contains(&format!("]({name})")), "{name} is not in examples/README.md");
    }
}
