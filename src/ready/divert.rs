//! How a probe reaches one generation at an address where others listen too: by the port that it comes from, which whoever
//! steers there sends to that generation before the probe connects.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::oneshot;

use super::probe::WhyNot;

/// What a probe asks of whoever steers.
#[derive(Debug)]
pub enum Wish {
    /// What comes from there is to reach its generation alone.
    Begin {
        /// The probe's own end.
        from: SocketAddr,
        /// Where it will connect to.
        to: SocketAddr,
        /// Is told what came of it.
        way: oneshot::Sender<Way>,
    },
    /// It is over.
    End {
        /// The probe's own end.
        from: SocketAddr,
    },
}

/// Whom a probe reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// Its generation alone.
    Alone,
    /// Nothing is steered there: whoever listens.
    Anyone,
    /// Others: its generation does not listen there.
    Others,
    /// It cannot be steered.
    Failed(String),
}

/// Makes wishes come true.
pub type Steering = Arc<dyn Fn(Wish) + Send + Sync>;

/// A connection of a probe. What comes from there is steered as everything else once this is dropped.
pub struct Diverted {
    from: SocketAddr,
    steering: Steering,
}

impl Drop for Diverted {
    fn drop(&mut self) {
        (self.steering)(Wish::End { from: self.from });
    }
}

/// Connects to a generation.
pub async fn connect(address: SocketAddr, steering: &Steering) -> Result<(TcpStream, Diverted), WhyNot> {
    let to = SocketAddr::new(reachable(address.ip()), address.port());
    let (socket, from) = bound(to).map_err(|source| WhyNot::Connect { address, source })?;
    let (way, answer) = oneshot::channel();
    steering(Wish::Begin { from, to, way });
    let diverted = Diverted { from, steering: Arc::clone(steering) };
    match answer.await {
        // Nobody is there to answer: zddsup ends.
        Ok(Way::Alone | Way::Anyone) | Err(_) => {}
        Ok(Way::Others) => return Err(WhyNot::Answer(format!("does not listen on {address} yet"))),
        Ok(Way::Failed(why)) => return Err(WhyNot::Answer(why)),
    }
    let stream = socket.connect(to).await.map_err(|source| WhyNot::Connect { address, source })?;
    Ok((stream, diverted))
}

/// A socket that has its port already. It comes from where it connects to: that is an address of this machine, or the
/// generation is not there.
fn bound(to: SocketAddr) -> std::io::Result<(TcpSocket, SocketAddr)> {
    loop {
        let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.bind(SocketAddr::new(to.ip(), 0))?;
        let from = socket.local_addr()?;
        // It would be connected to itself.
        if from.port() != to.port() {
            return Ok((socket, from));
        }
    }
}

/// An address by which whoever listens on every address is reached.
fn reachable(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    }
}
