//! What other supervisors tell their workers, so that those run under zddsup as they are.

/// A listener as the generation has it.
#[derive(Debug, Clone, Copy)]
pub struct Handed<'a> {
    /// Where it listens, with its scheme: `tcp://127.0.0.1:80`, `unix:///run/x.sock`.
    pub address: &'a str,
    /// Number of its fd.
    pub fd: i32,
}

/// `SERVER_STARTER_PORT` and `SERVER_STARTER_GENERATION` of `start_server` (`Server::Starter`):
/// `127.0.0.1:80=3;/run/x.sock=4`. It knows TCP and Unix streams; others are left out.
#[must_use]
pub fn start_server(listeners: &[Handed<'_>], generation: u32) -> [(String, String); 2] {
    let ports: Vec<_> = listeners
        .iter()
        .filter_map(|listener| Some(format!("{}={}", stream_address(listener.address)?, listener.fd)))
        .collect();
    [
        ("SERVER_STARTER_PORT".to_owned(), ports.join(";")),
        ("SERVER_STARTER_GENERATION".to_owned(), generation.to_string()),
    ]
}

/// `EINHORN_FD_0`, … and `EINHORN_FD_COUNT` of einhorn.
#[must_use]
pub fn einhorn(listeners: &[Handed<'_>]) -> Vec<(String, String)> {
    let count = ("EINHORN_FD_COUNT".to_owned(), listeners.len().to_string());
    let each = |(index, listener): (usize, &Handed<'_>)| (format!("EINHORN_FD_{index}"), listener.fd.to_string());
    std::iter::once(count).chain(listeners.iter().enumerate().map(each)).collect()
}

fn stream_address(address: &str) -> Option<&str> {
    let address = address.split_once('?').map_or(address, |(address, _options)| address);
    match address.split_once("://") {
        Some(("tcp", place)) => Some(place),
        Some(("unix", path)) => Some(path),
        Some(_) => None,
        None => Some(address.strip_prefix("unix:").unwrap_or(address)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LISTENERS: [Handed<'_>; 4] = [
        Handed { address: "tcp://127.0.0.1:8080", fd: 3 },
        Handed { address: "udp://127.0.0.1:53", fd: 4 },
        Handed { address: "unix:///run/web.sock", fd: 5 },
        Handed { address: "tcp://[::1]:80?backlog=5", fd: 6 },
    ];

    #[test]
    fn as_start_server_says_it() {
        let [ports, generation] = start_server(&LISTENERS, 2);
        assert_eq!(ports.1, "127.0.0.1:8080=3;/run/web.sock=5;[::1]:80=6");
        assert_eq!(generation, ("SERVER_STARTER_GENERATION".to_owned(), "2".to_owned()));
    }

    #[test]
    fn as_einhorn_says_it() {
        let pairs = einhorn(&LISTENERS);
        assert_eq!(pairs[0], ("EINHORN_FD_COUNT".to_owned(), "4".to_owned()));
        assert_eq!(pairs[4], ("EINHORN_FD_3".to_owned(), "6".to_owned()));
    }

    proptest! {
        #[test]
        fn no_address_makes_it_panic(address in any::<String>()) {
            let _ports = start_server(&[Handed { address: &address, fd: 3 }], 1);
        }
    }
}
