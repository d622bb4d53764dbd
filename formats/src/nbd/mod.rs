//! NBD: what its bytes mean, and what may be asked when. This is the server's side; `client` has the other.
//!
//! ```text
//! bytes ─► handshake ─► Negotiated ─┐
//! bytes ─► wire::Header ────────────┴─► request::check ─► Action      (do it)
//!                                                     ├─► Refusal     (answer, skip its payload)
//!                                                     └─► Hangup      (nothing can be made of it)
//! ```
//!
//! Nothing here reads or writes a socket, and nothing here waits: bytes go in as they come, replies
//! come out as bytes. The protocol is `doc/proto.md` of NetworkBlockDevice/nbd; a name in capitals
//! is that document's; 64-bit headers are in its extension EXTENDED_HEADERS.
pub mod address;
pub mod client;
pub mod context;
pub mod export;
pub mod handshake;
mod option;
pub mod reply;
pub mod request;
pub mod wire;

pub use address::{Address, Server, TlsNames};
pub use context::Context;
pub use export::{BlockSizes, ExportInfo, Exports};
pub use handshake::{Handshake, Negotiated, Outcome, Tls};
pub use reply::{ReplyTo, Style};
pub use request::{Action, Refusal, Verdict};
pub use wire::Errno;
