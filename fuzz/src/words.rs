//! Words of the command line: sizes, and addresses of exports.
//!
//! A size is digits and perhaps a letter behind them, each letter 1024 times the one before, as long as it fits in 64
//! bits. An address that was written from its parts is read back as these parts, whatever they are, and refused where
//! a part is what no server and no export can have; any text is refused, or read as what its own writing says.
use arbitrary::{Arbitrary, Unstructured};
use formats::nbd::{Address, Server, TlsNames};

#[path = "../../cli/size.rs"]
#[allow(dead_code, reason = "how sizes are written is tested beside it")]
mod size;

#[derive(Arbitrary, Debug)]
enum Word<'a> {
    Size(&'a str),
    /// A number, and a letter of these or none.
    MadeSize(u64, u8),
    Address(&'a str),
    /// Host and port, or a socket; the export's name; TLS; each byte of them escaped where a bit is set.
    MadeAddress {
        host: &'a str,
        port: u16,
        socket: bool,
        export: &'a str,
        tls: bool,
        escaped: u64,
    },
}

/// Reads the word that `data` says.
pub fn run(data: &[u8]) {
    let Ok(word) = Word::arbitrary_take_rest(Unstructured::new(data)) else { return };
    match word {
        Word::Size(text) => assert_eq!(size::parse(text).ok(), bytes(text), "{text:?}"),
        Word::MadeSize(count, letter) => {
            let letter = ["", "K", "m", "G", "t", "P"][usize::from(letter) % 6];
            let text = format!("{count}{letter}");
            assert_eq!(size::parse(&text).ok(), bytes(&text), "{text:?}");
        }
        Word::Address(text) => {
            if let Ok(address) = Address::parse(text) {
                assert_eq!(Address::parse(&address.to_string()).ok(), Some(address), "{text:?}");
            }
        }
        Word::MadeAddress { host, port, socket, export, tls, escaped } => {
            let made = made(host, port, socket, export, tls, escaped);
            let server = if socket { Server::unix(host) } else { Server::tcp(host, port) };
            let expected = server.and_then(|server| Address::new(server, export));
            let expected = expected.ok().map(|address| Address {
                tls: tls.then_some(TlsNames { certificates: None, hostname: None }),
                ..address
            });
            assert_eq!(Address::parse(&made).ok(), expected, "{made:?}");
        }
    }
}

/// The bytes that a size means, letter by letter.
fn bytes(text: &str) -> Option<u64> {
    let mut total = 0u64;
    let mut letters = text.chars().peekable();
    letters.peek().filter(|first| first.is_ascii_digit())?;
    while let Some(digit) = letters.next_if(char::is_ascii_digit) {
        total = total.checked_mul(10)?.checked_add(u64::from(digit.to_digit(10)?))?;
    }
    let times = match letters.next() {
        None => 0,
        Some('K' | 'k') => 1,
        Some('M' | 'm') => 2,
        Some('G' | 'g') => 3,
        Some('T' | 't') => 4,
        Some(_) => return None,
    };
    for _ in 0..times {
        total = total.checked_mul(1024)?;
    }
    letters.next().is_none().then_some(total)
}

/// An address of these parts. What has a meaning of its own is always escaped, the rest where a bit says so.
fn made(host: &str, port: u16, socket: bool, export: &str, tls: bool, escaped: u64) -> String {
    let mut bits = escaped.rotate_right(1);
    let mut part = |text: &str| {
        let mut written = String::new();
        for byte in text.bytes() {
            bits = bits.rotate_left(1);
            if byte.is_ascii_alphanumeric() && bits & 1 == 0 {
                written.push(char::from(byte));
            } else {
                written += &format!("%{byte:02x}");
            }
        }
        written
    };
    let (scheme, host, export) = (if tls { "nbds" } else { "nbd" }, part(host), part(export));
    match socket {
        true => format!("{scheme}+unix:///{export}?socket={host}"),
        false => format!("{scheme}://{host}:{port}/{export}"),
    }
}
