//! The servers, each with its own flags: a row of the table and a test.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::TcpStream;

use crate::common::load::Exchange;
use crate::common::real::installed;
use crate::matrix::{Server, SERVER};
use crate::stage::Site;

/// Debian's, which has what its packages put there.
const PYTHON: &str = "/usr/bin/python3";

macro_rules! servers {
    ($($test:ident: $server:expr,)*) => {
        /// In the table's order.
        pub const SERVERS: &[Server] = &[$($server),*];
        $(
            #[test]
            fn $test() {
                const IT: Server = $server;
                IT.run();
            }
        )*
    };
}

servers! {
    python_http_server: Server {
        name: "Python VERSION, `http.server`",
        probe: &[PYTHON, "--version"],
        files: &[("index.html", "hello\n")],
        command: &[PYTHON, "-m", "http.server", "--bind", "127.0.0.1", "PORT"],
        ..SERVER
    },
    python_socketserver: Server {
        name: "Python VERSION, `socketserver`",
        probe: &[PYTHON, "--version"],
        files: &[("server.py", SOCKETSERVER)],
        command: &[PYTHON, "server.py"],
        ..SERVER
    },
    gunicorn_sync: Server {
        name: "gunicorn VERSION, sync",
        probe: &["/usr/bin/gunicorn", "--version"],
        files: &[("wsgi.py", WSGI)],
        command: &["/usr/bin/gunicorn", "--workers", "2", "--bind", "ADDRESS", "wsgi:app"],
        ..SERVER
    },
    gunicorn_gthread: Server {
        name: "gunicorn VERSION, gthread",
        probe: &["/usr/bin/gunicorn", "--version"],
        files: &[("wsgi.py", WSGI)],
        command: &["/usr/bin/gunicorn", "--workers", "2", "--threads", "8", "--keep-alive", "60", "--bind", "ADDRESS", "wsgi:app"],
        ..SERVER
    },
    // TERM makes it reload itself.
    uwsgi: Server {
        name: "uWSGI VERSION, its own HTTP",
        probe: &["uwsgi", "--version"],
        files: &[("wsgi.py", WSGI)],
        flags: &["--stop-signal", "INT"],
        command: &[
            "uwsgi", "--plugins", "http,python3", "--master", "--processes", "2", "--threads", "4", "--http", "ADDRESS",
            "--http-keepalive", "--disable-logging", "--module", "wsgi:app",
        ],
        ..SERVER
    },
    puma_single: Server {
        name: "puma VERSION",
        probe: &["puma", "--version"],
        files: &[("config.ru", RACK)],
        command: &["puma", "--bind", "tcp://ADDRESS", "--threads", "8:8"],
        ..SERVER
    },
    puma_cluster: Server {
        name: "puma VERSION, cluster",
        probe: &["puma", "--version"],
        files: &[("config.ru", RACK)],
        command: &["puma", "--bind", "tcp://ADDRESS", "--threads", "8:8", "--workers", "2"],
        ..SERVER
    },
    node: Server {
        name: "node VERSION, `http`",
        probe: &["node", "--version"],
        files: &[("server.js", NODE)],
        command: &["node", "server.js"],
        ..SERVER
    },
    node_cluster: Server {
        name: "node VERSION, `cluster`",
        probe: &["node", "--version"],
        files: &[("server.js", NODE_CLUSTER)],
        command: &["node", "server.js"],
        ..SERVER
    },
    a_static_go_binary: Server {
        name: "a static Go binary, `net/http` (Go VERSION)",
        probe: &["go", "version"],
        files: &[("main.go", GO)],
        build: &[
            "env", "CGO_ENABLED=0", "GO111MODULE=off", "GOFLAGS=", "go", "build", "-o", "server", "main.go",
        ],
        command: &["./server"],
        ..SERVER
    },
    a_rust_binary: Server {
        name: "a Rust binary, axum VERSION",
        probe: &["cargo", "pkgid", "--offline", "axum"],
        build: &["ln", "-s", "EXAMPLES/axum_plain", "server"],
        command: &["./server", "ADDRESS"],
        ..SERVER
    },
    nginx_with_a_shared_socket: Server {
        name: "nginx VERSION",
        files: &[("nginx.conf", NGINX)],
        ..NGINX_SERVER
    },
    nginx_with_a_socket_for_each_worker: Server {
        name: "nginx VERSION, `reuseport`",
        files: &[("nginx.conf", NGINX_REUSEPORT)],
        ..NGINX_SERVER
    },
    apache: Server {
        name: "Apache VERSION, event",
        probe: &["apache2", "-v"],
        files: &[("apache.conf", APACHE), ("index.html", "apache\n")],
        command: &[
            "apache2", "-D", "FOREGROUND", "-d", ".", "-f", "apache.conf", "-c", "PidFile apache-{generation}.pid",
        ],
        ..SERVER
    },
    lighttpd: Server {
        name: "lighttpd VERSION",
        probe: &["lighttpd", "-v"],
        files: &[("lighttpd.conf", LIGHTTPD), ("index.html", "lighttpd\n")],
        command: &["lighttpd", "-D", "-f", "lighttpd.conf"],
        ..SERVER
    },
    haproxy: Server {
        name: "haproxy VERSION",
        probe: &["haproxy", "-v"],
        files: &[("haproxy.cfg", HAPROXY)],
        flags: &["--stop-signal", "USR1"],
        command: &["haproxy", "-W", "-db", "-f", "haproxy.cfg"],
        ..SERVER
    },
    caddy: Server {
        name: "caddy VERSION",
        probe: &["caddy", "version"],
        files: &[("Caddyfile", CADDY)],
        command: &["caddy", "run", "--config", "Caddyfile"],
        ..SERVER
    },
    redis: Server {
        name: "redis VERSION, without files",
        probe: &["redis-server", "--version"],
        command: &["redis-server", "--bind", "127.0.0.1", "--port", "PORT", "--save", "", "--appendonly", "no"],
        exchange: Some(Exchange { request: b"*1\r\n$4\r\nPING\r\n", answer: |read| line(read, b"+PONG\r\n") }),
        ..SERVER
    },
    memcached: Server {
        name: "memcached VERSION",
        exchange: Some(Exchange { request: b"get nothing\r\n", answer: |read| line(read, b"END\r\n") }),
        ..MEMCACHED
    },
    // The frame's header: which request, which datagram of it, of how many.
    memcached_with_udp: Server {
        name: "memcached VERSION, UDP",
        exchange: Some(Exchange {
            request: b"\x12\x34\0\0\0\x01\0\0get nothing\r\n",
            answer: |read| line(read, b"\x12\x34\0\0\0\x01\0\0END\r\n"),
        }),
        udp: true,
        ..MEMCACHED
    },
    unbound: Server {
        name: "unbound VERSION, DNS on TCP",
        exchange: Some(Exchange { request: QUERY, answer: dns_on_tcp }),
        ..UNBOUND_SERVER
    },
    unbound_with_udp: Server {
        name: "unbound VERSION, DNS on UDP",
        exchange: Some(Exchange { request: QUERY.split_at(2).1, answer: dns }),
        udp: true,
        ..UNBOUND_SERVER
    },
    // The pid file's place is in the configuration alone, and both would write the same databases.
    knot: Server {
        name: "knot VERSION",
        probe: &["knotd", "--version"],
        files: &[("knot.conf", KNOT), ("test.zone", ZONE)],
        command: &["knotd", "-c", "knot.conf"],
        exchange: Some(Exchange { request: QUERY, answer: dns_on_tcp }),
        cannot: Some("server PID found, already running"),
        ..SERVER
    },
}

