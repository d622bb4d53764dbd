//! Who we are and whom we trust, inside TLS, as a server and as a client: the certificates of a folder laid out as
//! QEMU's, and the bytes of a connection.
//!
//! | file | what |
//! |---|---|
//! | `ca-cert.pem` | the authorities whose clients may come in; those whose servers are believed |
//! | `server-cert.pem`, `client-cert.pem` | our certificate, and those between it and its authority |
//! | `server-key.pem`, `client-key.pem` | its private key, without a passphrase |
//! | `ca-crl.pem` | certificates that the authorities took back; need not be there |
//!
//! A client needs a certificate only where its server wants to see one. Its server is always verified: signed by one
//! of the authorities, of this time, and for the name that was asked for.
//!
//! TLS is version 1.3 alone: in 1.2 a key cannot be changed under way, so a connection would have to end
//! after 2^24 records. No connection goes on from another's session: each shows its certificate.
//!
//! What is wrong with a file is found when it is opened, not by the first connection.
mod allowed;
mod client;
mod folder;
mod server;
mod stream;

#[cfg(test)]
pub(crate) mod tests;

pub use client::ClientCredentials;
pub use server::{Credentials, in_words};
pub use stream::Tls;
