//! `--ready`: what shows that a generation can serve.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use super::values::{self, Span};

/// What shows that a generation can serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ready {
    /// It says so, or it says nothing at all and runs.
    Auto,
    /// It says so: READY=1 (`sd_notify(3)`), or ready on the handoff socket.
    Notify,
    /// It listens wherever the generation before does (unmodified programs).
    Listen,
    /// Something else finds out.
    Probe(Probe),
    /// It runs for so long.
    Delay(Duration),
}

/// How something else finds out whether a generation can serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// It takes connections here.
    Tcp(SocketAddr),
    /// It answers a GET with 2xx or 3xx.
    Http(Url),
    /// This shell command succeeds.
    Exec(String),
}

/// How HTTP is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// `http://`
    Plain,
    /// `https://`: the certificate is looked at.
    Verified,
    /// `https+insecure://`: any certificate will do.
    Insecure,
}

impl Scheme {
    const ALL: [Scheme; 3] = [Scheme::Plain, Scheme::Verified, Scheme::Insecure];

    fn prefix(self) -> &'static str {
        match self {
            Scheme::Plain => "http://",
            Scheme::Verified => "https://",
            Scheme::Insecure => "https+insecure://",
        }
    }

    fn usual_port(self) -> u16 {
        match self {
            Scheme::Plain => 80,
            Scheme::Verified | Scheme::Insecure => 443,
        }
    }
}

/// An `http://` or `https://` address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    /// How it is spoken.
    pub scheme: Scheme,
    /// Where to connect.
    pub address: SocketAddr,
    /// What the Host header says.
    pub host: String,
    /// Path and query, from the first slash on.
    pub path: String,
}

impl Url {
    /// By which the server is known, where nothing else was said.
    #[must_use]
    pub fn name(&self) -> String {
        let host = self.host.split(':').next().unwrap_or_default();
        if host.eq_ignore_ascii_case("localhost") {
            host.to_owned()
        } else {
            self.address.ip().to_string()
        }
    }
}

impl Probe {
    /// Where it connects to, if it does so by TCP.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Probe::Tcp(address) | Probe::Http(Url { address, .. }) => Some(*address),
            Probe::Exec(_) => None,
        }
    }
}

impl FromStr for Probe {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse()? {
            Ready::Probe(probe) => Ok(probe),
            Ready::Auto | Ready::Notify | Ready::Listen | Ready::Delay(_) => Err("it is no probe".to_owned()),
        }
    }
}

impl FromStr for Ready {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => return Ok(Ready::Auto),
            "notify" => return Ok(Ready::Notify),
            "listen" => return Ok(Ready::Listen),
            "tcp" => {
                return Err(
                    "write tcp:PORT with a port of the new process alone: what --listen binds is shared with the \
                            old generation, which may answer in its place"
                        .to_owned(),
                )
            }
            _ => {}
        }
        if let Some(command) = text.strip_prefix("exec:") {
            return match command.trim() {
                "" => Err("the command after exec: is missing".to_owned()),
                _ => Ok(Ready::Probe(Probe::Exec(command.to_owned()))),
            };
        }
        if let Some(delay) = text.strip_prefix("delay:") {
            return values::some_time(delay).map(|Span(delay)| Ready::Delay(delay));
        }
        let urls = Scheme::ALL.iter().find_map(|scheme| Some((*scheme, text.strip_prefix(scheme.prefix())?)));
        if let Some((scheme, rest)) = urls {
            return url(scheme, rest).map(|url| Ready::Probe(Probe::Http(url)));
        }
        match text.strip_prefix("tcp://").or_else(|| text.strip_prefix("tcp:")) {
            Some(rest) => address(rest, None).map(|address| Ready::Probe(Probe::Tcp(address))),
            None => Err(
                "write auto, notify, listen, tcp:[HOST:]PORT, http://HOST:PORT/PATH, https://…, https+insecure://…, \
                 exec:COMMAND or delay:DURATION"
                    .to_owned(),
            ),
        }
    }
}

fn url(scheme: Scheme, rest: &str) -> Result<Url, String> {
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (host, path) = rest.split_at(end);
    if host.contains('@') {
        return Err("a user and password are not sent".to_owned());
    }
    if !path.bytes().all(|byte| byte.is_ascii_graphic()) || path.contains('#') {
        return Err("the path has a character that a URL writes as %20 or the like".to_owned());
    }
    let slash = if path.starts_with('/') { "" } else { "/" };
    let address = address(host, Some(scheme.usual_port()))?;
    Ok(Url { scheme, address, host: host.to_owned(), path: format!("{slash}{path}") })
}

