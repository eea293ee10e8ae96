//! What takes longer than an upgrade: each begins before it and ends after it, with the process that it began with.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use zddsup::control::types::GenerationPhase;

use crate::common::real::{self, installed};
use crate::common::{wait_for, Supervisor, PATIENCE};
use crate::stage::Site;

const PYTHON: &str = "/usr/bin/python3";

const NGINX: &str = "
worker_processes 2;
error_log stderr error;
events {}
http {
    access_log off;
    keepalive_requests 100000000;
    keepalive_timeout 600s;
    send_timeout 600s;
    TLS
    server { listen ADDRESS OPTIONS; root .; location = / { return 200 'version=VERSION\\n'; } }
}
";

/// `/wait` is answered once there is a file `go`; POST says how much there was.
const SERVER: &str = "
import os, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def answer(self, text):
        body = f'version=VERSION{text}\\n'.encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        while self.path == '/wait' and not os.path.exists('go'):
            time.sleep(0.01)
        self.answer('')

    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        self.answer(f' {len(body)} bytes')

ThreadingHTTPServer(('127.0.0.1', PORT), Handler).serve_forever()
";

const WEBSOCKET_SERVER: &str = "
import asyncio, websockets

async def echo(socket):
    async for message in socket:
        await socket.send(f'version=VERSION {message}')

async def main():
    async with websockets.serve(echo, '127.0.0.1', PORT):
        await asyncio.Future()

asyncio.run(main())
";

/// Sends each line of its stdin and prints the answer.
const WEBSOCKET_CLIENT: &str = "
import asyncio, sys, websockets

async def main():
    async with websockets.connect('ws://ADDRESS/') as socket:
        while line := await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
            await socket.send(line.strip())
            print(await socket.recv(), flush=True)

asyncio.run(main())
";

/// A server of which each generation has a version of its own.
struct Versions {
    site: Site,
    file: &'static str,
    text: String,
    supervisor: Supervisor,
}

impl Versions {
    fn start(site: Site, flags: &[&str], command: &[&str], file: &'static str, text: &str) -> Versions {
        site.write(file, &text.replace("VERSION", "1"));
        let supervisor = site.start(&[flags, &["--"], command].concat());
        Versions { site, file, text: text.to_owned(), supervisor }
    }

    fn python(text: &str) -> Versions {
        Versions::start(Site::new(), &[], &[PYTHON, "server.py"], "server.py", text)
    }

    fn nginx(site: Site, flags: &[&str], tls: &str, options: &str) -> Versions {
        let text = NGINX.replace("TLS", tls).replace("OPTIONS", options);
        let command =
            ["nginx", "-p", ".", "-e", "stderr", "-c", "nginx.conf", "-g", "daemon off; pid nginx-{generation}.pid;"];
        Versions::start(site, &[&["--stop-signal", "QUIT"], flags].concat(), &command, "nginx.conf", &text)
    }

    /// With a certificate of its own in `cert.pem`.
    fn nginx_with_tls(options: &str) -> Versions {
        let site = Site::new();
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
            .args(["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"])
            .args(["-keyout", "key.pem", "-out", "cert.pem"])
            .current_dir(site.dir.path())
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        Versions::nginx(site, &[], "ssl_certificate cert.pem; ssl_certificate_key key.pem;", options)
    }

    /// The second generation serves, and the first one has so many connections still.
    fn upgrade(&self, connections: u64) {
        self.site.write(self.file, &self.text.replace("VERSION", "2"));
        self.supervisor.upgrade();
        self.supervisor.wait_until("the first one drains", |status| {
            let first = status.generations.iter().find(|generation| generation.number.0 == 1);
            first
                .is_some_and(|first| first.phase == GenerationPhase::Draining && first.connections == Some(connections))
        });
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.site.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn curl(&self, args: &[&str]) -> Vec<u8> {
        let output = self.client("curl", &[&["-sS"], args].concat()).output().unwrap();
        assert!(output.status.success(), "{output:?}\n{}", self.supervisor.log());
        output.stdout
    }

    fn url(&self, scheme: &str) -> String {
        format!("{scheme}://{}/", self.site.address)
    }

    fn client(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(args).current_dir(self.site.dir.path()).env("PATH", real::path());
        command
    }
}

/// A client that answers line by line. Ended when dropped.
struct Client {
    child: Child,
    into: ChildStdin,
    out: BufReader<ChildStdout>,
}

impl Client {
    fn start(mut command: Command) -> Client {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
        let (into, out) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Client { child, into, out }
    }

