//! What a client sends: headers and payloads, however the socket cuts them.
//!
//! One receive is under way whenever nothing that came is left to look at. Most go into a staging
//! buffer, so that a burst of small requests costs one; a long payload goes straight to its place.
//! What is not looked at stays in the socket: that is what holds back a client that asks for more
//! than there is room for.
//!
//! Inside TLS everything goes into the staging buffer, and what was in it into one of its own.
use crate::io::{Buffer, File, Io, Loan, Op, Token, Until};
use crate::tls::Tls;
use formats::nbd::wire::HEADER_LEN_MAX;
use rustix::io::Errno;
use std::io;
use std::ops::Range;

/// Bytes that one receive takes at most, payloads that go straight to their place apart.
pub(super) const STAGING_LEN: usize = 128 << 10;
/// From here on, what is missing of a payload is received straight into its place: a copy from the
/// staging buffer would cost more than another receive.
const DIRECT_MIN: usize = 32 << 10;
/// What one receive can bring out of TLS: with a record that was almost whole before.
const DECRYPTED_LEN: usize = STAGING_LEN + Tls::RECORD_MAX;

/// Something whole that came.
pub(super) enum Item {
    /// A request's header: the first bytes of these are all of it.
    Header([u8; HEADER_LEN_MAX]),
    /// The payload that was expected.
    Payload(Buffer),
}

/// The receiving half of a connection.
pub(super) struct Inbound {
    socket: File,
    state: State,
    /// The buffer that was received into last, and what of it was not looked at yet.
    received: Option<(Buffer, Range<usize>)>,
    /// Where to receive next time; the one that is not here is in the kernel or in `received`.
    staging: Option<Buffer>,
    /// As long as a header: used where a long payload will follow, which so is never copied.
    short: Option<Buffer>,
    /// Where to decrypt next time, inside TLS.
    decrypted: Option<Buffer>,
    direct_min: usize,
    header: [u8; HEADER_LEN_MAX],
    /// How much of it came, and how long it is.
    header_filled: usize,
    header_len: usize,
    payload: Option<Payload>,
    skip: u64,
    long_payloads: bool,
    /// Headers that the last receive brought.
    headers: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Receiving,
    /// The client sends no more, or cannot.
    Ended,
}

enum Payload {
    Here {
        buffer: Buffer,
        filled: usize,
    },
    /// What is missing is being received.
    Lent {
        loan: Loan,
        head: Buffer,
    },
}

impl Inbound {
    /// Of `socket`. Its buffers are memory of their own, and go with it from thread to thread.
    pub fn new(socket: File) -> Self {
        Self {
            socket,
            state: State::Idle,
            received: None,
            staging: Some(Buffer::alone(STAGING_LEN)),
            short: None,
            decrypted: None,
            direct_min: DIRECT_MIN,
            header: [0; HEADER_LEN_MAX],
            header_filled: 0,
            header_len: 0,
            payload: None,
            skip: 0,
            long_payloads: false,
            headers: 0,
        }
    }

    /// What follows are requests, whose headers have so many bytes.
    pub fn expect_requests(&mut self, header_len: usize) {
        self.header_len = header_len;
        self.short = Some(Buffer::alone(header_len));
    }

    /// What of the requests to come was received already, by whoever had the socket before.
    pub fn take_up(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let mut staging = self.staging.take().expect("nothing was received yet");
        // What does not fit is less than a header.
        let (head, rest) = bytes.split_at(bytes.len().saturating_sub(staging.len()).min(self.header_len - 1));
        self.header[..head.len()].copy_from_slice(head);
        self.header_filled = head.len();
        staging[..rest.len()].copy_from_slice(rest);
        self.received = Some((staging, 0..rest.len()));
    }

    /// True between two requests: neither a payload nor bytes that nobody wants are on their way.
    pub fn is_between(&self) -> bool {
        self.skip == 0 && self.payload.is_none()
    }

    /// What was received of requests that were not begun.
    pub fn left(&self) -> Vec<u8> {
        [&self.header[..self.header_filled], self.unread()].concat()
    }

    /// What follows is TLS, all of it. Before anything of it was received.
    pub fn expect_tls(&mut self) {
        assert!(self.received.is_none() && self.state != State::Receiving, "a border is not received across");
        self.decrypted = Some(Buffer::alone(DECRYPTED_LEN));
        // Into a payload's place the payload alone may go.
        self.direct_min = usize::MAX;
    }

    /// What was received is TLS: what is inside is looked at instead.
    pub fn decrypt(&mut self, tls: &mut Tls) -> Result<(), rustls::Error> {
        let Some((received, range)) = self.received.take() else { return Ok(()) };
        let mut decrypted = self.decrypted.take().expect("nothing was left to look at");
        let count = tls.decrypt(&received[range], &mut decrypted);
        self.staging = Some(received);
        self.received = Some((decrypted, 0..*count.as_ref().unwrap_or(&0)));
        self.advance(0);
        if tls.peer_has_ended() {
            self.state = State::Ended;
        }
        count.map(drop)
    }

