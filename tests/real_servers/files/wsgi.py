"""A WSGI application: its version is what the file `version` beside it said when it was loaded."""

import pathlib

VERSION = pathlib.Path(__file__).with_name("version").read_text().strip()


def app(_environ, start_response):
    body = f"version={VERSION}\n".encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
