//! A client's side: whom it trusts, whom it means to reach, and who it is where it is asked.
use super::folder::{AUTHORITIES, CLIENT, Folder};
use super::stream::Tls;
use formats::error::{Error, Result};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::ring::default_provider;
use rustls::{AlertDescription, CertificateError, ClientConfig, ClientConnection};
use rustls_pki_types::ServerName;
use std::path::Path;
use std::sync::Arc;

/// What a client needs to speak TLS with one server.
#[derive(Debug)]
pub struct ClientCredentials {
    folder: Folder,
    config: Arc<ClientConfig>,
    /// Whom the server's certificate has to be for.
    server: ServerName<'static>,
    has_certificate: bool,
}

impl ClientCredentials {
    /// Those of a folder, each file looked at, for the server of this name or address.
    pub fn open(folder: &Path, server: &str) -> Result<Self> {
        if !folder.is_dir() {
            return Err(Error::invalid(format!(
                "{}: there is no folder of certificates ({AUTHORITIES}, client-cert.pem, client-key.pem): make it, or \
                 name another one by tls-certificates=DIR",
                folder.display()
            )));
        }
        let name = ServerName::try_from(server.to_owned()).map_err(|_| {
            let why =
                format!("no certificate can be for {server:?}: name whom the server's is for, by tls-hostname=NAME");
            Error::invalid(why)
        })?;
        let folder = Folder::new(folder, CLIENT);
        let authorities = folder.authorities(true)?.expect("needed, so there");
        let own = folder.own_if_any()?;
        if let Some((certificates, _)) = &own {
            folder.examine(certificates, Some(&authorities))?;
        }
        let provider = Arc::new(default_provider());
        let servers = WebPkiServerVerifier::builder_with_provider(Arc::new(authorities), Arc::clone(&provider))
            // A list speaks for its own authority alone.
            .with_crls(folder.revocations()?)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|error| folder.authority_error(&error))?;
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| Error::unsupported(format!("TLS 1.3: {error}")))?
            .with_webpki_verifier(servers);
        let has_certificate = own.is_some();
        let mut config = match own {
            None => config.with_no_client_auth(),
            Some((certificates, key)) => {
                config.with_client_auth_cert(certificates, key).map_err(|error| folder.key_error(&error))?
            }
        };
        config.resumption = Resumption::disabled();
        Ok(Self { folder, config: Arc::new(config), server: name, has_certificate })
    }

    /// The client's end of a connection that has just come to TLS.
    pub fn connection(&self) -> std::result::Result<Tls, rustls::Error> {
        ClientConnection::new(Arc::clone(&self.config), self.server.clone()).map(Tls::new)
    }

    /// Why a connection ended inside TLS.
    pub fn in_words(&self, error: &rustls::Error) -> String {
        use AlertDescription::{
            AccessDenied, BadCertificate, CertificateExpired, CertificateRequired, CertificateRevoked,
            CertificateUnknown, ProtocolVersion, UnknownCA, UnsupportedCertificate,
        };
        let words = match error {
            rustls::Error::InvalidCertificate(error) => self.about_server(error),
            rustls::Error::AlertReceived(CertificateRequired) if !self.has_certificate => self.turned_away(),
            rustls::Error::AlertReceived(
                alert @ (AccessDenied
                | BadCertificate
                | CertificateExpired
                | CertificateRequired
                | CertificateRevoked
                | CertificateUnknown
                | UnknownCA
                | UnsupportedCertificate),
            ) => format!("{} (it says {alert:?})", self.turned_away()),
            rustls::Error::AlertReceived(ProtocolVersion) | rustls::Error::PeerIncompatible(_) => {
                format!("the server does not speak TLS 1.3 as we do ({error})")
            }
            error => error.to_string(),
        };
        format!("TLS: {words}")
    }

    /// What a server may mean that ends a connection as soon as it knows who we are.
    pub fn turned_away(&self) -> String {
        let own = self.folder.own_path();
        match self.has_certificate {
            true => format!("the server does not let in who shows {}", own.display()),
            false => format!(
                "the server wants a client's certificate, and there is none: put it at {}, and its key beside it",
                own.display()
            ),
        }
    }

    fn about_server(&self, error: &CertificateError) -> String {
        let words = format!("the server's certificate: {error}");
        match error {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                let authorities = self.folder.path(AUTHORITIES);
                format!("the server's certificate is signed by no authority of {}", authorities.display())
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                format!("{words}; where that is the right server, say tls-hostname=NAME")
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                format!("{words}; the server needs a new one")
            }
            _ => words,
        }
    }
}
