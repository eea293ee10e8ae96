//! A TCP server that sends each line back, and passes its live connections to the next generation: a client stays
//! connected through any number of upgrades and never notices.
//!
//! ```text
//! cargo run --example echo_live                                                     alone, on 127.0.0.1:7777
//! zddsup run --listen 127.0.0.1:7777 -- target/debug/examples/echo_live             supervised
//! nc 127.0.0.1 7777
//! ```
//!
//! Alone it binds the address that is its argument, if there is one.
//!
//! What a connection is, besides its socket, are the bytes that were read and not sent back yet. In a drain both go to the
//! supervisor, which passes them on; the old process then has nothing left and exits. When there is nobody to pass them
//! to (the service is being stopped, or there is no handoff socket), it serves on until its clients have gone, or the
//! drain time has.

use std::error::Error;
use std::io;
use std::os::fd::AsFd;
use std::pin::pin;
use std::process::ExitCode;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use zddsup::service::{Kept, Service};

/// So much is sent back even if no line ends in it.
const LONGEST_LINE: usize = 16 * 1024;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("echo_live: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), Box<dyn Error>> {
    let service = Service::from_env()?;
    service.drain_at_sigterm()?;
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:7777".to_owned());
    let listener: TcpListener = service.listener_or_bind("echo", &address)?;
    eprintln!("echo_live: serves {}", listener.local_addr()?);
    service.ready()?;

    let mut connections = JoinSet::new();
    let drain = loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(connections.spawn(serve(service.clone(), Connection::new(stream)))),
                Err(error) => {
                    eprintln!("cannot accept: {error}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(kept) = service.kept() => go_on(&service, kept, &mut connections),
            Some(_) = connections.join_next() => {}
            drain = service.draining() => break drain,
        }
    };
    drop(listener);
    // If another generation follows, it gets what comes now.
    let mut more = drain.last;
    loop {
        tokio::select! {
            biased;
            kept = service.kept(), if more => match kept {
                Some(kept) => go_on(&service, kept, &mut connections),
                None => more = false,
            },
            Some(_) = connections.join_next() => {}
            else => break,
        }
    }
    service.drained()?;
    Ok(())
}

fn go_on(service: &Service, kept: Kept, connections: &mut JoinSet<()>) {
    match Connection::from_kept(kept) {
        Ok(connection) => drop(connections.spawn(serve(service.clone(), connection))),
        Err(error) => eprintln!("cannot go on with a connection: {error}"),
    }
}

struct Connection {
    stream: TcpStream,
    /// Was read, and not sent back yet.
    unanswered: Vec<u8>,
}

impl Connection {
    fn new(stream: TcpStream) -> Self {
        Connection { stream, unanswered: Vec::new() }
    }

    fn from_kept(kept: Kept) -> io::Result<Self> {
        let fd = kept.fds.into_iter().next().ok_or(io::ErrorKind::InvalidData)?;
        let stream = TcpStream::from_std(std::net::TcpStream::from(fd))?;
        Ok(Connection { stream, unanswered: kept.state })
    }

    /// Reads or sends something; false at the end. May be dropped at its await: nothing is lost then.
    async fn step(&mut self) -> io::Result<bool> {
        let lines = self.unanswered.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let to_send = if self.unanswered.len() < LONGEST_LINE { lines } else { self.unanswered.len() };
        let done = if to_send > 0 {
            self.stream.writable().await?;
            self.stream.try_write(&self.unanswered[..to_send]).map(|sent| drop(self.unanswered.drain(..sent)))
        } else {
            self.stream.readable().await?;
            let mut buffer = [0; 4096];
            match self.stream.try_read(&mut buffer) {
                Ok(0) => return Ok(false),
                read => read.map(|len| self.unanswered.extend_from_slice(&buffer[..len])),
            }
        };
        match done {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(true),
        }
    }
}

async fn serve(service: Service, mut connection: Connection) {
    let mut may_move = service.can_keep();
    let mut time_is_up = pin!(time_is_up(&service));
    loop {
        tokio::select! {
            drain = service.draining(), if may_move => {
                may_move = false;
                if drain.last {
                    continue;
                }
                match service.keep("echo", &connection.unanswered, &[connection.stream.as_fd()]) {
                    Ok(()) => return,
                    Err(error) => eprintln!("serving a connection to its end here: {error}"),
                }
            }
            () = &mut time_is_up => return,
            open = connection.step() => match open {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return eprintln!("connection failed: {error}"),
            }
        }
    }
}

/// The drain time is nearly over: what is closed here need not be killed.
async fn time_is_up(service: &Service) {
    match service.draining().await.time_left() {
        Some(left) => tokio::time::sleep(left * 9 / 10).await,
        None => std::future::pending().await,
    }
}
