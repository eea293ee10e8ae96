"""A UDP server that takes its socket by LISTEN_FDS: it answers each datagram with its version and what it got."""

import os
import pathlib
import signal
import socket

VERSION = pathlib.Path(__file__).with_name("version").read_text().strip()
serving = True


def stop(_signal, _frame):
    global serving
    serving = False


signal.signal(signal.SIGTERM, stop)
assert os.environ["LISTEN_PID"] == str(os.getpid()) and os.environ["LISTEN_FDS"] == "1"
server = socket.socket(fileno=3)
# Another generation may be quicker: never wait in recvfrom for good.
server.settimeout(0.1)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
    client.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
while serving:
    try:
        data, sender = server.recvfrom(65535)
    except TimeoutError:
        continue
    server.sendto(f"version={VERSION} ".encode() + data, sender)
