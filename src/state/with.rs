//! What serde does not know, or does not write in every case: for `#[serde(with = "…")]`.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::time::{clock_gettime, ClockId};

/// A moment, and what `CLOCK_MONOTONIC` said then. An [`Instant`] is of that clock, and does not tell.
fn known() -> (Instant, Duration) {
    static KNOWN: OnceLock<(Instant, Duration)> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        let clock = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
        (Instant::now(), clock)
    })
}

fn since_boot(at: Instant) -> Duration {
    let (then, clock) = known();
    (clock + at.saturating_duration_since(then)).saturating_sub(then.saturating_duration_since(at))
}

fn instant(since_boot: Duration) -> Instant {
    let (then, clock) = known();
    // Before the machine was started no process was.
    then.checked_sub(clock.saturating_sub(since_boot)).unwrap_or(then) + since_boot.saturating_sub(clock)
}

/// An [`Instant`], as time since boot.
pub mod moment {
    use super::{Duration, Instant};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    /// Writes it.
    pub fn serialize<S: Serializer>(at: &Instant, to: S) -> Result<S::Ok, S::Error> {
        super::since_boot(*at).serialize(to)
    }

    /// Reads it.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Instant, D::Error> {
        Duration::deserialize(from).map(super::instant)
    }
}

/// The same where there may be none.
pub mod moment_option {
    use super::{Duration, Instant};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    /// Writes it.
    #[allow(clippy::ref_option)] // As serde calls it.
    pub fn serialize<S: Serializer>(at: &Option<Instant>, to: S) -> Result<S::Ok, S::Error> {
        at.map(super::since_boot).serialize(to)
    }

    /// Reads it.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Instant>, D::Error> {
        Ok(Option::<Duration>::deserialize(from)?.map(super::instant))
    }
}

/// A path, whatever its bytes.
pub mod path {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::ffi::OsString;
    use std::path::{Path, PathBuf};

    /// Writes it.
    pub fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        path.as_os_str().serialize(to)
    }

    /// Reads it.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
        OsString::deserialize(from).map(PathBuf::from)
    }
}

/// A map the keys of which are no texts, as a list of pairs.
pub mod pairs {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::collections::BTreeMap;

    /// Writes it.
    pub fn serialize<S: Serializer, K: Serialize, V: Serialize>(
        map: &BTreeMap<K, V>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_seq(map)
    }

    /// Reads it.
    pub fn deserialize<'de, D, K, V>(from: D) -> Result<BTreeMap<K, V>, D::Error>
    where
        D: Deserializer<'de>,
        K: Deserialize<'de> + Ord,
        V: Deserialize<'de>,
    {
        Vec::<(K, V)>::deserialize(from).map(BTreeMap::from_iter)
    }
}

/// What is written and read as a text, if it is there.
pub mod text_option {
    use serde::{de::Error, Deserialize, Deserializer, Serialize, Serializer};
    use std::fmt::Display;
    use std::str::FromStr;

    /// Writes it.
    #[allow(clippy::ref_option)] // As serde calls it.
    pub fn serialize<S: Serializer>(value: &Option<impl Display>, to: S) -> Result<S::Ok, S::Error> {
        value.as_ref().map(ToString::to_string).serialize(to)
    }

    /// Reads it.
    pub fn deserialize<'de, D: Deserializer<'de>, T: FromStr<Err: Display>>(from: D) -> Result<Option<T>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        text.map(|text| text.parse().map_err(D::Error::custom)).transpose()
    }
}
