//! Finds the messages in a client's bytes.
//!
//! A message ends where its outermost brace closes or at the end of its line, whichever comes first:
//! QMP's own clients send objects with no line end at all, and half an object on a line of its own
//! is answered instead of waited for. What a message means is `command`'s concern.

/// The longest message, in bytes.
pub const MESSAGE_LEN_MAX: usize = 64 << 10;

/// One message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// Its bytes, not looked at beyond braces and quotes.
    Message(Vec<u8>),
    /// It is longer than `MESSAGE_LEN_MAX` and was thrown away.
    TooLong,
}

/// Where in a message the last byte was.
#[derive(Debug, Default)]
pub(super) struct Framer {
    message: Vec<u8>,
    /// Braces and brackets that are open.
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// The message began with something other than a brace: it ends with its line.
    to_line_end: bool,
    /// The message is too long, and that was said.
    discarding: bool,
}

impl Framer {
    /// Takes `bytes` in and gives each message that they complete to `found`.
    pub(super) fn push(&mut self, bytes: &[u8], mut found: impl FnMut(Frame)) {
        for &byte in bytes {
            if let Some(frame) = self.push_byte(byte) {
                found(frame);
            }
        }
    }

    fn push_byte(&mut self, byte: u8) -> Option<Frame> {
        if byte == b'\n' {
            return self.end();
        }
        if self.is_between() {
            if matches!(byte, b' ' | b'\t' | b'\r') {
                return None;
            }
            self.to_line_end = byte != b'{';
        }
        if self.message.len() == MESSAGE_LEN_MAX && !self.discarding {
            self.discarding = true;
            self.message = Vec::new();
            self.follow(byte);
            if self.is_closed() {
                *self = Self::default();
            }
            return Some(Frame::TooLong);
        }
        if !self.discarding {
            self.message.push(byte);
        }
        self.follow(byte);
        if self.is_closed() { self.end() } else { None }
    }

    /// The last byte was the outermost brace.
    fn is_closed(&self) -> bool {
        self.depth == 0 && !self.to_line_end
    }

    fn is_between(&self) -> bool {
        self.message.is_empty() && !self.discarding
    }

    /// Keeps count of braces outside strings.
    fn follow(&mut self, byte: u8) {
        match byte {
            _ if self.escaped => self.escaped = false,
            b'\\' if self.in_string => self.escaped = true,
            b'"' => self.in_string = !self.in_string,
            b'{' | b'[' if !self.in_string => self.depth += 1,
            b'}' | b']' if !self.in_string => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
    }

    fn end(&mut self) -> Option<Frame> {
        let ended = std::mem::take(self);
        (!ended.message.is_empty()).then_some(Frame::Message(ended.message))
    }
}

#[cfg(test)]
mod tests {
    use super::{Frame, Framer, MESSAGE_LEN_MAX};

    fn frames(bytes: &[u8]) -> Vec<Frame> {
        let mut found = Vec::new();
        Framer::default().push(bytes, |frame| found.push(frame));
        found
    }

    fn messages(bytes: &[u8]) -> Vec<String> {
        let text = |frame| match frame {
            Frame::Message(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Frame::TooLong => "too long".into(),
        };
        frames(bytes).into_iter().map(text).collect()
    }

    #[test]
    fn objects_need_no_line_ends() {
        assert_eq!(messages(br#"{"a":{}}{"b":[1]} {"c"#), [r#"{"a":{}}"#, r#"{"b":[1]}"#]);
    }

    #[test]
    fn braces_in_strings_do_not_count() {
        assert_eq!(messages(br#"{"a":"}\"}{"}{}"#), [r#"{"a":"}\"}{"}"#, "{}"]);
    }

    #[test]
    fn half_an_object_ends_with_its_line() {
        assert_eq!(messages(b"{\"a\":\n{\"b\n{}\r\n\n"), ["{\"a\":", "{\"b", "{}"]);
    }

    #[test]
    fn what_is_no_object_ends_with_its_line() {
        assert_eq!(messages(b"quit {}\n}{}\n[{}]\n"), ["quit {}", "}{}", "[{}]"]);
    }

    #[test]
    fn a_long_message_is_told_once_and_skipped_whole() {
        let mut bytes = br#"{"a":""#.to_vec();
        bytes.resize(MESSAGE_LEN_MAX * 3, b'x');
        bytes.extend_from_slice(br#""}{"b":1}"#);
        assert_eq!(messages(&bytes), ["too long", r#"{"b":1}"#]);
    }

    #[test]
    fn the_longest_message_passes() {
        let mut bytes = br#"{"a":""#.to_vec();
        bytes.resize(MESSAGE_LEN_MAX - 2, b'x');
        bytes.extend_from_slice(br#""}"#);
        assert_eq!(frames(&bytes), [Frame::Message(bytes.clone())]);
        bytes.insert(6, b'x');
        assert_eq!(frames(&bytes), [Frame::TooLong]);
        // Its last brace was the byte too many, and the next message went with it.
        bytes.extend_from_slice(b"{}");
        assert_eq!(frames(&bytes), [Frame::TooLong, Frame::Message(b"{}".to_vec())]);
    }

    #[test]
    fn the_cuts_between_receives_do_not_matter() {
        let bytes = b"{\"a\":\"\\\\\"}\n{\"b\":\"\\\"{\"} junk\n{\n{}";
        let mut found = Vec::new();
        let mut framer = Framer::default();
        for byte in bytes {
            framer.push(&[*byte], |frame| found.push(frame));
        }
        assert_eq!(found, frames(bytes));
        assert_eq!(found.len(), 5);
    }
}
