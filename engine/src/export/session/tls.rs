//! TLS between the socket and the session's two halves: bytes in, bytes out, as everything here.
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
//!
//! Memory: what one receive brings, one encrypted piece of `ENCRYPTED_MAX` bytes, and rustls' records
//! under way, two at most.
use crate::io::Gather;
use rustls::{Error, ServerConnection};
use std::io::{self, IoSlice, Read, Write};

/// Bytes of replies that are encrypted at once.
const ENCRYPTED_MAX: usize = 256 << 10;

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
    pub fn tls_of(connection: ServerConnection) -> Self {
        Self::Tls(Box::new(Tls::new(connection)))
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

/// One connection's TLS.
pub(super) struct Tls {
    connection: ServerConnection,
    /// What is being sent, as far as it is not encrypted yet.
    plain: Gather,
    ended: bool,
    said_farewell: bool,
}

impl Tls {
    /// Bytes of the longest record, all around its payload counted (RFC 8446, 5.2).
    pub const RECORD_MAX: usize = (16 << 10) + 256 + 5;

    fn new(mut connection: ServerConnection) -> Self {
        // The bound is ours: so much is given to it at once.
        connection.set_buffer_limit(None);
        Self { connection, plain: Gather::default(), ended: false, said_farewell: false }
    }

    /// Puts what is inside of `received` into `decrypted`, which has room for a record more. How much it is.
    pub fn decrypt(&mut self, mut received: &[u8], decrypted: &mut [u8]) -> Result<usize, Error> {
        let mut filled = 0;
        while !received.is_empty() && !self.ended {
            let taken = self.connection.read_tls(&mut received);
            taken.map_err(|error| Error::General(error.to_string()))?;
            self.ended = self.connection.process_new_packets()?.peer_has_closed();
            filled += self.take_out(&mut decrypted[filled..]);
        }
        Ok(filled)
    }

    fn take_out(&mut self, room: &mut [u8]) -> usize {
        let mut filled = 0;
        // An error says that there is no more now.
        while let Ok(count @ 1..) = self.connection.reader().read(&mut room[filled..]) {
            filled += count;
        }
        filled
    }

    /// True where the client said that it sends no more.
    pub fn peer_has_ended(&self) -> bool {
        self.ended
    }

    /// True where something waits for being encrypted or sent.
    pub fn has_to_say(&self) -> bool {
        self.connection.wants_write() || !self.plain.is_empty()
    }

    /// Takes all of `gather` and gives the first of it, encrypted.
    pub fn encrypt(&mut self, gather: Gather) -> Gather {
        assert!(self.plain.is_empty(), "one send at a time");
        let room = std::mem::replace(&mut self.plain, gather);
        self.encrypt_more(room)
    }

    /// Puts what follows of it into `room`, which is empty.
    pub fn encrypt_more(&mut self, mut room: Gather) -> Gather {
        let mut left = ENCRYPTED_MAX;
        let mut pieces = Vec::new();
        for piece in self.plain.slices() {
            let piece = &piece[..piece.len().min(left)];
            left -= piece.len();
            pieces.push(IoSlice::new(piece));
            if left == 0 {
                break;
            }
        }
        match self.connection.writer().write_vectored(&pieces) {
            Ok(count) => self.plain.advance(count),
            // After an error of the client's nothing can be said any more but the alert.
            Err(_) => self.plain.clear(),
        }
        if self.plain.is_empty() {
            // Its buffers are given up before the last of it has gone.
            self.plain.clear();
        }
        while self.connection.wants_write() {
            self.connection.write_tls(&mut Sink(&mut room)).expect("memory takes all");
        }
        room
    }

    fn farewell(&mut self) {
        if !self.said_farewell {
            self.said_farewell = true;
            self.connection.send_close_notify();
        }
    }
}

/// A gather as something to write into.
struct Sink<'a>(&'a mut Gather);

impl Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push_bytes(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
