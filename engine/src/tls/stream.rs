//! TLS between a socket and who speaks by it: bytes in, bytes out. It reads no socket and never waits.
//!
//! Memory: what one receive brings, one encrypted piece of `ENCRYPTED_MAX` bytes, and rustls' records
//! under way, two at most.
use crate::io::Gather;
use rustls::{Connection, Error};
use std::io::{self, IoSlice, Read, Write};

/// Bytes that are encrypted at once.
const ENCRYPTED_MAX: usize = 256 << 10;

/// One connection's TLS.
#[derive(Debug)]
pub struct Tls {
    connection: Connection,
    /// What is being sent, as far as it is not encrypted yet.
    plain: Gather,
    ended: bool,
    said_farewell: bool,
}

impl Tls {
    /// Bytes of the longest record, all around its payload counted (RFC 8446, 5.2).
    pub const RECORD_MAX: usize = (16 << 10) + 256 + 5;

    /// TLS that has just begun.
    pub fn new(connection: impl Into<Connection>) -> Self {
        let mut connection = connection.into();
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

    /// True where the peer said that it sends no more.
    pub fn peer_has_ended(&self) -> bool {
        self.ended
    }

    /// True until both know each other.
    pub fn is_shaking_hands(&self) -> bool {
        self.connection.is_handshaking()
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
            // After an error of the peer's nothing can be said any more but the alert.
            Err(_) => self.plain.clear(),
        }
        if self.plain.is_empty() {
            // Its buffers are given up before the last of it has gone.
            self.plain.clear();
        }
        self.take_encrypted(&mut room);
        room
    }

    /// What TLS itself still has to say, and that nothing more will be sent; before that `farewell`, where all
    /// else has gone.
    pub fn last_words(&mut self, farewell: &[u8]) -> Gather {
        if self.plain.is_empty() && !self.is_shaking_hands() {
            // After an error there is only its alert.
            let _ = self.connection.writer().write(farewell);
        }
        self.farewell();
        let mut words = Gather::default();
        self.take_encrypted(&mut words);
        words
    }

    fn take_encrypted(&mut self, room: &mut Gather) {
        while self.connection.wants_write() {
            self.connection.write_tls(&mut Sink(room)).expect("memory takes all");
        }
    }

    /// Nothing more will be sent. Said once.
    pub fn farewell(&mut self) {
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