    /// The next line that has a version in it.
    fn ask(&mut self, text: &str) -> String {
        self.into.write_all(text.as_bytes()).unwrap();
        let mut line = String::new();
        while !line.starts_with("version=") {
            line.clear();
            assert!(self.out.read_line(&mut line).unwrap() > 0, "the connection was cut");
        }
        line
    }

    fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Reads so many answers that end with a line with their version.
fn answers(stream: &mut TcpStream, count: usize) -> String {
    let mut text = String::new();
    while text.matches("version=").count() < count || !text.ends_with('\n') {
        let mut buffer = [0; 4096];
        let length = stream.read(&mut buffer).unwrap();
        assert!(length > 0, "cut after {text:?}");
        text.push_str(std::str::from_utf8(&buffer[..length]).unwrap());
    }
    text
}

const GET: &str = "GET / HTTP/1.1\r\nHost: test\r\n\r\n";

fn has_nginx(clients: &[(&str, &[&str])]) -> bool {
    installed("nginx", &["nginx", "-v"]) && clients.iter().all(|(name, probe)| installed(name, probe))
}

#[test]
fn tls() {
    if !has_nginx(&[("openssl", &["openssl", "version"]), ("curl", &["curl", "--version"])]) {
        return;
    }
    let server = Versions::nginx_with_tls("ssl");
    let address = server.site.address.to_string();
    let verified = ["-CAfile", "cert.pem", "-verify_return_error"];
    let arguments = [&["s_client", "-quiet", "-connect", &address], &verified[..]].concat();
    let mut kept = Client::start(server.client("openssl", &arguments));
    assert_eq!(kept.ask(GET), "version=1\n");
    let url = server.url("https");
    let fresh = || server.curl(&["--cacert", "cert.pem", &url]);
    assert_eq!(fresh(), b"version=1\n");
    std::thread::scope(|scope| {
        // A handshake each.
        let asking = scope.spawn(|| wait_for("the second version answers", || fresh() == b"version=2\n"));
        server.upgrade(1);
        asking.join().unwrap();
    });
    for _ in 0..10 {
        assert_eq!(fresh(), b"version=2\n");
    }
    assert_eq!(kept.ask(GET), "version=1\n");
    drop(kept);
    server.supervisor.wait_settled();
}

#[test]
fn http_2() {
    if !has_nginx(&[
        ("openssl", &["openssl", "version"]),
        ("curl", &["curl", "--version"]),
        ("h2load", &["h2load", "--version"]),
    ]) {
        return;
    }
    let server = Versions::nginx_with_tls("ssl http2");
    let url = server.url("https");
    // For longer than the test lasts: four connections with four streams each.
    let arguments = ["-c", "4", "-m", "4", "--rps", "50", "-D", "600", "--log-file", "requests", &url];
    let mut load = Client::start(server.client("h2load", &arguments));
    let requests = || fs::read_to_string(server.site.path("requests")).unwrap_or_default();
    let more = || {
        let wanted = requests().lines().count() + 100;
        wait_for("more answers", || requests().lines().count() >= wanted);
    };
    more();
    server.upgrade(4);
    more();
    let asked = server.curl(&["--cacert", "cert.pem", "--http2", "-w", "HTTP/%{http_version}", &url]);
    assert_eq!(asked, b"version=2\nHTTP/2");
    assert!(load.is_running());
    drop(load);
    for line in requests().lines() {
        // When, the status, and how long it took; -1 for one that failed.
        assert_eq!(line.split('\t').nth(1), Some("200"), "{line}");
    }
    server.supervisor.wait_settled();
}

#[test]
fn websocket() {
    if !installed("websockets for Python", &[PYTHON, "-c", "import websockets"]) {
        return;
    }
    let server = Versions::python(WEBSOCKET_SERVER);
    server.site.write("client.py", WEBSOCKET_CLIENT);
    let client = || Client::start(server.client(PYTHON, &["client.py"]));
    let mut old = client();
    assert_eq!(old.ask("a\n"), "version=1 a\n");
    server.upgrade(1);
    let mut new = client();
    assert_eq!(new.ask("b\n"), "version=2 b\n");
    assert_eq!(old.ask("c\n"), "version=1 c\n");
    drop(old);
    server.supervisor.wait_settled();
    assert_eq!(new.ask("d\n"), "version=2 d\n");
}

#[test]
fn a_long_download() {
    if !has_nginx(&[("curl", &["curl", "--version"])]) {
        return;
    }
    let server = Versions::nginx(Site::new(), &[], "", "");
    // More than all buffers between nginx and this test, and no part like another.
    let body: Vec<u8> = (0..8_u32 << 20).flat_map(|word| word.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(server.site.path("big"), &body).unwrap();
    let mut download = Client::start(server.client("curl", &["-sS", &(server.url("http") + "big")]));
    let mut got = vec![0; 1 << 20];
    download.out.read_exact(&mut got).unwrap();
    server.upgrade(1);
    assert!(download.is_running());
    assert_eq!(server.curl(&[&server.url("http")]), b"version=2\n");
    download.out.read_to_end(&mut got).unwrap();
    assert!(download.child.wait().unwrap().success());
    assert!(got == body, "{} bytes of {}, or others", got.len(), body.len());
    server.supervisor.wait_settled();
}

#[test]
fn a_slow_upload() {
    if !installed("python3", &[PYTHON, "--version"]) {
        return;
    }
    let server = Versions::python(SERVER);
    let mut stream = server.connect();
    let half = vec![b'x'; 50_000];
    stream.write_all(b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 100000\r\n\r\n").unwrap();
    stream.write_all(&half).unwrap();
    server.upgrade(1);
    stream.write_all(&half).unwrap();
    assert!(answers(&mut stream, 1).ends_with("version=1 100000 bytes\n"));
    drop(stream);
    server.supervisor.wait_settled();
}

#[test]
fn a_connection_that_the_client_has_closed_for_its_part() {
    if !installed("python3", &[PYTHON, "--version"]) {
        return;
    }
    let server = Versions::python(SERVER);
    let mut stream = server.connect();
    stream.write_all(b"GET /wait HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    server.upgrade(1);
    server.site.write("go", "");
    assert!(answers(&mut stream, 1).ends_with("version=1\n"));
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    server.supervisor.wait_settled();
}

#[test]
fn requests_in_one_go_on_an_idle_connection() {
    if !has_nginx(&[]) {
        return;
    }
    let server = Versions::nginx(Site::new(), &[], "", "");
    let mut stream = server.connect();
    stream.write_all(GET.as_bytes()).unwrap();
    assert!(answers(&mut stream, 1).ends_with("version=1\n"));
    // The half of a request stands in the pipe at the upgrade.
    let (begin, end) = GET.split_at(20);
    let mut split = server.connect();
    split.write_all(begin.as_bytes()).unwrap();
    server.upgrade(2);
    stream.write_all(GET.repeat(20).as_bytes()).unwrap();
    assert_eq!(answers(&mut stream, 20).matches("version=1\n").count(), 20);
    split.write_all((end.to_owned() + GET).as_bytes()).unwrap();
    assert_eq!(answers(&mut split, 2).matches("version=1\n").count(), 2);
    drop((stream, split));
    server.supervisor.wait_settled();
}

#[test]
fn nothing_is_cut_before_the_drain_time() {
    if !has_nginx(&[]) {
        return;
    }
    let drain_time = Duration::from_secs(3);
    let server = Versions::nginx(Site::new(), &["--drain-timeout", "3s"], "", "");
    let mut stream = server.connect();
    stream.write_all(GET.as_bytes()).unwrap();
    assert!(answers(&mut stream, 1).ends_with("version=1\n"));
    let begin = Instant::now();
    server.supervisor.upgrade();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert!(begin.elapsed() >= drain_time, "cut after {:?}\n{}", begin.elapsed(), server.supervisor.log());
    server.supervisor.wait_settled();
}
