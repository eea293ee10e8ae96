//! `--listen` with `--handoff adopt`: a program's own socket is bound in zddsup's name, with the options of `--listen`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;

use nix::sched::{unshare, CloneFlags};
use nix::sys::signal::{kill, Signal};
use nix::unistd::{geteuid, Pid};

use crate::common::load::{Config, Load, Target};
use crate::common::real::installed;
use crate::common::{puppet, request, try_request, wait_for, Supervisor, PATIENCE};
use crate::stage::Site;
use crate::steering;

/// A puppet that binds what `--listen` says, and does what the file says.
fn start(site: &Site, flags: &[&str], script: &str) -> Supervisor {
    steering::start(site, &[&["--handoff", "adopt", "--listen", "ADDRESS"], flags].concat(), script)
}

/// Clients whose request is sent, and not answered yet.
fn waiting(address: SocketAddr, many: usize) -> Vec<TcpStream> {
    let mut clients: Vec<_> = (0..many).map(|_| TcpStream::connect(address).unwrap()).collect();
    for client in &mut clients {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    }
    clients
}

#[track_caller]
fn answered(clients: Vec<TcpStream>, by: &str, supervisor: &Supervisor) {
    for mut client in clients {
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert!(answer.contains(by), "{answer:?}\n{}", supervisor.log());
    }
}

#[test]
fn upgrades_are_steered() {
    let site = Site::new();
    let supervisor = start(&site, &["--ready", "http://ADDRESS/health"], "--version 1");
    assert_eq!(supervisor.status().listeners.len(), 1);
    let loads = [Load::start(site.load()), Load::start(site.load().keep_alive())];
    for version in 2..=4 {
        site.write("script", &format!("--version {version}\n"));
        supervisor.upgrade();
        assert!(loads[0].saw(&version.to_string(), PATIENCE), "{}\n{}", loads[0].so_far(), supervisor.log());
    }
    site.write("script", "--version 5\n--exit-before-ready 1\n");
    assert_eq!(supervisor.cli(&["upgrade"]).status.code(), Some(3));
    for load in loads {
        assert!(load.more(20, PATIENCE));
        load.stop().assert_clean();
    }
    supervisor.wait_settled();
}

#[test]
fn what_came_before_the_program_was_there_is_answered() {
    let site = Site::new();
    let puppet = puppet();
    let script = format!("while ! test -e go; do sleep 0.1; done; exec {puppet} --bind ADDRESS --version 1");
    let words = ["--handoff", "adopt", "--listen", "ADDRESS", "--", "sh", "-c", &script];
    let supervisor = site.spawn(&words);
    supervisor.wait_until("it runs", |status| status.generations.iter().any(|generation| generation.pid.is_some()));
    let clients = waiting(site.address, 20);
    site.write("go", "");
    answered(clients, "version=1 ", &supervisor);
    assert!(request(site.address, "/").contains("version=1 "));
    supervisor.upgrade();
    assert!(request(site.address, "/").contains("generation=2"));
}

#[test]
fn what_waits_for_a_dead_one_is_answered_by_the_next() {
    let site = Site::new();
    let supervisor = start(&site, &[], "--version 1");
    supervisor.upgrade();
    supervisor.wait_settled();
    for version in ["2", "3"] {
        assert!(try_request(site.address, "/hang").is_ok());
        let clients = waiting(site.address, 20);
        site.write("script", &format!("--version {version}\n"));
        kill(Pid::from_raw(supervisor.serving().pid.unwrap()), Signal::SIGKILL).unwrap();
        answered(clients, &format!("version={version} "), &supervisor);
    }
    // With an empty queue the next one has a socket of its own again.
    site.write("script", "--version 4\n");
    kill(Pid::from_raw(supervisor.serving().pid.unwrap()), Signal::SIGKILL).unwrap();
    assert!(request(site.address, "/").contains("version=4 "));
}

#[test]
fn one_that_binds_elsewhere_leaves_it_open_and_is_told() {
    let (site, elsewhere) = (Site::new(), Site::new());
    let script = format!("--version 1\n--bind {}\n", elsewhere.address);
    let supervisor = start(&site, &[], &script);
    let log = supervisor.wait_for_log("which --listen asks for: what comes there waits");
    assert!(log.contains(&site.address.to_string()), "{log}");
    let clients = waiting(site.address, 3);
    assert!(request(elsewhere.address, "/").contains("version=1 "));
    // One that binds it gets what waited.
    site.write("script", "--version 2\n");
    supervisor.upgrade();
    answered(clients, "version=2 ", &supervisor);
}

