//! A canary: shares and networks that a new version gets before it gets everything, and what is checked meanwhile.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::ready::{Probe, Ready};
use super::values::{self, Span};

const CANARY: &str = "Canary";

/// How long a step lasts, where it is not said.
const INTERVAL: Duration = Duration::from_secs(30);

/// More steps, or networks, help nobody.
const MOST: usize = 64;

/// A part of everything new, in hundredths of a percent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Share(u16);

impl Share {
    /// Everything.
    pub const ALL: Share = Share(10_000);
    /// Nothing.
    pub const NONE: Share = Share(0);

    /// Its weight, and that of the rest.
    #[must_use]
    pub fn weights(self) -> (u32, u32) {
        (self.0.into(), (Share::ALL.0 - self.0).into())
    }

    /// From 0 to 1.
    #[must_use]
    pub fn fraction(self) -> f64 {
        f64::from(self.0) / f64::from(Share::ALL.0)
    }
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_suffix('%').unwrap_or(text);
        let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let hundredths = || {
            let whole: u16 = whole.parse().ok().filter(|whole| *whole <= 100)?;
            let part: u16 = format!("{part:0<2}").parse().ok()?;
            Some(whole * 100 + part)
        };
        let share = (digits(whole) && digits(part) && part.len() <= 2).then(hundredths).flatten();
        let share = share.filter(|share| (1..=Share::ALL.0).contains(share));
        share.map(Share).ok_or_else(|| "write a share from 0.01% to 100%, such as 5%".to_owned())
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, part) = (self.0 / 100, self.0 % 100);
        match (part, part % 10) {
            (0, _) => write!(f, "{whole}%"),
            (_, 0) => write!(f, "{whole}.{}%", part / 10),
            _ => write!(f, "{whole}.{part:02}%"),
        }
    }
}

/// An IP network: `10.0.0.0/8`, `2001:db8::/32`, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its first address.
    pub address: IpAddr,
    /// Leading bits of it that count.
    pub bits: u8,
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, bits) = text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        let address: IpAddr =
            address.parse().map_err(|_| "write a network such as 10.0.0.0/8 or 2001:db8::/32".to_owned())?;
        let (width, number) = match address {
            IpAddr::V4(ip) => (32, u128::from(ip.to_bits())),
            IpAddr::V6(ip) => (128, ip.to_bits()),
        };
        let bits = match bits {
            None => width,
            Some(bits) => bits
                .parse()
                .ok()
                .filter(|number| *number <= width && !bits.starts_with('+'))
                .ok_or_else(|| format!("after the slash stands a number from 0 to {width}"))?,
        };
        let rest = u128::MAX.checked_shr(128 - u32::from(width - bits)).unwrap_or(0);
        if number & rest != 0 {
            return Err(format!("{address} is not the first address of a network of {bits} bits: clear the rest"));
        }
        Ok(Network { address, bits })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

impl Serialize for Share {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "0%" => Ok(Share::NONE),
            text => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// What a canary is written as: options of `upgrade`, of `run`, and of `POST /v1/upgrade`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Args)]
pub struct CanaryFlags {
    /// Give the new version this share of new connections first, until `zddsup promote` or `abort`
    #[arg(long, value_name = "SHARE", conflicts_with = "canary_steps", help_heading = CANARY)]
    pub canary: Option<Share>,

    /// Give it all new connections from this network meanwhile, such as 10.0.0.0/8; repeatable
    #[arg(long, value_name = "CIDR", help_heading = CANARY)]
    pub canary_from: Vec<Network>,

    /// Give it one share after the other, such as 1%,10%,50%,100%; the last, 100%, is the switch
    #[arg(long, value_name = "SHARES", value_delimiter = ',', help_heading = CANARY)]
    pub canary_steps: Vec<Share>,

    /// How long each step lasts [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = values::some_time, help_heading = CANARY)]
    pub canary_interval: Option<Span>,

