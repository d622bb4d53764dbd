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
mod client;
mod folder;

#[cfg(test)]
pub(crate) mod tests;

use crate::control::options::TlsOptions;
use client::Allowed;
use folder::Folder;
use formats::error::{Error, Result};
use formats::nbd::Tls;
use rustls::crypto::ring::default_provider;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{CertificateError, RootCertStore, ServerConfig, ServerConnection};
use std::sync::Arc;

/// What a server needs to speak TLS with its clients.
#[derive(Debug)]
pub struct Credentials {
    required: bool,
    config: Arc<ServerConfig>,
}

impl Credentials {
    /// Those of a folder, each file looked at.
    pub fn open(options: &TlsOptions) -> Result<Self> {
        if !options.allow.is_empty() && !options.verify_peer {
            return Err(Error::invalid(
                "clients that show no certificate have no name: --tls-allow needs --tls-verify-peer yes",
            ));
        }
        let folder = Folder::new(&options.certificates);
        let authorities = folder.authorities(options.verify_peer)?;
        let certificates = folder.server_certificates()?;
        folder.examine(&certificates, authorities.as_ref())?;
        let key = folder.server_key()?;
        let clients = match authorities.filter(|_| options.verify_peer) {
            Some(authorities) => verifier(&folder, authorities, &options.allow)?,
            None => WebPkiClientVerifier::no_client_auth(),
        };
        let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| Error::unsupported(format!("TLS 1.3: {error}")))?
            .with_client_cert_verifier(clients)
            .with_single_cert(certificates, key)
            .map_err(|error| folder.key_error(&error))?;
        Ok(Self { required: options.required, config: Arc::new(without_sessions(config)) })
    }

    /// Which clients are told to use it.
    pub fn mode(&self) -> Tls {
        if self.required { Tls::Required } else { Tls::Allowed }
    }

    /// The server's end of a connection that has just come to TLS.
    pub fn connection(&self) -> std::result::Result<ServerConnection, rustls::Error> {
        ServerConnection::new(Arc::clone(&self.config))
    }
}

/// Why a connection ended inside TLS.
pub fn in_words(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure) => {
            "no name of the client's certificate is in --tls-allow".into()
        }
        rustls::Error::InvalidCertificate(error) => format!("the client's certificate: {error}"),
        rustls::Error::NoCertificatesPresented => "the client showed no certificate".into(),
        error => error.to_string(),
    }
}

/// Clients that the authorities vouch for, and that were not taken back.
fn verifier(folder: &Folder, authorities: RootCertStore, allow: &[String]) -> Result<Arc<dyn ClientCertVerifier>> {
    let authorities = Arc::new(authorities);
    let builder = WebPkiClientVerifier::builder_with_provider(authorities, Arc::new(default_provider()))
        // A list speaks for its own authority alone.
        .with_crls(folder.revocations()?)
        .allow_unknown_revocation_status();
    let known = builder.build().map_err(|error| folder.authority_error(&error))?;
    Ok(match allow {
        [] => known,
        names => Arc::new(Allowed::new(known, names)),
    })
}

fn without_sessions(mut config: ServerConfig) -> ServerConfig {
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config
}