#[test]
fn the_same_port_of_another_address_is_another() {
    let (site, _reserved) = Site::and_at("127.0.0.2");
    let words = ["--handoff", "adopt", "--listen", "ADDRESS", "--ready", "notify", "--"];
    let puppet = puppet();
    let supervisor = site.start(&[words.as_slice(), &[&puppet, "--bind", "127.0.0.2:PORT"]].concat());
    let log = supervisor.wait_for_log("which is another address");
    assert!(log.contains("binds 127.0.0.2:"), "{log}");
    supervisor.wait_for_log("which --listen asks for");
}

#[test]
fn a_port_that_the_kernel_chose_is_kept() {
    let dir = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let puppet = puppet();
    let words = ["--listen", "127.0.0.1:0", "--handoff", "adopt", "--", &puppet, "--bind", "127.0.0.1:0"];
    let supervisor = crate::common::Setup::within(dir, words).start();
    let address = supervisor.address();
    assert!(request(address, "/").contains("generation=1"));
    supervisor.upgrade();
    assert!(request(address, "/").contains("generation=2"));
}

#[test]
fn a_killed_supervisor_is_succeeded() {
    let site = Site::new();
    let first = start(&site, &[], "--version 1");
    let loads = [Load::start(site.load()), Load::start(site.load().keep_alive())];
    for load in &loads {
        assert!(load.more(20, PATIENCE));
    }
    first.kill_alone();
    let second = start(&site, &[], "--version 2");
    assert!(loads[0].saw("2", PATIENCE), "{}\n{}", loads[0].so_far(), second.log());
    for load in loads {
        load.stop().assert_clean();
    }
    second.wait_settled();
}

#[test]
fn a_socket_that_was_shut_down_is_replaced() {
    let site = Site::new();
    let supervisor = start(&site, &[], "--version 1\n--shutdown-listener\n--drain-ms 500");
    site.write("script", "--version 2\n");
    kill(Pid::from_raw(supervisor.serving().pid.unwrap()), Signal::SIGTERM).unwrap();
    supervisor.wait_for_log("for whoever comes next");
    assert!(request(site.address, "/").contains("version=2 "));
    site.write("script", "--version 3\n");
    supervisor.upgrade();
    assert!(request(site.address, "/").contains("version=3 "));
}

/// Does before bind(2) what an injected socket would lose, and says what became of it.
const CAREFUL: &str = "
import os, select, socket, struct
listener = socket.socket()
listener.setblocking(False)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
waiter = select.epoll()
waiter.register(listener.fileno(), select.EPOLLIN)
copy = os.dup(listener.fileno())
listener.bind(('127.0.0.1', PORT))
socket.socket(fileno=copy).listen(3)
device = listener.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(bytes(1)).decode()
backlog = struct.unpack_from('I', listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 28)[0]
kept = listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
blocks = os.get_blocking(listener.fileno())
inherits = os.get_inheritable(listener.fileno())
facts = f'device={device} backlog={backlog} keepalive={kept} blocks={blocks} inherits={inherits} version=VERSION '
while True:
    for _ in waiter.poll():
        try:
            client, _ = listener.accept()
        except OSError:
            continue
        client.setblocking(True)
        client.recv(4096)
        client.sendall(f'HTTP/1.1 200 OK\\r\\nContent-Length: {len(facts)}\\r\\nConnection: close\\r\\n\\r\\n{facts}'.encode())
        client.close()
";

#[test]
fn what_a_program_did_before_bind_is_kept_and_the_options_of_listen_are_set() {
    if !installed("python3", &["/usr/bin/python3", "--version"]) {
        return;
    }
    let site = Site::new();
    site.write("server.py", &CAREFUL.replace("VERSION", "1"));
    // Only root may set a device.
    let (option, device) = if geteuid().is_root() { ("&device=lo", "lo") } else { ("", "") };
    let listen = format!("ADDRESS?backlog=77{option}");
    let words = ["--handoff", "adopt", "--listen", &listen, "--", "/usr/bin/python3", "server.py"];
    let supervisor = site.start(&words);
    let wanted =
        |version| format!("device={device} backlog=77 keepalive=1 blocks=False inherits=False version={version} ");
    assert_eq!(request(site.address, "/"), wanted(1));
    let load = Load::start(site.load());
    for version in 2..=4 {
        site.write("server.py", &CAREFUL.replace("VERSION", &version.to_string()));
        supervisor.upgrade();
        assert!(load.more(20, PATIENCE), "{}\n{}", load.so_far(), supervisor.log());
        assert_eq!(request(site.address, "/"), wanted(version));
    }
    load.stop().assert_clean();
}

