//! What a supervisor leaves to the program that takes its place: a document that names open files by their numbers, which stay
//! the same over execve(2).
//!
//! ```text
//!  {"format":1,"zddsup":"0.1.0","fds":[3,8,…]}      read first: whether the rest can be, and what is left open
//!  {…}                                              the state, as its types derive it
//! ```
//!
//! [`fds`] lets a type that holds open files be derived as any other; [`with`] has the rest that serde does not know. The
//! format's number is raised whenever a document of before cannot be read any more; `tests/fixtures` has one of each.

pub mod fds;
pub mod with;

use std::os::fd::RawFd;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use fds::Passed;

/// The format that is written, and the newest that can be read.
const FORMAT: u32 = 1;
/// The oldest that can be read.
const OLDEST: u32 = 1;

/// What is read first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    format: u32,
    /// Version of who wrote it.
    zddsup: String,
    /// Every fd that is left open.
    pub fds: Vec<RawFd>,
}

/// Why a state cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Something has no place in the format.
    #[error("the state cannot be written down: {0}")]
    Unwritable(serde_json::Error),
    /// There is no header.
    #[error("what it is given is not a supervisor's state")]
    Alien,
    /// It was written by another version.
    #[error(
        "the state has format {found} (zddsup {version}), and this is zddsup {own}, which reads {OLDEST} to {FORMAT}"
    )]
    Format {
        /// Of the state.
        found: u32,
        /// Who wrote it.
        version: String,
        /// Who reads it.
        own: &'static str,
    },
    /// It is broken, or not of that format.
    #[error("the state cannot be read: {0}")]
    Unreadable(serde_json::Error),
}

/// Writes a state down. Gives the numbers of the open files that it names, which have to stay open.
pub fn write(state: &impl Serialize) -> Result<(Vec<u8>, Vec<RawFd>), StateError> {
    let (body, fds) = fds::naming(|| serde_json::to_vec(state));
    let mut body = body.map_err(StateError::Unwritable)?;
    let header = Header { format: FORMAT, zddsup: env!("CARGO_PKG_VERSION").to_owned(), fds };
    let mut document = serde_json::to_vec(&header).map_err(StateError::Unwritable)?;
    document.push(b'\n');
    document.append(&mut body);
    Ok((document, header.fds))
}

/// What is read first.
pub fn header(document: &[u8]) -> Result<Header, StateError> {
    let line = document.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let header: Header = serde_json::from_slice(line).map_err(|_| StateError::Alien)?;
    if (OLDEST..=FORMAT).contains(&header.format) {
        Ok(header)
    } else {
        let own = env!("CARGO_PKG_VERSION");
        Err(StateError::Format { found: header.format, version: header.zddsup, own })
    }
}

/// Reads a state, with the open files that it names.
pub fn read<T: DeserializeOwned>(document: &[u8], passed: Passed) -> Result<T, StateError> {
    header(document)?;
    let begin = document.iter().position(|&byte| byte == b'\n').map_or(document.len(), |at| at + 1);
    fds::among(passed, || serde_json::from_slice(&document[begin..])).map_err(StateError::Unreadable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    #[derive(Serialize, Deserialize)]
    struct Sample {
        #[serde(with = "fds::owned")]
        own: OwnedFd,
        #[serde(with = "fds::shared")]
        shared: Arc<OwnedFd>,
        #[serde(with = "fds::shared")]
        same: Arc<OwnedFd>,
        #[serde(with = "with::moment")]
        at: Instant,
        #[serde(with = "with::moment_option")]
        due: Option<Instant>,
        #[serde(with = "with::path")]
        path: PathBuf,
        #[serde(with = "with::pairs")]
        map: BTreeMap<(u8, u8), u8>,
    }

    fn sample() -> Sample {
        use std::os::unix::ffi::OsStringExt;
        let (own, shared) = nix::unistd::pipe().unwrap();
        let shared = Arc::new(shared);
        let path = std::ffi::OsString::from_vec(b"/not \xff UTF-8".to_vec()).into();
        let at = Instant::now();
        let due = Some(at + Duration::from_secs(5));
        Sample { own, same: Arc::clone(&shared), shared, at, due, path, map: BTreeMap::from([((1, 2), 3)]) }
    }

    #[test]
    fn what_is_written_is_read_with_its_open_files() {
        let before = sample();
        let (document, numbers) = write(&before).unwrap();
        let mut wanted = vec![before.own.as_raw_fd(), before.shared.as_raw_fd()];
        wanted.sort_unstable();
        assert_eq!((&numbers, header(&document).unwrap().fds), (&wanted, wanted.clone()));
        let copies = numbers.iter().map(|&number| {
            let fd = if number == before.own.as_raw_fd() { &before.own } else { &*before.shared };
            (number, fd.try_clone().unwrap())
        });
        let after: Sample = read(&document, Passed::new(copies)).unwrap();
        assert!(Arc::ptr_eq(&after.shared, &after.same), "the same number is the same file");
        nix::unistd::write(&after.shared, b"x").unwrap();
        drop(before.shared);
        drop(before.same);
        nix::unistd::read(&after.own, &mut [0]).unwrap();
        assert!(after.at.max(before.at) - after.at.min(before.at) < Duration::from_micros(1));
        assert_eq!((after.path, after.map), (before.path, before.map));
        let ahead = after.due.unwrap() - after.at;
        assert!(ahead > Duration::from_secs(4) && ahead < Duration::from_secs(6));
    }

    #[test]
    fn a_trial_opens_nothing_of_it() {
        let before = sample();
        let (document, numbers) = write(&before).unwrap();
        let after: Sample = read(&document, Passed::placeholders(&numbers)).unwrap();
        assert_ne!(after.own.as_raw_fd(), before.own.as_raw_fd());
        nix::unistd::read(&after.own, &mut [0]).unwrap();
    }

    #[test]
    fn garbage_and_other_formats_are_refused() {
        let (document, _) = write(&"x").unwrap();
        let text = |document: &[u8]| read::<String>(document, Passed::default()).unwrap_err().to_string();
        for garbage in [&b""[..], b"\n", b"{}", b"\xff\xff", &[0; 1000]] {
            assert_eq!(text(garbage), "what it is given is not a supervisor's state");
        }
        let newer = String::from_utf8(document.clone()).unwrap().replace("\"format\":1", "\"format\":99");
        assert!(text(newer.as_bytes()).contains("format 99"), "{}", text(newer.as_bytes()));
        for cut in document.iter().position(|&byte| byte == b'\n').unwrap()..document.len() {
            assert!(text(&document[..cut]).contains("cannot be read"), "{cut}");
        }
        let before = sample();
        let (document, _) = write(&before).unwrap();
        assert!(read::<Sample>(&document, Passed::default()).is_err(), "an fd that was not passed");
    }
}
