// An HTTP server in Node that loses nothing when zddsup upgrades it.
//
//     zddsup run --listen 8080 -- node examples/node/server.js
//
// It takes its listener by LISTEN_FDS. On SIGTERM it stops accepting, answers what it has with `Connection: close`, and
// exits with its last connection. Node has no Unix datagrams, so it cannot say READY=1: `--ready auto` gives it a second;
// `--ready exec:…` is exact. Started alone it binds port 8080 of the loopback address itself.
'use strict';

const http = require('node:http');
const net = require('node:net');

const { VERSION = '1', ZDDSUP_GENERATION = '-', LISTEN_PID, LISTEN_FDS } = process.env;
const inherited = Number(LISTEN_PID) === process.pid && Number(LISTEN_FDS) > 0;
let draining = false;

const server = http.createServer((request, response) => {
  // The client opens its next connection to the new generation.
  if (draining) response.setHeader('Connection', 'close');
  response.end(`version=${VERSION} pid=${process.pid} generation=${ZDDSUP_GENERATION}\n`);
});
server.keepAliveTimeout = 10_000;
server.listen(inherited ? { fd: 3 } : { host: '127.0.0.1', port: 8080 });

process.on('SIGTERM', () => {
  draining = true;
  // Not http.Server's close(): that one also closes idle connections, on which a request may be under way.
  net.Server.prototype.close.call(server);
});
