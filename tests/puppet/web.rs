//! Connections and what is answered on them.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use percent_encoding::percent_decode_str;
use socket2::Socket;

use super::{inherited, notify, Puppet};

/// How long an idle connection is kept once it drains.
const IDLE: Duration = Duration::from_secs(2);

/// Answers requests on one connection until it ends.
pub fn serve(puppet: &std::sync::Arc<Puppet>, mut stream: &Socket) -> std::io::Result<()> {
    let mut read = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = read.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            if !puppet.readable(stream, IDLE)? {
                return Ok(());
            }
            let mut buffer = [0; 4096];
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(length) => read.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        };
        let head: Vec<u8> = read.drain(..end).collect();
        let head = String::from_utf8_lossy(&head);
        let (first, headers) = head.split_once("\r\n").unwrap_or((&head, ""));
        let target = first.split(' ').nth(1).unwrap_or("/");
        let (status, body) = answer(puppet, target);
        let close = puppet.is_draining() || first.ends_with("HTTP/1.0") || says_close(headers);
        let connection = if close { "close" } else { "keep-alive" };
        let length = body.len();
        let text = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: {connection}\r\n\r\n{body}");
        stream.write_all(text.as_bytes())?;
        if let Some(code) = puppet.exit_wanted() {
            std::process::exit(code);
        }
        if close {
            return stream.shutdown(std::net::Shutdown::Write);
        }
    }
}

fn answer(puppet: &std::sync::Arc<Puppet>, target: &str) -> (&'static str, String) {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let value = |name: &str| {
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        let (_, value) = pairs.find(|(key, _)| *key == name)?;
        Some(percent_decode_str(value).decode_utf8_lossy().into_owned())
    };
    let number = |name: &str| value(name).and_then(|value| value.parse::<u32>().ok());
    puppet.park_if_hung();
    let body = match path {
        "/" | "/health" if path == "/health" && !puppet.is_healthy() => {
            return ("503 Service Unavailable", "not yet".to_owned());
        }
        "/" | "/health" => puppet.name(),
        "/sicken" => {
            puppet.sicken();
            puppet.name()
        }
        "/slow" => {
            std::thread::sleep(Duration::from_millis(number("ms").unwrap_or(1000).into()));
            puppet.name()
        }
        "/big" => "x".repeat(number("bytes").unwrap_or(1 << 20) as usize),
        "/env" => {
            let vars = std::env::vars_os();
            let lines = vars.map(|(name, value)| format!("{}={}", name.to_string_lossy(), value.to_string_lossy()));
            lines.collect::<Vec<_>>().join("\n")
        }
        "/fds" => inherited::fds(),
        "/inherited" => puppet.inherited.clone(),
        "/signals" => puppet.signals().join("\n"),
        "/stored" => puppet.stored.join("\n"),
        "/grandchild" => puppet.grandchild.map(|pid| pid.to_string()).unwrap_or_default(),
        "/stderr" => {
            eprintln!("{}", value("text").unwrap_or_default());
            puppet.name()
        }
        "/exit" => {
            puppet.want_exit(number("code").and_then(|code| code.try_into().ok()).unwrap_or(0));
            puppet.name()
        }
        "/crash" => std::process::abort(),
        "/hang" => {
            puppet.hang();
            puppet.name()
        }
        "/notify" => {
            let socket = value("socket").or_else(|| std::env::var("NOTIFY_SOCKET").ok()).unwrap_or_default();
            let mut bytes = value("text").unwrap_or_default().into_bytes();
            bytes.resize(bytes.len().max(number("bytes").unwrap_or(0) as usize), b'x');
            let fds = vec![std::io::stderr().as_raw_fd(); number("fds").unwrap_or(0) as usize];
            match (0..number("times").unwrap_or(1)).try_for_each(|_| notify::send(&socket, &bytes, &fds)) {
                Ok(()) => puppet.name(),
                Err(error) => format!("{error}"),
            }
        }
        "/udp" => match puppet.echo_at(&value("address").unwrap_or_default()) {
            Ok(()) => puppet.name(),
            Err(error) => format!("{error}"),
        },
        "/barrier" => match notify::barrier(&value("text").unwrap_or_default()) {
            Ok(true) => puppet.name(),
            other => format!("{other:?}"),
        },
        _ => return ("404 Not Found", format!("no {path}")),
    };
    ("200 OK", body)
}

fn says_close(headers: &str) -> bool {
    headers.to_ascii_lowercase().contains("connection: close")
}

/// Waits for any of these to become readable; false when the time has passed.
pub fn wait(fds: &[&dyn AsFd], within: Option<Duration>) -> std::io::Result<bool> {
    let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
    let timeout = within.map_or(PollTimeout::NONE, |within| within.try_into().unwrap_or(PollTimeout::MAX));
    loop {
        match poll(&mut polled, timeout) {
            Ok(ready) => return Ok(ready > 0),
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
