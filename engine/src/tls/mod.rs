//! Who we are and who may come in, inside TLS: the certificates of a folder laid out as QEMU's.
//!
//! | file | what |
//! |---|---|
//! | `ca-cert.pem` | the authorities whose clients may come in |
//! | `server-cert.pem` | our certificate, and those between it and its authority |
//! | `server-key.pem` | its private key, without a passphrase |
//! | `ca-crl.pem` | certificates that the authorities took back; need not be there |
//!
//! TLS is version 1.3 alone: in 1.2 a key cannot be changed under way, so a connection would have to end
//! after 2^24 records. No connection goes on from another's session: each shows its certificate.
//!
//! What is wrong with a file is found when it is opened, not by the first client.
mod allowed;
mod folder;
mod server;
mod stream;

#[cfg(test)]
pub(crate) mod tests;

pub use server::{Credentials, in_words};
pub use stream::Tls;
