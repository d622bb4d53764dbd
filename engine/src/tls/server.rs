//! A server's side: who it is, and which clients may come in.
use super::allowed::Allowed;
use super::folder::{Folder, SERVER};
use super::stream::Tls;
use crate::control::options::TlsOptions;
use formats::error::{Error, Result};
use formats::nbd;
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
        let folder = Folder::new(&options.certificates, SERVER);
        let authorities = folder.authorities(options.verify_peer)?;
        let certificates = folder.own_certificates()?;
        folder.examine(&certificates, authorities.as_ref())?;
        let key = folder.own_key()?;
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
    pub fn mode(&self) -> nbd::Tls {
        if self.required { nbd::Tls::Required } else { nbd::Tls::Allowed }
    }

    /// The server's end of a connection that has just come to TLS.
    pub fn connection(&self) -> std::result::Result<Tls, rustls::Error> {
        ServerConnection::new(Arc::clone(&self.config)).map(Tls::new)
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
