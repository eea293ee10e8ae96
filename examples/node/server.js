// An HTTP server in Node that loses nothing when zddsup upgrades it.
//
//     zddsup run --listen 8080 --ready notify -- node examples/node/server.js
//
// It takes its listener by LISTEN_FDS. When it drains it stops accepting, answers what it has with `Connection: close`,
// and exits with its last connection. Node has no Unix datagrams, so it cannot say READY=1; but it says hello and ready on
// the handoff socket (docs/handoff.md), so that `--ready auto` and `--ready notify` are exact, and hears there when to
// drain. Without that socket (`--handoff fds`) `--ready auto` gives it a second, `--ready exec:…` could ask it, and a
// SIGTERM drains it. Started alone it binds port 8080 of the loopback address itself.
'use strict';

const fs = require('node:fs');
const http = require('node:http');
const net = require('node:net');

const { VERSION = '1', ZDDSUP_GENERATION = '-', ZDDSUP_SOCKET, LISTEN_PID, LISTEN_FDS } = process.env;
const inherited = Number(LISTEN_PID) === process.pid && Number(LISTEN_FDS) > 0;
let draining = false;
let hearing = false;

const server = http.createServer((request, response) => {
  // The client opens its next connection to the new generation.
  if (draining) response.setHeader('Connection', 'close');
  response.end(`version=${VERSION} pid=${process.pid} generation=${ZDDSUP_GENERATION}\n`);
});
server.keepAliveTimeout = 10_000;
server.listen(inherited ? { fd: 3 } : { host: '127.0.0.1', port: 8080 }, () => {
  if (ZDDSUP_SOCKET === undefined) return;
  say({ type: 'hello', protocol: 1 });
  say({ type: 'ready' });
  hear();
});

function drain() {
  draining = true;
  // Not http.Server's close(): that one also closes idle connections, on which a request may be under way.
  net.Server.prototype.close.call(server);
}

process.once('SIGTERM', () => {
  drain();
  // A read that waits keeps the process, and process.exit() waits for it, too: a second SIGTERM, unhandled, does not.
  server.once('close', () => hearing && process.kill(process.pid, 'SIGTERM'));
});

// A packet is one write and one read. The fds that come with it are lost that way; LISTEN_FDS has them, too.
function say(message) {
  fs.writeSync(Number(ZDDSUP_SOCKET), JSON.stringify(message));
}

function hear() {
  hearing = true;
  fs.read(Number(ZDDSUP_SOCKET), { buffer: Buffer.alloc(131072) }, (error, length, packet) => {
    hearing = false;
    if (error || length === 0) return; // zddsup is gone: serve on until a SIGTERM
    if (JSON.parse(packet.subarray(0, length)).type === 'drain') drain();
    else hear();
  });
}
