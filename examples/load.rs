//! Sends requests to a server and says each second who answers and what fails. Nothing is tried twice.
//!
//! ```text
//! cargo run --release --example load -- --url http://127.0.0.1:8080/ --seconds 10 --keep-alive
//! ```
//!
//! Its exit code is 0 if each request was answered, 1 if not.

#[path = "../tests/common/load.rs"]
mod load;

use std::net::ToSocketAddrs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use load::{Config, Load, Mode, Summary, Target};

/// Sends requests and says each second who answers and what fails.
#[derive(Parser)]
struct Flags {
    /// `http://HOST:PORT/PATH`, or `unix:/path/of/socket`.
    #[arg(long, default_value = "http://127.0.0.1:8080/")]
    url: String,
    /// How long.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Use a connection until the server closes it, instead of one per request.
    #[arg(long)]
    keep_alive: bool,
    /// Connections at a time.
    #[arg(long, default_value_t = 4)]
    workers: usize,
    /// Each worker's pause between two requests, in milliseconds.
    #[arg(long, default_value_t = 1)]
    pause_ms: u64,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    let (target, path) = match target(&flags.url) {
        Ok(target) => target,
        Err(error) => {
            eprintln!("load: {error}");
            return ExitCode::from(2);
        }
    };
    let load = Load::start(Config {
        mode: if flags.keep_alive { Mode::KeepAlive } else { Mode::PerRequest },
        path,
        workers: flags.workers,
        pause: Duration::from_millis(flags.pause_ms),
        limit: Duration::from_secs(flags.seconds),
        ..Config::new(target)
    });
    let begin = Instant::now();
    let mut before = Summary::default();
    for second in 1..=flags.seconds {
        std::thread::sleep((begin + Duration::from_secs(second)).saturating_duration_since(Instant::now()));
        let now = load.so_far();
        println!("{}", line(second, &before, &now));
        before = now;
    }
    let summary = load.stop();
    println!("{summary}");
    ExitCode::from(u8::from(summary.failed() > 0 || summary.answered == 0))
}

/// What happened within one second.
fn line(second: u64, before: &Summary, now: &Summary) -> String {
    let versions = now.versions.iter().map(|(version, count)| (version, count - before.of(version)));
    let versions: Vec<_> = versions
        .filter(|(_, count)| *count > 0)
        .map(|(version, count)| format!("version {version} answered {count}"))
        .collect();
    let failed = now.failed() - before.failed();
    let requests = now.requests() - before.requests();
    format!("{second:>4} s  {requests:>6} requests  {failed:>4} failed   {}", versions.join(", "))
}

fn target(url: &str) -> Result<(Target, String), String> {
    if let Some(path) = url.strip_prefix("unix:") {
        let path = path.strip_prefix("//").unwrap_or(path);
        return Ok((Target::Unix(path.into()), "/".to_owned()));
    }
    let rest = url.strip_prefix("http://").ok_or_else(|| format!("{url} is neither http://… nor unix:…"))?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let port = host.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok());
    let host = if port.is_some() { host.to_owned() } else { format!("{host}:80") };
    let addresses = host.to_socket_addrs().map_err(|error| format!("{host}: {error}"))?;
    // A server that is bound to 127.0.0.1 alone is not found by the name's IPv6 address.
    let address = addresses.max_by_key(std::net::SocketAddr::is_ipv4).ok_or_else(|| format!("{host}: no address"))?;
    Ok((Target::Tcp(address), format!("/{path}")))
}