    /// Check again and again, at least once in each step: exec:COMMAND or http://…; its failure ends the canary
    ///
    /// The command finds the new version's number and pid in `ZDDSUP_GENERATION` and `ZDDSUP_PID`; http:// asks whoever
    /// answers there for 2xx or 3xx. Once it fails, the old version has everything again.
    #[arg(long, value_name = "CHECK", value_parser = check, help_heading = CANARY)]
    pub canary_check: Option<Probe>,
}

/// `exec:COMMAND`, `http://…`
fn check(text: &str) -> Result<Probe, String> {
    let is_one = ["exec:", "http://", "https://", "https+insecure://"].iter().any(|scheme| text.starts_with(scheme));
    match is_one.then(|| text.parse()).transpose()? {
        Some(Ready::Probe(probe @ (Probe::Exec(_) | Probe::Http(_)))) => Ok(probe),
        _ => Err("write exec:COMMAND or http://HOST:PORT/PATH".to_owned()),
    }
}

/// Options that cannot be meant together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CanaryError {
    /// A canary without a share.
    #[error(
        "--canary-interval and --canary-check go with --canary, --canary-from or --canary-steps: give one of them"
    )]
    NoShare,
    /// Two kinds of shares.
    #[error("--canary is one share and --canary-steps are several: give one of the two")]
    ShareAndSteps,
    /// Everything at once.
    #[error("100% is the whole upgrade: leave --canary away, or give a smaller share")]
    Everything,
    /// Down, or the same again.
    #[error("--canary-steps go up, each more than the one before, to 100% at most")]
    NotUp,
    /// Nothing to wait for.
    #[error("--canary-interval goes with --canary-steps; one share lasts until `zddsup promote` or `abort`")]
    NoSteps,
    /// More than anybody needs.
    #[error("at most {MOST} steps and {MOST} networks are taken")]
    TooMany,
}

/// A canary as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Canary {
    /// One after the other; at least one, and none is everything.
    pub shares: Vec<Share>,
    /// Whether the switch comes by itself after the last.
    pub switches: bool,
    /// How long each lasts, but for the last of those that do not switch.
    pub interval: Duration,
    /// From there it gets everything.
    pub from: Vec<Network>,
    /// What is checked meanwhile.
    #[serde(with = "crate::state::with::text_option")]
    pub check: Option<Probe>,
}

impl CanaryFlags {
    /// What they mean together; none where none is given.
    pub fn plan(&self) -> Result<Option<Canary>, CanaryError> {
        if *self == CanaryFlags::default() {
            return Ok(None);
        }
        if self.canary_steps.len() > MOST || self.canary_from.len() > MOST {
            return Err(CanaryError::TooMany);
        }
        let mut shares = match (self.canary, &self.canary_steps[..]) {
            (Some(_), [_, ..]) => return Err(CanaryError::ShareAndSteps),
            (Some(share), []) => vec![share],
            (None, []) if self.canary_from.is_empty() => return Err(CanaryError::NoShare),
            (None, []) => vec![Share::NONE],
            (None, steps) => steps.to_vec(),
        };
        if self.canary_interval.is_some() && self.canary_steps.is_empty() {
            return Err(CanaryError::NoSteps);
        }
        if !shares.is_sorted_by(|one, next| one < next) {
            return Err(CanaryError::NotUp);
        }
        let switches = shares.last() == Some(&Share::ALL);
        if switches {
            shares.pop();
        }
        if shares.is_empty() {
            return Err(CanaryError::Everything);
        }
        Ok(Some(Canary {
            shares,
            switches,
            interval: self.canary_interval.map_or(INTERVAL, |Span(interval)| interval),
            from: self.canary_from.clone(),
            check: self.canary_check.clone(),
        }))
    }

