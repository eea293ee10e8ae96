//! Help of the flags whose values are a language of their own. Tables are narrow: they are not wrapped well.

/// `--listen`
pub(super) const LISTEN: &str = "\
Listen here; repeatable

The socket stays open in zddsup as long as that lives, and every generation gets it. Without any --listen, the sockets \
that systemd passed are used; with some, those of the same name or address are. With --handoff adopt, it is what the \
program binds at that very address.

ADDRESS is one of
  8080, :8080               every address, IPv4 and IPv6
  127.0.0.1:80, [::1]:80    one address; also tcp://[::1]:80
  udp://127.0.0.1:53        datagrams
  unix:///run/web.sock      a path; unix:@web is an abstract name
  unixgram://…              a Unix socket for datagrams,
  unixpacket://…            and for packets in sequence

followed by ?OPTION[=VALUE]&… with
  backlog=N                 connections that may wait (4096)
  reuseport, freebind, transparent, device=NAME, v6only[=no],
  mark=N, priority=N, tos=N, rcvbuf=BYTES, sndbuf=BYTES
  nonblock                  O_NONBLOCK: nginx needs it
  nodelay, keepalive, fastopen=N, defer-accept=SECONDS    (TCP)
  mode=0660, user=NAME, group=NAME    (a Unix socket's file)

NAME is what generations know it by [default: listener; where there are several, listener0, listener1, …]";

/// `--ready`
pub(super) const READY: &str = "\
What shows that a generation can serve

  auto              READY=1, or ready on the handoff socket; one
                    that says nothing is ready after a second
  notify            READY=1 (sd_notify), or the handoff socket, alone
  listen            it listens wherever the generation before does
                    (auto does so too with --handoff adopt)
  tcp:[HOST:]PORT   it takes connections there
  http://HOST:PORT[/PATH]   it answers 2xx or 3xx there
  https://…         the same with TLS (--ready-ca, --ready-host)
  https+insecure://…        with whatever certificate it has
  exec:COMMAND      the shell command succeeds
  delay:DURATION    it has run for so long

tcp and http ask the new process alone. Where each generation has a socket of its own (--switch steered, --handoff \
adopt), that is so on its production port too; a program that binds for itself has to listen, besides, wherever the one \
before does. At a listener that generations share, the old one might answer: that is refused.";
