//! What one send puts on the wire: small headers and whole buffers, in order.
use super::Buffer;
use std::ops::Range;

/// A list of pieces to send.
#[derive(Debug, Default)]
pub struct Gather {
    /// All the small pieces, one behind the other.
    bytes: Vec<u8>,
    pieces: Vec<Piece>,
    len: usize,
    sent: usize,
}

#[derive(Debug)]
enum Piece {
    Bytes(Range<usize>),
    Buffer(Buffer),
}

impl Gather {
    /// How many pieces one send takes at most: the kernel's bound on its vectors is 1024.
    pub const PIECES_MAX: usize = 512;

    /// Adds bytes, which are copied.
    pub fn push_bytes(&mut self, bytes: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        self.len += bytes.len();
        match self.pieces.last_mut() {
            Some(Piece::Bytes(last)) => last.end += bytes.len(),
            _ => self.pieces.push(Piece::Bytes(start..start + bytes.len())),
        }
    }

    /// Adds a buffer, which is not copied.
    pub fn push_buffer(&mut self, buffer: Buffer) {
        self.len += buffer.len();
        self.pieces.push(Piece::Buffer(buffer));
    }

    /// True where nothing is left to send.
    pub fn is_empty(&self) -> bool {
        self.sent == self.len
    }

    /// How many bytes are left to send.
    pub fn remaining(&self) -> usize {
        self.len - self.sent
    }

    /// How many pieces there are.
    pub fn piece_count(&self) -> usize {
        self.pieces.len()
    }

    /// `count` bytes have gone.
    pub fn advance(&mut self, count: usize) {
        self.sent += count;
        assert!(self.sent <= self.len, "no more is sent than there is");
    }

    /// Empty again; its buffers are given up, its memory is kept.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.pieces.clear();
        (self.len, self.sent) = (0, 0);
    }

    /// Its buffers, whether sent or not.
    pub fn into_buffers(self) -> impl Iterator<Item = Buffer> {
        self.pieces.into_iter().filter_map(|piece| match piece {
            Piece::Bytes(_) => None,
            Piece::Buffer(buffer) => Some(buffer),
        })
    }

    /// What is left to send, piece by piece.
    pub fn slices(&self) -> impl Iterator<Item = &[u8]> {
        let mut skip = self.sent;
        self.pieces.iter().filter_map(move |piece| {
            let bytes = match piece {
                Piece::Bytes(range) => &self.bytes[range.clone()],
                Piece::Buffer(buffer) => &buffer[..],
            };
            let skipped = skip.min(bytes.len());
            skip -= skipped;
            (skipped < bytes.len()).then(|| &bytes[skipped..])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Buffer, Gather};

    #[test]
    fn what_was_sent_is_skipped() {
        let mut gather = Gather::default();
        gather.push_bytes(b"ab");
        gather.push_bytes(b"cd");
        let mut buffer = Buffer::alone(3);
        buffer.copy_from_slice(b"efg");
        gather.push_buffer(buffer);
        gather.push_bytes(b"h");
        assert_eq!(gather.piece_count(), 3);
        for sent in 0..=8 {
            assert_eq!(gather.slices().flatten().copied().collect::<Vec<u8>>(), &b"abcdefgh"[sent..]);
            assert_eq!(gather.remaining(), 8 - sent);
            if sent < 8 {
                gather.advance(1);
            }
        }
        assert!(gather.is_empty());
    }
}
