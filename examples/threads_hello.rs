//! An HTTP server with threads and nothing but std, that loses no request in an upgrade.
//!
//! ```text
//! cargo run --example threads_hello                                                 alone, on 127.0.0.1:8080
//! zddsup run --listen 127.0.0.1:8080 -- target/debug/examples/threads_hello         supervised
//! ```
//!
//! One thread accepts until the word to drain, one serves each connection. In a drain each answer says
//! `Connection: close`, so that the client's next connection goes to the next generation; an idle connection is left open
//! for a while, as its next request may be on its way.

use std::error::Error;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use zddsup::service::Service;

/// How long a connection may be idle.
const IDLE: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("threads_hello: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let service = Service::from_env()?;
    service.drain_at_sigterm()?;
    let listener: TcpListener = service.listener_or_bind("http", "127.0.0.1:8080")?;
    let version = std::env::var("VERSION").unwrap_or_else(|_| "0".to_owned());
    let generation = service.generation().unwrap_or(0);
    let body = format!("version={version} pid={} generation={generation}\n", std::process::id());
    service.ready()?;

    // Joins all of its threads in the end.
    thread::scope(|scope| -> Result<(), Box<dyn Error>> {
        while let Some((stream, _)) = service.accept(&listener)? {
            let (service, body) = (&service, &body);
            scope.spawn(move || {
                if let Err(error) = serve(&stream, service, body) {
                    eprintln!("connection failed: {error}");
                }
            });
        }
        Ok(())
    })?;
    service.drained()?;
    Ok(())
}

/// Answers requests without a body, until one side closes.
fn serve(mut stream: &TcpStream, service: &Service, body: &str) -> Result<(), Box<dyn Error>> {
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_nodelay(true)?;
    let mut lines = BufReader::new(stream).lines();
    loop {
        let mut close = false;
        loop {
            let line = match lines.next() {
                Some(Ok(line)) => line,
                Some(Err(error)) if !matches!(error.kind(), ErrorKind::WouldBlock) => return Err(error.into()),
                Some(Err(_)) | None => return Ok(()),
            };
            if line.is_empty() {
                break;
            }
            close |= line.eq_ignore_ascii_case("connection: close");
        }
        close |= service.is_draining();
        let connection = if close { "close" } else { "keep-alive" };
        let length = body.len();
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: {connection}\r\n\r\n{body}");
        stream.write_all(answer.as_bytes())?;
        if close {
            return Ok(());
        }
    }
}