const SOCKETSERVER: &str = "
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def do_GET(self):
        self.send_response(200)
        self.send_header('Content-Length', '13')
        self.end_headers()
        self.wfile.write(b'socketserver\\n')

    def log_message(self, *_):
        pass

class Server(ThreadingTCPServer):
    allow_reuse_address = True

Server(('127.0.0.1', PORT), Handler).serve_forever()
";

const WSGI: &str = "
def app(environ, start_response):
    start_response('200 OK', [('Content-Length', '5')])
    return [b'wsgi\\n']
";

const RACK: &str = "run ->(env) { [200, { 'Content-Length' => '5' }, [\"puma\\n\"]] }\n";

const NODE: &str = "
require('http').createServer((_, response) => response.end('node\\n')).listen(PORT, '127.0.0.1');
";

const NODE_CLUSTER: &str = "
const cluster = require('cluster');
if (cluster.isPrimary) {
    cluster.fork();
    cluster.fork();
} else {
    require('http').createServer((_, response) => response.end('node\\n')).listen(PORT, '127.0.0.1');
}
";

const GO: &str = "
package main

import (
\t\"fmt\"
\t\"net/http\"
)

func main() {
\thttp.HandleFunc(\"/\", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, \"go\") })
\tpanic(http.ListenAndServe(\"ADDRESS\", nil))
}
";

const NGINX_SERVER: Server = Server {
    probe: &["nginx", "-v"],
    flags: &["--stop-signal", "QUIT"],
    command: &["nginx", "-p", ".", "-e", "stderr", "-c", "nginx.conf", "-g", "daemon off; pid nginx-{generation}.pid;"],
    ..SERVER
};

const NGINX: &str = "
worker_processes 2;
error_log stderr error;
events {}
http {
    access_log off;
    server { listen ADDRESS; location / { return 200 'nginx\\n'; } }
}
";

const NGINX_REUSEPORT: &str = "
worker_processes 2;
error_log stderr error;
events {}
http {
    access_log off;
    server { listen ADDRESS reuseport; location / { return 200 'nginx\\n'; } }
}
";

const APACHE: &str = "
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule dir_module /usr/lib/apache2/modules/mod_dir.so
Listen ADDRESS
ServerName localhost
User www-data
Group www-data
ErrorLog /dev/stderr
DocumentRoot .
DirectoryIndex index.html
StartServers 2
KeepAliveTimeout 60
";

const LIGHTTPD: &str = "
server.bind = \"127.0.0.1\"
server.port = PORT
server.document-root = var.CWD
index-file.names = (\"index.html\")
server.max-keep-alive-idle = 60
";

const HAPROXY: &str = "
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend web
  bind ADDRESS
  http-request return status 200 content-type text/plain string haproxy
";

const CADDY: &str = "{
  admin off
  auto_https off
}
http://ADDRESS {
  bind 127.0.0.1
  respond \"caddy\"
}
";

const MEMCACHED: Server = Server {
    probe: &["memcached", "--version"],
    command: &["memcached", "-u", "nobody", "-l", "127.0.0.1", "-p", "PORT", "-U", "PORT"],
    ..SERVER
};

/// On TCP and on UDP, with a socket of each for each thread.
const UNBOUND_SERVER: Server = Server {
    probe: &["unbound", "-V"],
    files: &[("unbound.conf", UNBOUND)],
    command: &["unbound", "-d", "-c", "unbound.conf"],
    ..SERVER
};

const UNBOUND: &str = "
server:
  interface: 127.0.0.1
  port: PORT
  num-threads: 2
  incoming-num-tcp: 100
  username: \"\"
  chroot: \"\"
  directory: \".\"
  pidfile: \"\"
  use-syslog: no
  log-servfail: yes
  module-config: iterator
  local-zone: \"test.\" static
  local-data: \"name.test. IN A 192.0.2.1\"
remote-control:
  control-enable: no
";

const KNOT: &str = "
server:
  rundir: .
  listen: 127.0.0.1@PORT
database:
  storage: .
log:
  - target: stderr
    any: error
zone:
  - domain: test.
    storage: .
    file: test.zone
";

const ZONE: &str = "
test. 3600 SOA ns.test. root.test. 1 3600 600 86400 300
test. 3600 NS ns.test.
ns.test. 3600 A 192.0.2.1
name.test. 3600 A 192.0.2.1
";

/// `name.test. IN A ?`, with its length before it as TCP has it (RFC 1035, 4.1 and 4.2.2).
const QUERY: &[u8] = b"\0\x1b\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x04name\x04test\0\0\x01\0\x01";

/// An answer to it: the query's number, no error, and one record.
fn dns(read: &[u8]) -> Result<Option<usize>> {
    match *read {
        [] => Ok(None),
        [0x12, 0x34, flags, code, _, _, 0, 1, ..] if flags >= 0x80 && code % 16 == 0 => Ok(Some(read.len())),
        _ => Err(Error::new(ErrorKind::InvalidData, format!("no answer to the query: {read:?}"))),
    }
}

/// The same with its length before it.
fn dns_on_tcp(read: &[u8]) -> Result<Option<usize>> {
    let Some((&length, answer)) = read.split_first_chunk() else { return Ok(None) };
    match answer.get(..u16::from_be_bytes(length).into()) {
        Some(answer) => Ok(dns(answer)?.map(|length| length + 2)),
        None => Ok(None),
    }
}

/// This line and nothing else.
fn line(read: &[u8], wanted: &[u8]) -> Result<Option<usize>> {
    match read.len() {
        length if length < wanted.len() => Ok(None),
        _ if read == wanted => Ok(Some(wanted.len())),
        _ => Err(Error::new(ErrorKind::InvalidData, format!("answered {:?}", String::from_utf8_lossy(read)))),
    }
}

/// Data does not move: whoever is connected keeps the old one and what is in it, whoever connects gets the new one.
#[test]
fn clients_of_redis_keep_the_one_that_they_have() {
    let redis = SERVERS.iter().find(|server| server.probe[0] == "redis-server").unwrap();
    if !installed(redis.name, redis.probe) {
        return;
    }
    let site = Site::new();
    let supervisor = site.start(&[&["--"], redis.command].concat());
    let ask = |stream: &mut TcpStream, request: &str| {
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = [0; 64];
        let length = stream.read(&mut answer).unwrap();
        String::from_utf8_lossy(&answer[..length]).into_owned()
    };
    let mut old = TcpStream::connect(site.address).unwrap();
    assert_eq!(ask(&mut old, "SET key 1\r\n"), "+OK\r\n");
    supervisor.upgrade();
    let mut new = TcpStream::connect(site.address).unwrap();
    assert_eq!(ask(&mut new, "GET key\r\n"), "$-1\r\n");
    assert_eq!(ask(&mut old, "GET key\r\n"), "$1\r\n1\r\n");
    drop(old);
    supervisor.wait_settled();
    assert_eq!(ask(&mut new, "SET key 2\r\n"), "+OK\r\n");
}
