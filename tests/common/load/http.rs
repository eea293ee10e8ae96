//! The client's side of HTTP/1.1, as far as it takes to see each failure.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// Longest answer that is read.
const LONGEST_ANSWER: usize = 1 << 20;

/// Where requests go.
#[derive(Debug, Clone)]
pub enum Target {
    Tcp(SocketAddr),
    /// A socket in the place of a connection, with a port of its own. What is lost is not sent again.
    Udp(SocketAddr),
    Unix(PathBuf),
}

/// A request and its answer in another protocol than HTTP.
#[derive(Debug, Clone)]
pub struct Exchange {
    pub request: &'static [u8],
    /// What was read so far: how long the answer is, once it is there and right.
    pub answer: fn(&[u8]) -> io::Result<Option<usize>>,
}

enum Stream {
    Tcp(TcpStream),
    Udp(UdpSocket),
    Unix(UnixStream),
}

/// A connection, and what was read of it that no answer took yet.
pub struct Connection {
    stream: Stream,
    host: String,
    read: Vec<u8>,
    /// So many it has given.
    pub answers: u64,
}

/// An answer.
pub struct Answer {
    pub status: u16,
    /// Whether another request may follow.
    pub keep_alive: bool,
    pub body: String,
}

impl Connection {
    pub fn new(target: &Target, timeout: Duration) -> io::Result<Connection> {
        let host = match target {
            Target::Tcp(address) | Target::Udp(address) => address.to_string(),
            Target::Unix(_) => "localhost".to_owned(),
        };
        let stream = match target {
            Target::Tcp(address) => {
                let stream = TcpStream::connect_timeout(address, timeout)?;
                stream.set_read_timeout(Some(timeout))?;
                stream.set_write_timeout(Some(timeout))?;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
            Target::Udp(address) => {
                let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                let socket = UdpSocket::bind(any)?;
                socket.connect(address)?;
                socket.set_read_timeout(Some(timeout))?;
                Stream::Udp(socket)
            }
            Target::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(timeout))?;
                stream.set_write_timeout(Some(timeout))?;
                Stream::Unix(stream)
            }
        };
        Ok(Connection { stream, host, read: Vec::new(), answers: 0 })
    }

    /// One request and its answer.
    pub fn ask(&mut self, path: &str, close: bool) -> io::Result<Answer> {
        let close = if close { "Connection: close\r\n" } else { "" };
        let request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\n{close}\r\n", self.host);
        match &mut self.stream {
            Stream::Tcp(stream) => stream.write_all(request.as_bytes())?,
            Stream::Udp(socket) => drop(socket.send(request.as_bytes())?),
            Stream::Unix(stream) => stream.write_all(request.as_bytes())?,
        }
        let head = loop {
            if let Some(end) = self.read.windows(4).position(|window| window == b"\r\n\r\n") {
                break self.take(end + 4)?;
            }
            self.fill()?;
        };
        self.answer(&head)
    }

    /// The same in another protocol. The connection stays open.
    pub fn exchange(&mut self, exchange: &Exchange) -> io::Result<Answer> {
        match &mut self.stream {
            Stream::Tcp(stream) => stream.write_all(exchange.request)?,
            Stream::Udp(socket) => drop(socket.send(exchange.request)?),
            Stream::Unix(stream) => stream.write_all(exchange.request)?,
        }
        let length = loop {
            match (exchange.answer)(&self.read)? {
                Some(length) => break length,
                None => self.fill()?,
            }
        };
        Ok(Answer { status: 200, keep_alive: true, body: self.take(length)? })
    }

    /// The answer of which this is the head.
    fn answer(&mut self, head: &str) -> io::Result<Answer> {
        let malformed = |what: &str| io::Error::new(ErrorKind::InvalidData, format!("{what}: {head:?}"));
        let mut lines = head.lines();
        let mut words = lines.next().unwrap_or_default().split(' ');
        let version = words.next().filter(|word| word.starts_with("HTTP/1.")).ok_or_else(|| malformed("no HTTP"))?;
        let status = words.next().and_then(|word| word.parse().ok()).ok_or_else(|| malformed("no status"))?;
        let header = |name: &str| {
            let mut found = head.lines().skip(1).filter_map(|line| line.split_once(':'));
            found.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim().to_ascii_lowercase())
        };
        let length = header("content-length").map(|length| length.parse::<usize>());
        let chunked = header("transfer-encoding").is_some_and(|encoding| encoding.contains("chunked"));
        let mut keep_alive = match header("connection") {
            Some(said) if version == "HTTP/1.0" => said.contains("keep-alive"),
            said => version != "HTTP/1.0" && !said.is_some_and(|said| said.contains("close")),
        };
        let body = match length {
            _ if chunked => self.chunks()?,
            Some(Ok(length)) => self.take(length)?,
            Some(Err(_)) => return Err(malformed("bad Content-Length")),
            None => {
                keep_alive = false;
                self.rest()?
            }
        };
        self.answers += 1;
        Ok(Answer { status, keep_alive, body })
    }

    fn chunks(&mut self) -> io::Result<String> {
        let mut body = String::new();
        loop {
            let end = loop {
                match self.read.windows(2).position(|window| window == b"\r\n") {
                    Some(end) => break end,
                    None => self.fill()?,
                }
            };
            let line = self.take(end + 2)?;
            let size = line.trim().split(';').next().and_then(|size| usize::from_str_radix(size, 16).ok());
            let size = size.filter(|size| *size <= LONGEST_ANSWER);
            let size =
                size.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, format!("bad chunk size {line:?}")))?;
            body.push_str(self.take(size + 2)?.trim_end_matches("\r\n"));
            if size == 0 {
                return Ok(body);
            }
        }
    }

    fn rest(&mut self) -> io::Result<String> {
        loop {
            match self.fill() {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return self.take(self.read.len()),
                Err(error) => return Err(error),
            }
        }
    }

    fn take(&mut self, length: usize) -> io::Result<String> {
        if length > LONGEST_ANSWER {
            return Err(io::Error::new(ErrorKind::InvalidData, format!("an answer of {length} bytes")));
        }
        while self.read.len() < length {
            self.fill()?;
        }
        let rest = self.read.split_off(length);
        let taken = std::mem::replace(&mut self.read, rest);
        Ok(String::from_utf8_lossy(&taken).into_owned())
    }

    fn fill(&mut self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        let length = match &mut self.stream {
            Stream::Tcp(stream) => stream.read(&mut buffer)?,
            Stream::Udp(socket) => socket.recv(&mut buffer)?,
            Stream::Unix(stream) => stream.read(&mut buffer)?,
        };
        if length == 0 {
            let got = self.read.len();
            return Err(io::Error::new(ErrorKind::UnexpectedEof, format!("closed after {got} bytes of an answer")));
        }
        self.read.extend_from_slice(&buffer[..length]);
        if self.read.len() > 2 * LONGEST_ANSWER {
            return Err(io::Error::new(ErrorKind::InvalidData, "an endless answer"));
        }
        Ok(())
    }
}
