//! The environment that a generation begins with: zddsup's own, the files, then `--env`. What zddsup adds for each
//! generation (its sockets, its number) is added when it is spawned.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

use super::{EnvFile, ServiceConfig};
use crate::proto::listen_fds;

/// Meant for zddsup, or set by it: a generation that saw those of another process would act on them.
const ONLY_OURS: [&str; 4] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "FDSTORE"];
const ONLY_OURS_BEGIN: [&str; 3] = ["ZDDSUP_", "SERVER_STARTER_", "EINHORN_"];
/// What `--user` sets, unless a file or `--env` does.
const OF_A_LOGIN: [&str; 4] = ["USER", "LOGNAME", "HOME", "SHELL"];

/// Why an environment cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum EnvError {
    /// A file cannot be read.
    #[error("cannot read the environment file {path:?}: {source}; with a - before its path it may be missing")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A line is none. Its value is not shown: it may be a secret.
    #[error("environment file {path:?}: the line that begins with {begin:?} is not NAME=VALUE; quote values with spaces or $")]
    Line {
        /// In which file.
        path: PathBuf,
        /// How it begins.
        begin: String,
    },
    /// A variable that zddsup sets.
    #[error("environment file {path:?} sets {name}, which zddsup sets itself; remove the line")]
    Ours {
        /// In which file.
        path: PathBuf,
        /// Which.
        name: String,
    },
}

/// Whether a variable is meant for zddsup, or set by it for each generation.
#[must_use]
pub fn is_for_zddsup(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    ONLY_OURS.contains(&name)
        || listen_fds::VARS.contains(&name)
        || ONLY_OURS_BEGIN.iter().any(|begin| name.starts_with(begin))
}

/// The environment of a new generation, its files read anew: what was removed from one is gone.
pub fn for_generation(config: &ServiceConfig) -> Result<BTreeMap<OsString, OsString>, EnvError> {
    build(std::env::vars_os(), config)
}

fn build(
    own: impl Iterator<Item = (OsString, OsString)>,
    config: &ServiceConfig,
) -> Result<BTreeMap<OsString, OsString>, EnvError> {
    // Another user's home is not the service's.
    let is_other_users = |name: &OsStr| config.user.is_some() && OF_A_LOGIN.iter().any(|of_login| name == *of_login);
    let mut env: BTreeMap<_, _> = own.filter(|(name, _)| !is_for_zddsup(name) && !is_other_users(name)).collect();
    for file in &config.env_files {
        for (name, value) in read(file)? {
            env.insert(name.into(), value.into());
        }
    }
    env.extend(config.env.iter().map(|(name, value)| (name.into(), value.into())));
    Ok(env)
}

fn read(file: &EnvFile) -> Result<Vec<(String, String)>, EnvError> {
    let path = &file.path;
    let lines = match dotenvy::from_path_iter(path) {
        Ok(lines) => lines,
        Err(error) if file.optional && error.not_found() => return Ok(Vec::new()),
        Err(error) => return Err(failed(path, error)),
    };
    let checked = |line: dotenvy::Result<(String, String)>| {
        let (name, value) = line.map_err(|error| failed(path, error))?;
        if is_for_zddsup(name.as_ref()) {
            return Err(EnvError::Ours { path: path.clone(), name });
        }
        if name.contains('\0') || value.contains('\0') {
            return Err(EnvError::Line { path: path.clone(), begin: name });
        }
        Ok((name, value))
    };
    lines.map(checked).collect()
}

fn failed(path: &Path, error: dotenvy::Error) -> EnvError {
    let path = path.to_owned();
    match error {
        dotenvy::Error::LineParse(line, _) => {
            let name = line.split('=').next().unwrap_or_default();
            EnvError::Line { path, begin: name.chars().take(40).collect() }
        }
        dotenvy::Error::Io(source) => EnvError::File { path, source },
        other => EnvError::File { path, source: io::Error::other(other) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::flags::tests::config;
    use std::fs;

    fn built(own: &[(&str, &str)], config: &ServiceConfig) -> Result<BTreeMap<OsString, OsString>, EnvError> {
        build(own.iter().map(|(name, value)| (name.into(), value.into())), config)
    }

    #[test]
    fn what_is_meant_for_zddsup_stays_with_it() {
        let config = config(&["--env", "B=flag", "true"]);
        let own = [
            ("A", "own"),
            ("B", "own"),
            ("LISTEN_ADDR", "for the service"),
            ("JOURNAL_STREAM", "8:1"),
            ("NOTIFY_SOCKET", "/run/n"),
            ("LISTEN_FDS", "1"),
            ("LISTEN_FDNAMES", "x"),
            ("WATCHDOG_USEC", "1"),
            ("ZDDSUP_SOCKET", "3"),
            ("SERVER_STARTER_PORT", "80=3"),
            ("EINHORN_FD_0", "3"),
        ];
        let env = built(&own, &config).unwrap();
        let names: Vec<_> = env.keys().map(|name| name.to_str().unwrap()).collect();
        assert_eq!(names, ["A", "B", "JOURNAL_STREAM", "LISTEN_ADDR"]);
        assert_eq!(env[OsStr::new("B")], "flag");
    }

    #[test]
    fn files_are_read_anew_and_the_later_one_wins() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let (one, two) = (file("one"), file("two"));
        let config = config(&["--env-file", &one, "--env-file", &format!("-{two}"), "--env", "C=flag", "true"]);
        fs::write(&one, "# a comment\nA=1\nB='x y'\nexport C=3\n").unwrap();
        let env = built(&[], &config).unwrap();
        assert_eq!(
            (&env[OsStr::new("A")], &env[OsStr::new("B")], &env[OsStr::new("C")]),
            (&"1".into(), &"x y".into(), &"flag".into())
        );
        fs::write(&one, "A=1\n").unwrap();
        fs::write(&two, "A=2\n").unwrap();
        let env = built(&[], &config).unwrap();
        assert_eq!(env.len(), 2);
        assert_eq!(env[OsStr::new("A")], "2");
        fs::remove_file(&one).unwrap();
        assert!(matches!(built(&[], &config), Err(EnvError::File { .. })));
    }

    #[test]
    fn a_bad_line_is_named_without_its_value() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("env");
        let config = config(&["--env-file", path.to_str().unwrap(), "true"]);
        fs::write(&path, "PASSWORD='hunter2\n").unwrap();
        let error = built(&[], &config).unwrap_err().to_string();
        assert!(error.contains("PASSWORD") && !error.contains("hunter2"), "{error}");
        fs::write(&path, "LISTEN_FDS=1\n").unwrap();
        assert!(matches!(built(&[], &config), Err(EnvError::Ours { .. })));
        fs::write(&path, [0xff, b'=', b'1']).unwrap();
        assert!(matches!(built(&[], &config), Err(EnvError::File { .. })));
    }
}
