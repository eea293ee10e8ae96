//! Who is reached at an address where several generations have sockets.

use std::net::SocketAddr;

use super::adopting::Adopted;
use crate::core::GenerationId;
use crate::listener::steering::Origin;
use crate::ready::divert::{Way, Wish};

impl Adopted {
    /// A probe of this generation wants to reach it alone, or does not any more.
    pub fn grant(&mut self, id: GenerationId, wish: Wish) {
        match wish {
            Wish::Begin { from, to, way } => {
                let _prober_is_gone = way.send(self.divert(id, from, to));
            }
            Wish::End { from } => {
                for group in self.groups.values_mut() {
                    if let Err(error) = group.end_divert(Origin::socket(from)) {
                        tracing::error!("{error}");
                    }
                }
            }
        }
    }

    /// What comes from there to this address reaches this generation alone. Where sockets of several groups take what
    /// comes there, as at `0.0.0.0` and `127.0.0.1`, it is steered in each: the kernel says which one gets it.
    fn divert(&mut self, id: GenerationId, from: SocketAddr, to: SocketAddr) -> Way {
        let mut way = Way::Anyone;
        for group in self.groups.values_mut().filter(|group| group.key().takes(to)) {
            if group.of(id).is_empty() {
                if way == Way::Anyone {
                    way = Way::Others;
                }
                continue;
            }
            match group.divert(Origin::socket(from), id) {
                Ok(()) => way = Way::Alone,
                Err(error) => return Way::Failed(error.to_string()),
            }
        }
        way
    }
}
