//! Real servers, unmodified, upgraded five times under load: a connection per request, and connections that are used
//! again. Whoever runs one of them with zddsup finds the command in docs/servers.md.
//!
//! | file | server | gets its socket by |
//! |---|---|---|
//! | `gunicorn` | gunicorn, workers `sync` and `gthread` | `LISTEN_FDS` |
//! | `uvicorn` | uvicorn | `--fd {fd:NAME}` |
//! | `haproxy` | haproxy | `bind fd@…` |
//! | `nginx` | nginx | `NGINX={fd:NAME};` |
//! | `caddy` | caddy | `bind fd/…`, from 2.9 on |
//! | `udp` | a UDP server in Python | `LISTEN_FDS` |
//!
//! No request is sent twice. Where a server loses requests whatever it is told, the test says which and how many at
//! most, and so does the table. A server that is not installed is skipped, or fails with `ZDDSUP_REQUIRE_REAL=1`
//! (tests/common/real.rs).

#[path = "../common/mod.rs"]
mod common;
mod stage;

mod caddy;
mod gunicorn;
mod haproxy;
mod nginx;
mod udp;
mod uvicorn;
