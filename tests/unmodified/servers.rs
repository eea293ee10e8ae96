//! Real servers with their own flags.

use std::process::Command;

use crate::common::real::installed;
use crate::stage::Site;

/// Keep-alive connections hold their generation until they are closed: all of them may be there at once.
const MANY: [&str; 2] = ["--max-draining", "10"];

/// Files, then `zddsup run FLAGS… -- COMMAND…` under load.
fn upgraded(site: &Site, flags: &[&str], command: &[&str]) {
    let words: Vec<_> = MANY.iter().chain(flags).chain(&["--"]).chain(command).copied().collect();
    let supervisor = site.start(&words);
    site.upgrade_under_load(&supervisor);
}

#[test]
fn python_http_server() {
    if installed("python3", &["/usr/bin/python3", "--version"]) {
        let site = Site::new();
        site.write("index.html", "hello\n");
        upgraded(&site, &[], &["/usr/bin/python3", "-m", "http.server", "--bind", "127.0.0.1", "PORT"]);
    }
}

const NGINX: &str = "
worker_processes 2;
error_log stderr error;
events {}
http {
    access_log off;
    server { listen ADDRESS OPTIONS; location / { return 200 'nginx\\n'; } }
}
";

fn nginx(options: &str) {
    if installed("nginx", &["nginx", "-v"]) {
        let site = Site::new();
        site.write("nginx.conf", &NGINX.replace("OPTIONS", options));
        let command =
            ["nginx", "-p", ".", "-e", "stderr", "-c", "nginx.conf", "-g", "daemon off; pid nginx-{generation}.pid;"];
        upgraded(&site, &["--stop-signal", "QUIT"], &command);
    }
}

#[test]
fn nginx_with_a_shared_socket() {
    nginx("");
}

#[test]
fn nginx_with_a_socket_for_each_worker() {
    nginx("reuseport");
}

#[test]
fn node() {
    if installed("node", &["node", "--version"]) {
        let site = Site::new();
        site.write(
            "server.js",
            "require('http').createServer((request, response) => response.end('node\\n')).listen(PORT, '127.0.0.1');\n",
        );
        upgraded(&site, &[], &["node", "server.js"]);
    }
}

#[test]
fn node_cluster() {
    if installed("node", &["node", "--version"]) {
        let site = Site::new();
        site.write(
            "server.js",
            "const cluster = require('cluster');\n\
             if (cluster.isPrimary) { cluster.fork(); cluster.fork(); }\n\
             else require('http').createServer((_, response) => response.end('node\\n')).listen(PORT, '127.0.0.1');\n",
        );
        upgraded(&site, &[], &["node", "server.js"]);
    }
}

#[test]
fn a_static_go_binary() {
    if installed("go", &["go", "version"]) {
        let site = Site::new();
        site.write(
            "main.go",
            "package main\n\
             import (\"fmt\"; \"net/http\")\n\
             func main() {\n\
             \thttp.HandleFunc(\"/\", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, \"go\") })\n\
             \tpanic(http.ListenAndServe(\"ADDRESS\", nil))\n\
             }\n",
        );
        let mut build = Command::new("go");
        build.args(["build", "-o", "server", "main.go"]).current_dir(site.dir.path());
        build.env("CGO_ENABLED", "0").env("GO111MODULE", "off").env("GOFLAGS", "").env("HOME", site.dir.path());
        let output = build.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        upgraded(&site, &[], &["./server"]);
    }
}

#[test]
fn gunicorn() {
    if installed("gunicorn", &["/usr/bin/gunicorn", "--version"]) {
        let site = Site::new();
        site.write(
            "wsgi.py",
            "def app(environ, start_response):\n    start_response('200 OK', [('Content-Length', '9')])\n    return [b'gunicorn\\n']\n",
        );
        let command = ["/usr/bin/gunicorn", "--workers", "2", "--threads", "4", "--bind", "ADDRESS", "wsgi:app"];
        upgraded(&site, &[], &command);
    }
}

#[test]
fn haproxy() {
    if installed("haproxy", &["haproxy", "-v"]) {
        let site = Site::new();
        site.write(
            "haproxy.cfg",
            "defaults\n  mode http\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n\
             frontend web\n  bind ADDRESS\n  http-request return status 200 content-type text/plain string haproxy\n",
        );
        upgraded(&site, &["--stop-signal", "USR1"], &["haproxy", "-W", "-db", "-f", "haproxy.cfg"]);
    }
}

#[test]
fn caddy() {
    if installed("caddy", &["caddy", "version"]) {
        let site = Site::new();
        site.write("Caddyfile", "{\n  admin off\n  auto_https off\n}\nhttp://ADDRESS {\n  respond \"caddy\"\n}\n");
        upgraded(&site, &[], &["caddy", "run", "--config", "Caddyfile"]);
    }
}
