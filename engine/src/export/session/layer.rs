//! What is between the socket and the session's two halves: nothing, or TLS.
//!
//! ```text
//! socket ─► staging buffer ─► decrypt ─► inbound          outbound ─► encrypt ─► socket
//! ```
//!
//! Order is everything here:
//!
//! 1. The ACK to STARTTLS goes in plain and whole before TLS begins. Begun earlier, it would be encrypted for a
//!    client that has not heard of it.
//! 2. Between the request and the ACK nothing is received, and what came with the request ends the
//!    connection. Taken in, it would stand among what TLS protects, whoever said it.
//! 3. Who the client is, is settled by the handshake itself: before, no byte of an option comes out.
//!    Asked afterwards, somebody who is turned away would have seen the exports.
//! 4. A close_notify is the last that is said, after all replies. Said earlier, they would be lost; not said,
//!    the client could not tell our end from a cut.
use crate::tls::Tls;

/// What is between the socket and the session.
pub(super) enum Layer {
    /// Nothing.
    Plain,
    /// Nothing yet: the ACK to STARTTLS is on its way.
    Starting,
    /// TLS, its handshake included.
    Tls(Box<Tls>),
}

impl Layer {
    /// From here on, TLS.
    pub fn inside(tls: Tls) -> Self {
        Self::Tls(Box::new(tls))
    }

    /// True until TLS begins, once it was asked for.
    pub fn is_starting(&self) -> bool {
        matches!(self, Self::Starting)
    }

    /// What everything goes through, if anything.
    pub fn tls(&mut self) -> Option<&mut Tls> {
        match self {
            Self::Tls(tls) => Some(tls),
            Self::Plain | Self::Starting => None,
        }
    }

    /// True where TLS itself has something to send.
    pub fn has_to_say(&self) -> bool {
        matches!(self, Self::Tls(tls) if tls.has_to_say())
    }

    /// Nothing more will be sent. Said once.
    pub fn farewell(&mut self) {
        if let Some(tls) = self.tls() {
            tls.farewell();
        }
    }
}
