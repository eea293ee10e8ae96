#!/usr/bin/env python3
"""An HTTP server of the standard library that loses nothing when zddsup upgrades it.

    zddsup run --listen 8080 --ready notify -- python3 examples/python/server.py

It takes its listener by LISTEN_FDS, says READY=1, and on SIGTERM stops accepting, answers what it has with
`Connection: close`, and exits. Started alone it binds port 8080 of the loopback address itself.
"""

import http.server
import os
import signal
import socket
import threading

VERSION = os.environ.get("VERSION", "1")
draining = threading.Event()


def listener() -> socket.socket:
    """The first inherited socket (sd_listen_fds(3)), or one of our own."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and int(os.environ.get("LISTEN_FDS", "0")) > 0:
        return socket.socket(fileno=3)
    return socket.create_server(("127.0.0.1", 8080))


def notify(message: str) -> None:
    """sd_notify(3); nothing where nobody asked for it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.sendto(message.encode(), address)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10  # an idle connection is closed after so many seconds
    disable_nagle_algorithm = True  # head and body are two writes

    def do_GET(self) -> None:
        body = f"version={VERSION} pid={os.getpid()} generation={os.environ.get('ZDDSUP_GENERATION', '-')}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if draining.is_set():
            # The client opens its next connection to the new generation.
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = False  # server_close() waits for the connections that are left

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        # Another generation may take the connection between select and accept: never block there.
        sock.setblocking(False)

    def get_request(self):
        connection, address = self.socket.accept()
        connection.setblocking(True)
        return connection, address


def main() -> None:
    server = Server(listener())

    def drain(_signal, _frame) -> None:
        draining.set()
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, drain)
    notify("READY=1")
    server.serve_forever(poll_interval=0.1)
    server.server_close()


if __name__ == "__main__":
    main()
