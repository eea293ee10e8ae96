//! Servers that know nothing of zddsup and bind for themselves, upgraded five times under load: no request fails, on
//! connections that are used again neither, for the old process is left alone until its last connection is gone.
//!
//! | file | what it is about |
//! |---|---|
//! | `leaving` | what waits for a generation that is gone, and what an upgrade says of it |
//! | `network` | handshakes that take a while, SYN cookies |
//! | `places` | ordinary users, sandboxes, another zddsup, sockets that were not seen |
//! | `declared` | `--listen` in the place of what they bind |
//! | `probes` | probes on the port that both generations have |
//! | `servers` | real servers, one a test: the table of the README |
//! | `table` | that the README's table has these, or is written anew from their results |
//! | `protocols` | TLS, HTTP/2, WebSocket, long answers and slow requests across an upgrade |
//! | `versions` | new versions that do not listen, crash, fork away |
//! | `datagrams` | UDP: every datagram is answered |
//! | `canary` | a share for the new version first: by number, by network, in steps; what ends it |
//! | `locals` | Unix sockets |
//! | `replacing` | another zddsup in the place of the one that steers |
//! | `takeover` | a supervisor that is killed, and succeeded |
//! | `steering` | what the kernel does with new connections in each phase, crashes, addresses that come and go |

#[path = "../common/mod.rs"]
mod common;
mod leaving;
mod matrix;
mod stage;

mod canary;
mod datagrams;
mod declared;
mod locals;
mod network;
mod places;
mod probes;
mod protocols;
mod replacing;
mod servers;
mod steering;
mod table;
mod takeover;
mod versions;