/// The same server, as most are: epoll comes last, and there are no copies.
fn usual(version: u32, between: &str) -> String {
    let text =
        CAREFUL.replace("waiter.register(listener.fileno(), select.EPOLLIN)\ncopy = os.dup(listener.fileno())\n", "");
    let listen = format!("{between}\nlistener.listen(3)\nwaiter.register(listener.fileno(), select.EPOLLIN)");
    text.replace("socket.socket(fileno=copy).listen(3)", &listen).replace("VERSION", &version.to_string())
}

#[test]
fn a_socket_with_what_waits_has_the_flags_that_the_program_gave_to_its_own() {
    if !installed("python3", &["/usr/bin/python3", "--version"]) {
        return;
    }
    let site = Site::new();
    site.write("server.py", &usual(1, ""));
    let words = ["--handoff", "adopt", "--listen", "ADDRESS?backlog=77", "--", "/usr/bin/python3", "server.py"];
    let supervisor = site.start(&words);
    let pid = Pid::from_raw(supervisor.serving().pid.unwrap());
    crate::common::freeze(pid);
    let clients = waiting(site.address, 20);
    // The dead one's socket does not block, and this one's own does.
    site.write("server.py", &usual(2, "").replace("listener.setblocking(False)", ""));
    kill(pid, Signal::SIGKILL).unwrap();
    answered(clients, "backlog=77 keepalive=1 blocks=True inherits=False version=2 ", &supervisor);
}

#[test]
fn what_comes_between_bind_and_listen_is_answered() {
    if !installed("python3", &["/usr/bin/python3", "--version"]) {
        return;
    }
    let site = Site::new();
    let between = "import time\nopen('bound', 'w')\nwhile not os.path.exists('go'): time.sleep(0.05)";
    site.write("server.py", &usual(1, between));
    let words = ["--handoff", "adopt", "--listen", "ADDRESS", "--", "/usr/bin/python3", "server.py"];
    let supervisor = site.spawn(&words);
    wait_for("it has bound", || site.path("bound").exists());
    let clients = waiting(site.address, 20);
    site.write("go", "");
    answered(clients, "version=1 ", &supervisor);
    // What came after listen(2) goes the same way.
    answered(waiting(site.address, 5), "version=1 ", &supervisor);
}

#[test]
fn an_unprivileged_program_has_a_privileged_port() {
    if !geteuid().is_root() {
        return eprintln!("not checked: only root has privileged ports");
    }
    if !installed("python3", &["/usr/bin/python3", "--version"]) {
        return;
    }
    // In a network of its own, where nobody else has the port; whatever this thread starts is there too.
    let there = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
        let site = Site::new();
        let address: SocketAddr = "127.0.0.1:81".parse().unwrap();
        let server = ["/usr/bin/python3", "-m", "http.server", "--bind", "127.0.0.1", "81"];
        let flags = ["--handoff", "adopt", "--listen", "127.0.0.1:81", "--user", "nobody", "--chdir", "/", "--"];
        let supervisor = site.start(&[flags.as_slice(), &server].concat());
        let config = || Config { limit: PATIENCE * 3, workers: 2, ..Config::new(Target::Tcp(address)) };
        let loads = [Load::start(config()), Load::start(config().keep_alive())];
        for _ in 0..3 {
            supervisor.upgrade();
            for load in &loads {
                assert!(load.more(20, PATIENCE), "{}\n{}", load.so_far(), supervisor.log());
            }
        }
        let pid = supervisor.serving().pid.unwrap();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains("Uid:\t65534\t65534"), "{status}");
        for load in loads {
            load.stop().assert_clean();
        }
        // After a crash it is its own socket once more.
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        supervisor.wait_until("another one serves", |status| status.serving.is_some_and(|serving| serving.0 == 5));
        assert!(try_request(address, "/").is_ok());
    });
    there.join().unwrap();
}
