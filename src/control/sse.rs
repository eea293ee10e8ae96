//! Events as text: server-sent events, one JSON object each, and back.

use super::types::Event;

/// A reader keeps no more than this of an event that does not end.
const MOST: usize = 4 << 20;

/// One event as it stands in the stream.
#[must_use]
pub fn encode(event: &Event) -> String {
    let name = match event {
        Event::Status(_) => "status",
        Event::Upgrade(_) => "upgrade",
        Event::Generation(_) => "generation",
        Event::Service { .. } => "service",
        Event::Replacing => "replacing",
        Event::Lagged { .. } => "lagged",
    };
    // JSON has no line ends of its own, so it is one data line.
    let data = serde_json::to_string(event).unwrap_or_default();
    format!("event: {name}\ndata: {data}\n\n")
}

/// Why a stream cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SseError {
    /// An event that does not end.
    #[error("an event is longer than {MOST} bytes")]
    TooLong,
    /// An event of another kind, or none.
    #[error("an event is not understood: {0}")]
    Event(#[from] serde_json::Error),
}

/// Puts events together from the pieces in which they come.
#[derive(Debug, Default)]
pub struct Decoder {
    pending: Vec<u8>,
    data: Vec<u8>,
}

impl Decoder {
    /// Takes what came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// The next event that is whole.
    pub fn event(&mut self) -> Result<Option<Event>, SseError> {
        while let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            let line = line.trim_ascii_end();
            if line.is_empty() {
                let data = std::mem::take(&mut self.data);
                if !data.is_empty() {
                    return Ok(Some(serde_json::from_slice(&data)?));
                }
            } else if let Some(data) = line.strip_prefix(b"data:") {
                self.data.extend_from_slice(data.trim_ascii_start());
            }
            // Names are in the data too; comments and ids say nothing to us.
        }
        if self.pending.len() + self.data.len() > MOST {
            return Err(SseError::TooLong);
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::types::ServicePhase;

    #[test]
    fn comes_back_in_whatever_pieces_it_travels() {
        let events = [Event::Service { phase: ServicePhase::Baking }, Event::Lagged { missed: 3 }];
        let text: String = events.iter().map(encode).collect();
        for size in [1, 2, 7, text.len()] {
            let mut decoder = Decoder::default();
            let mut got = Vec::new();
            for piece in text.as_bytes().chunks(size) {
                decoder.push(piece);
                while let Some(event) = decoder.event().unwrap() {
                    got.push(event);
                }
            }
            assert_eq!(got, events);
        }
    }

    #[test]
    fn comments_and_crlf_are_fine_and_garbage_is_an_error() {
        let mut decoder = Decoder::default();
        decoder.push(b": hello\r\n\r\nid: 1\r\ndata: {\"event\":\"lagged\",\r\ndata: \"missed\":1}\r\n\r\n");
        assert_eq!(decoder.event().unwrap(), Some(Event::Lagged { missed: 1 }));
        decoder.push(b"data: nonsense\n\n");
        assert!(decoder.event().is_err());
    }

    #[test]
    fn an_endless_line_is_given_up() {
        let mut decoder = Decoder::default();
        decoder.push(&vec![b'x'; MOST + 1]);
        assert!(matches!(decoder.event(), Err(SseError::TooLong)));
    }
}
