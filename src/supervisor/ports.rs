//! Ports that the kernel chose for services that bound port 0: the next generation gets the same.

use std::net::SocketAddr;
use std::os::fd::AsFd;

use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};
use socket2::SockRef;

use crate::core::GenerationId;

/// Those of the generations that live.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Ports {
    chosen: Vec<Chosen>,
    /// Whose the next generation gets.
    before: Option<GenerationId>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Chosen {
    owner: GenerationId,
    address: SocketAddr,
    /// Of its socket.
    inode: u64,
}

impl Ports {
    /// The port that the generation before had at this address, if this one has no socket there yet. It may have bound one
    /// there and closed it again: `is_open` tells.
    pub fn of_before(&self, id: GenerationId, asked: SocketAddr, is_open: impl Fn(u64) -> bool) -> Option<SocketAddr> {
        let before = self.before.filter(|_| asked.port() == 0)?;
        let own = |address| self.chosen.iter().filter(move |own| own.owner == id && own.address == address);
        let mut addresses = self.of(before).filter(|address| address.ip() == asked.ip());
        addresses.find(|&address| !own(address).any(|own| is_open(own.inode)))
    }

    /// A socket of this generation was bound to port 0.
    pub fn bound(&mut self, owner: GenerationId, socket: &impl AsFd) {
        let address = SockRef::from(socket).local_addr().ok().and_then(|address| address.as_socket());
        if let (Some(address), Ok(found)) = (address, fstat(socket)) {
            self.chosen.push(Chosen { owner, address, inode: found.st_ino });
        }
    }

    /// Nobody lives of those before, and their sockets are this owner's.
    pub fn left_by(&mut self, owner: GenerationId) {
        self.before = Some(owner);
    }

    /// This generation serves from now on, and listens there.
    pub fn serves(&mut self, id: GenerationId, listens: &[SocketAddr], lives: impl Fn(GenerationId) -> bool) {
        self.before = Some(id);
        self.chosen.retain(|chosen| match chosen.owner {
            owner if owner == id => listens.contains(&chosen.address),
            owner => lives(owner),
        });
    }

    /// Whether the kernel chose the port of this socket of a generation.
    pub fn chose(&self, owner: GenerationId, inode: u64) -> bool {
        self.chosen.iter().any(|chosen| chosen.owner == owner && chosen.inode == inode)
    }

    fn of(&self, owner: GenerationId) -> impl Iterator<Item = SocketAddr> + '_ {
        self.chosen.iter().filter(move |chosen| chosen.owner == owner).map(|chosen| chosen.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    const ANY: &str = "127.0.0.1:0";

    fn any() -> SocketAddr {
        ANY.parse().unwrap()
    }

    #[test]
    fn each_socket_gets_the_port_of_another_one() {
        let (one, two) = (GenerationId(1), GenerationId(2));
        let sockets = [ANY; 3].map(|address| TcpListener::bind(address).unwrap());
        let address = |index: usize| sockets[index].local_addr().unwrap();
        let mut ports = Ports::default();
        sockets.iter().for_each(|socket| ports.bound(one, socket));
        assert_eq!(ports.of_before(two, any(), |_| true), None, "nobody has served");
        // The second was closed again: nobody listens there.
        ports.serves(one, &[address(0), address(2)], |_| true);
        assert_eq!(ports.of_before(two, any(), |_| true), Some(address(0)));
        ports.bound(two, &sockets[0]);
        assert_eq!(ports.of_before(two, any(), |_| true), Some(address(2)));
        // One that only tried whether it can is no reason to take another port.
        assert_eq!(ports.of_before(two, any(), |_| false), Some(address(0)));
        ports.bound(two, &sockets[2]);
        assert_eq!(ports.of_before(two, any(), |_| true), None);
        assert_eq!(ports.of_before(two, "127.0.0.1:80".parse().unwrap(), |_| true), None);
        assert_eq!(ports.of_before(two, "0.0.0.0:0".parse().unwrap(), |_| true), None);
    }

    #[test]
    fn after_a_switch_back_it_is_the_standby_s() {
        let (one, two, three) = (GenerationId(1), GenerationId(2), GenerationId(3));
        let sockets = [ANY; 2].map(|address| TcpListener::bind(address).unwrap());
        let address = |index: usize| sockets[index].local_addr().unwrap();
        let mut ports = Ports::default();
        ports.bound(one, &sockets[0]);
        ports.serves(one, &[address(0)], |_| true);
        ports.bound(two, &sockets[1]);
        ports.serves(two, &[address(1)], |_| true);
        assert_eq!(ports.of_before(three, any(), |_| true), Some(address(1)));
        ports.serves(one, &[address(0)], |owner| owner != two);
        assert_eq!(ports.of_before(three, any(), |_| true), Some(address(0)));
    }
}