/// `HOST:PORT`, `:PORT` or `PORT`; `HOST` alone where there is a usual port. Names are not looked up: the answer could
/// be another machine's.
fn address(text: &str, usual_port: Option<u16>) -> Result<SocketAddr, String> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        None if usual_port.is_none() => ("", Some(text)),
        Some(_) | None => (text, None),
    };
    let ip = match host.strip_prefix('[').and_then(|inside| inside.strip_suffix(']')) {
        Some(inside) => inside.parse().map(IpAddr::V6).ok(),
        None if host.is_empty() && port.is_some() => Some(IpAddr::from([127, 0, 0, 1])),
        None if host.eq_ignore_ascii_case("localhost") => Some(IpAddr::from([127, 0, 0, 1])),
        None => host.parse().map(IpAddr::V4).ok(),
    };
    let ip =
        ip.ok_or_else(|| format!("{host:?} is no IP address: names are not looked up; write 127.0.0.1 or [::1]"))?;
    let port = match port {
        Some(port) => port.parse().ok().filter(|_| !port.starts_with('+')),
        None => usual_port,
    };
    let port = port.filter(|port| *port != 0).ok_or("the port is a number from 1 to 65535")?;
    Ok(SocketAddr::new(ip, port))
}

impl fmt::Display for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ready::Auto => f.write_str("auto"),
            Ready::Notify => f.write_str("notify"),
            Ready::Listen => f.write_str("listen"),
            Ready::Probe(probe) => probe.fmt(f),
            Ready::Delay(delay) => write!(f, "delay:{}", Span(*delay)),
        }
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Probe::Tcp(address) => write!(f, "tcp://{address}"),
            Probe::Http(Url { scheme, host, path, .. }) => write!(f, "{}{host}{path}", scheme.prefix()),
            Probe::Exec(command) => write!(f, "exec:{command}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn probe(text: &str) -> Probe {
        match text.parse() {
            Ok(Ready::Probe(probe)) => probe,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn every_form_is_read() {
        assert_eq!("auto".parse(), Ok(Ready::Auto));
        assert_eq!("delay:5s".parse(), Ok(Ready::Delay(Duration::from_secs(5))));
        assert_eq!(probe("tcp:9000"), Probe::Tcp("127.0.0.1:9000".parse().unwrap()));
        assert_eq!(probe("tcp::9000"), Probe::Tcp("127.0.0.1:9000".parse().unwrap()));
        assert_eq!(probe("tcp://[::1]:9000"), Probe::Tcp("[::1]:9000".parse().unwrap()));
        assert_eq!(probe("exec:curl -f x"), Probe::Exec("curl -f x".to_owned()));
        let url = |scheme, host: &str, address: &str, path: &str| {
            let (host, path) = (host.to_owned(), path.to_owned());
            Probe::Http(Url { scheme, address: address.parse().unwrap(), host, path })
        };
        let plain = Scheme::Plain;
        assert_eq!(probe("http://localhost:81/up?x=1"), url(plain, "localhost:81", "127.0.0.1:81", "/up?x=1"));
        assert_eq!(probe("http://[::1]"), url(plain, "[::1]", "[::1]:80", "/"));
        assert_eq!(probe("http://127.0.0.1?q"), url(plain, "127.0.0.1", "127.0.0.1:80", "/?q"));
        assert_eq!(probe("https://[::1]/x"), url(Scheme::Verified, "[::1]", "[::1]:443", "/x"));
        assert_eq!(probe("https+insecure://127.0.0.1:8"), url(Scheme::Insecure, "127.0.0.1:8", "127.0.0.1:8", "/"));
    }

    #[test]
    fn what_proves_nothing_is_refused() {
        for (text, part) in [
            ("tcp", "old generation"),
            ("https://x/", "not looked up"),
            ("http://example.com/", "not looked up"),
            ("http://u:p@127.0.0.1/", "password"),
            ("http://127.0.0.1:0/", "1 to 65535"),
            ("http://127.0.0.1/a b", "%20"),
            ("http://", "no IP address"),
            ("tcp:", "port"),
            ("delay:0", "longer"),
            ("exec:", "missing"),
            ("maybe", "write auto"),
        ] {
            let error = text.parse::<Ready>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_is_shown_is_read_back(
            text in "(tcp:|tcp://|http://|https://|https[+]insecure://|exec:|delay:)?(\\[?[0-9a-f:.]{0,12}\\]?|localhost|\\PC{0,8})(:[0-9]{0,6})?(/[a-z?#]{0,5})?"
        ) {
            if let Ok(ready) = text.parse::<Ready>() {
                prop_assert_eq!(ready.to_string().parse::<Ready>(), Ok(ready));
            }
        }
    }
}