    /// One of them, by its name without the dashes.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        match name {
            "canary" => self.canary = Some(value.parse()?),
            "canary-from" => self.canary_from.push(value.parse()?),
            "canary-steps" => {
                self.canary_steps = value.split(',').map(str::parse).collect::<Result<_, _>>()?;
            }
            "canary-interval" => self.canary_interval = Some(values::some_time(value)?),
            "canary-check" => self.canary_check = Some(check(value)?),
            _ => return Err("there is no such option".to_owned()),
        }
        Ok(())
    }

    /// All that are given, as [`CanaryFlags::set`] takes them.
    #[must_use]
    pub fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut pairs = Vec::new();
        pairs.extend(self.canary.map(|share| ("canary", share.to_string())));
        pairs.extend(self.canary_from.iter().map(|network| ("canary-from", network.to_string())));
        if !self.canary_steps.is_empty() {
            let steps: Vec<_> = self.canary_steps.iter().map(Share::to_string).collect();
            pairs.push(("canary-steps", steps.join(",")));
        }
        pairs.extend(self.canary_interval.map(|interval| ("canary-interval", interval.to_string())));
        pairs.extend(self.canary_check.as_ref().map(|check| ("canary-check", check.to_string())));
        pairs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn flags(pairs: &[(&str, &str)]) -> CanaryFlags {
        let mut flags = CanaryFlags::default();
        for (name, value) in pairs {
            flags.set(name, value).unwrap();
        }
        flags
    }

    #[test]
    fn shares_are_percents() {
        for (text, weights, shown) in [
            ("5%", (500, 9_500), "5%"),
            ("5", (500, 9_500), "5%"),
            ("0.5%", (50, 9_950), "0.5%"),
            ("12.05%", (1_205, 8_795), "12.05%"),
            ("100%", (10_000, 0), "100%"),
        ] {
            let share: Share = text.parse().unwrap();
            assert_eq!((share.weights(), share.to_string().as_str()), (weights, shown), "{text}");
        }
        for bad in ["", "%", "0", "0.00%", "100.01%", "101", "-1", "+5", "5%%", "1.234%", "half", "1.", ".5"] {
            assert!(bad.parse::<Share>().is_err(), "{bad}");
        }
    }

    #[test]
    fn networks_have_nothing_after_their_bits() {
        for (text, shown) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("127.0.0.2", "127.0.0.2/32"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("2001:db8::/32", "2001:db8::/32"),
            ("::/0", "::/0"),
            ("::1", "::1/128"),
        ] {
            assert_eq!(text.parse::<Network>().unwrap().to_string(), shown);
        }
        for bad in ["", "10.0.0.1/8", "10.0.0.0/33", "::1/64", "::/129", "10.0.0.0/+8", "10.0.0.0/", "host/8"] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_meant_together() {
        let steps =
            flags(&[("canary-steps", "1%,10%,50%,100%"), ("canary-check", "exec:true")]).plan().unwrap().unwrap();
        assert_eq!((steps.shares.len(), steps.switches, steps.interval), (3, true, INTERVAL));
        let one = flags(&[("canary", "5%"), ("canary-from", "10.0.0.0/8")]).plan().unwrap().unwrap();
        assert_eq!((one.shares.len(), one.switches, one.from.len()), (1, false, 1));
        let from = flags(&[("canary-from", "::1")]).plan().unwrap().unwrap();
        assert_eq!((from.shares, from.switches), (vec![Share::NONE], false));
        assert!(!flags(&[("canary-steps", "1,2")]).plan().unwrap().unwrap().switches);
        assert_eq!(CanaryFlags::default().plan(), Ok(None));
        for (pairs, error) in [
            (&[("canary-check", "exec:true")][..], CanaryError::NoShare),
            (&[("canary-interval", "1s")], CanaryError::NoShare),
            (&[("canary", "5%"), ("canary-interval", "1s")], CanaryError::NoSteps),
            (&[("canary", "5%"), ("canary-steps", "5%")], CanaryError::ShareAndSteps),
            (&[("canary", "100%")], CanaryError::Everything),
            (&[("canary-steps", "100%")], CanaryError::Everything),
            (&[("canary-steps", "5%,5%")], CanaryError::NotUp),
            (&[("canary-steps", "50%,5%")], CanaryError::NotUp),
        ] {
            assert_eq!(flags(pairs).plan(), Err(error), "{pairs:?}");
        }
        for (name, value) in
            [("canary-check", "tcp:80"), ("canary-check", "auto"), ("canary-x", "1"), ("canary-steps", "")]
        {
            assert!(CanaryFlags::default().set(name, value).is_err(), "{name}={value}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_is_shown_is_read_back(
            text in "[0-9.:/%,+a-f-]{0,20}",
            name in "canary(-from|-steps|-interval|-check)?",
        ) {
            let mut given = CanaryFlags::default();
            if given.set(&name, &text).is_ok() {
                let mut again = CanaryFlags::default();
                for (name, value) in given.pairs() {
                    again.set(name, &value).unwrap();
                }
                prop_assert_eq!(given, again);
            }
        }
    }
}