    /// True where the client sends no more.
    pub fn has_ended(&self) -> bool {
        self.state == State::Ended
    }

    /// What was received and not looked at: for the handshake, which has its own units.
    pub fn unread(&self) -> &[u8] {
        self.received.as_ref().map_or(&[], |(buffer, range)| &buffer[range.clone()])
    }

    /// `count` bytes of `unread` were looked at.
    pub fn advance(&mut self, count: usize) {
        let Some((buffer, mut range)) = self.received.take() else {
            assert!(count == 0, "nothing was received");
            return;
        };
        range.start += count;
        assert!(range.start <= range.end, "no more is read than was received");
        match () {
            () if !range.is_empty() => self.received = Some((buffer, range)),
            () if buffer.len() == self.header_len => self.short = Some(buffer),
            () if buffer.len() == DECRYPTED_LEN => self.decrypted = Some(buffer),
            () => self.staging = Some(buffer),
        }
    }

    /// The next header, or the payload that was expected; `None` where it is not all there yet.
    pub fn next(&mut self) -> Option<Item> {
        if self.skip > 0 {
            let len = self.skip.min(self.unread().len() as u64);
            self.advance(len as usize);
            self.skip -= len;
            if self.skip > 0 {
                return None;
            }
        }
        match self.payload.take() {
            None => self.next_header(),
            Some(Payload::Here { mut buffer, mut filled }) => {
                filled += self.copy_out(&mut buffer[filled..]);
                if filled == buffer.len() {
                    return Some(Item::Payload(buffer));
                }
                self.payload = Some(Payload::Here { buffer, filled });
                None
            }
            lent => {
                self.payload = lent;
                None
            }
        }
    }

    fn next_header(&mut self) -> Option<Item> {
        let mut header = self.header;
        self.header_filled += self.copy_out(&mut header[self.header_filled..self.header_len]);
        self.header = header;
        (self.header_filled == self.header_len).then(|| {
            self.header_filled = 0;
            self.long_payloads = false;
            self.headers += 1;
            Item::Header(header)
        })
    }

    fn copy_out(&mut self, into: &mut [u8]) -> usize {
        let unread = self.unread();
        let len = unread.len().min(into.len());
        into[..len].copy_from_slice(&unread[..len]);
        self.advance(len);
        len
    }

    /// What follows is a payload for all of `buffer`, which is not empty.
    pub fn expect_payload(&mut self, buffer: Buffer) {
        self.long_payloads = buffer.len() >= self.direct_min;
        self.payload = Some(Payload::Here { buffer, filled: 0 });
    }

    /// What follows is `len` bytes that nobody wants.
    pub fn skip(&mut self, len: u64) {
        self.skip = len;
    }

    /// Receives where nothing is left to look at. After `next` gave `None`.
    pub fn submit(&mut self, io: &mut impl Io, token: Token) {
        if self.state != State::Idle || self.received.is_some() {
            return;
        }
        let (buf, until) = match self.payload.take() {
            Some(Payload::Here { buffer, filled }) if buffer.len() - filled >= self.direct_min => {
                let rest_len = buffer.len() - filled;
                let mut loan = Loan::new(buffer);
                let head = loan.lend(filled);
                let rest = loan.lend(rest_len);
                self.payload = Some(Payload::Lent { loan, head });
                (rest, Until::Full)
            }
            payload => {
                let short = self.long_payloads && payload.is_none();
                // Whoever sent one request sends nothing before its reply, most likely.
                let until = if self.headers <= 1 && payload.is_none() { Until::Later } else { Until::Some };
                self.payload = payload;
                let buffer = if short { &mut self.short } else { &mut self.staging };
                (buffer.take().expect("what nobody receives into is here"), until)
            }
        };
        self.state = State::Receiving;
        self.headers = 0;
        io.submit(token, Op::Receive { socket: self.socket.clone(), buf, until });
    }

    /// Takes in what became of a receive.
    pub fn complete(&mut self, op: Op, result: io::Result<u32>) {
        let Op::Receive { buf, .. } = op else { unreachable!("a receive was submitted") };
        let cancelled = matches!(&result, Err(error) if Errno::from_io_error(error) == Some(Errno::CANCELED));
        let count = result.map_or(0, |count| count as usize);
        self.state = if count == 0 && !cancelled { State::Ended } else { State::Idle };
        match self.payload.take() {
            Some(Payload::Lent { mut loan, head }) => {
                let filled = head.len() + count;
                loan.give_back(head);
                loan.give_back(buf);
                self.payload = Some(Payload::Here { buffer: loan.end(), filled });
            }
            payload => {
                self.payload = payload;
                self.received = Some((buf, 0..count));
                // Nothing came: the buffer goes back to its place.
                self.advance(0);
            }
        }
    }
}
