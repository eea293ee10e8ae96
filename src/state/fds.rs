//! Open files in derived types: written as their numbers, and read back as what was passed under that number. Which ones were
//! passed is known for the time of one write or read, on this thread.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;

/// Open files by their numbers.
#[derive(Debug, Default)]
pub struct Passed(BTreeMap<RawFd, Arc<OwnedFd>>);

impl Passed {
    /// These.
    #[must_use]
    pub fn new(fds: impl IntoIterator<Item = (RawFd, OwnedFd)>) -> Passed {
        Passed(fds.into_iter().map(|(number, fd)| (number, Arc::new(fd))).collect())
    }

    /// Something harmless in the place of each: the end of an empty pipe. So that a document can be tried without what it
    /// names.
    #[must_use]
    pub fn placeholders(numbers: &[RawFd]) -> Passed {
        let one = |&number| Some((number, nix::unistd::pipe().ok()?.0));
        Passed::new(numbers.iter().filter_map(one))
    }
}

thread_local! {
    static NAMED: RefCell<BTreeSet<RawFd>> = RefCell::default();
    static PASSED: RefCell<Passed> = RefCell::default();
}

/// Which fds are named meanwhile.
pub(super) fn naming<T>(write: impl FnOnce() -> T) -> (T, Vec<RawFd>) {
    NAMED.take();
    let written = write();
    (written, NAMED.take().into_iter().collect())
}

/// Meanwhile these are there. What is not taken is closed afterwards.
pub(super) fn among<T>(passed: Passed, read: impl FnOnce() -> T) -> T {
    PASSED.set(passed);
    let result = read();
    drop(PASSED.take());
    result
}

fn name(number: RawFd) -> RawFd {
    NAMED.with_borrow_mut(|named| named.insert(number));
    number
}

fn passed<E: serde::de::Error>(number: RawFd) -> Result<Arc<OwnedFd>, E> {
    let found = PASSED.with_borrow(|passed| passed.0.get(&number).cloned());
    found.ok_or_else(|| E::custom(format_args!("fd {number} was not passed")))
}

fn copied<E: serde::de::Error>(number: RawFd) -> Result<OwnedFd, E> {
    passed::<E>(number)?.try_clone().map_err(E::custom)
}

/// For `Arc<OwnedFd>`: where the number is the same, so is the file.
pub mod shared {
    use super::{name, passed, Arc, OwnedFd};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::os::fd::AsRawFd;

    /// Writes its number.
    pub fn serialize<S: Serializer>(fd: &Arc<OwnedFd>, to: S) -> Result<S::Ok, S::Error> {
        name(fd.as_raw_fd()).serialize(to)
    }

    /// Takes what was passed under the number.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Arc<OwnedFd>, D::Error> {
        passed(Deserialize::deserialize(from)?)
    }
}

/// For many of them.
pub mod shared_list {
    use super::{name, passed, Arc, OwnedFd};
    use serde::{Deserialize, Deserializer, Serializer};
    use std::os::fd::{AsRawFd, RawFd};

    /// Writes their numbers.
    pub fn serialize<S: Serializer>(fds: &[Arc<OwnedFd>], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(fds.iter().map(|fd| name(fd.as_raw_fd())))
    }

    /// Takes what was passed under the numbers.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Arc<OwnedFd>>, D::Error> {
        Vec::<RawFd>::deserialize(from)?.into_iter().map(passed).collect()
    }
}

/// For `OwnedFd`, and what is made of one: a copy of what was passed.
pub mod owned {
    use super::{copied, name};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::os::fd::{AsFd, AsRawFd, OwnedFd};

    /// Writes its number.
    pub fn serialize<S: Serializer>(fd: &impl AsFd, to: S) -> Result<S::Ok, S::Error> {
        name(fd.as_fd().as_raw_fd()).serialize(to)
    }

    /// Takes a copy of what was passed under the number.
    pub fn deserialize<'de, D: Deserializer<'de>, T: From<OwnedFd>>(from: D) -> Result<T, D::Error> {
        copied(Deserialize::deserialize(from)?).map(T::from)
    }
}

/// For `Option<OwnedFd>`.
pub mod owned_option {
    use super::{copied, name};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::os::fd::{AsRawFd, OwnedFd, RawFd};

    /// Writes its number.
    pub fn serialize<S: Serializer>(fd: &Option<OwnedFd>, to: S) -> Result<S::Ok, S::Error> {
        fd.as_ref().map(|fd| name(fd.as_raw_fd())).serialize(to)
    }

    /// Takes a copy of what was passed under the number.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<OwnedFd>, D::Error> {
        let number = Option::<RawFd>::deserialize(from)?;
        number.map(copied).transpose()
    }
}

/// For many of them.
pub mod owned_list {
    use super::{copied, name};
    use serde::{Deserialize, Deserializer, Serializer};
    use std::os::fd::{AsRawFd, OwnedFd, RawFd};

    /// Writes their numbers.
    pub fn serialize<S: Serializer>(fds: &[OwnedFd], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(fds.iter().map(|fd| name(fd.as_raw_fd())))
    }

    /// Takes copies of what was passed under the numbers.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<OwnedFd>, D::Error> {
        let numbers = Vec::<RawFd>::deserialize(from)?;
        numbers.into_iter().map(copied).collect()
    }
}
