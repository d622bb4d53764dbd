//! The files of a certificate folder, and what can be wrong with them, in words.
use formats::error::{Context, Error, Result};
use rustls::RootCertStore;
use rustls::server::VerifierBuilderError;
use rustls_pki_types::pem::{Error as PemError, PemObject};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};
use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage, anchor_from_trusted_cert};

pub const AUTHORITIES: &str = "ca-cert.pem";
const REVOCATIONS: &str = "ca-crl.pem";

/// Whose certificate and key are in a folder.
#[derive(Debug)]
pub struct Owner {
    whose: &'static str,
    certificate: &'static str,
    key: &'static str,
    usage: fn() -> KeyUsage,
}

pub const SERVER: Owner =
    Owner { whose: "server", certificate: "server-cert.pem", key: "server-key.pem", usage: KeyUsage::server_auth };
pub const CLIENT: Owner =
    Owner { whose: "client", certificate: "client-cert.pem", key: "client-key.pem", usage: KeyUsage::client_auth };

/// A certificate with those between it and its authority, and its private key.
pub type Own = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// A folder laid out as QEMU's.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    owner: Owner,
}

impl Folder {
    /// At this path, as its owner sees it.
    pub fn new(path: &Path, owner: Owner) -> Self {
        Self { path: path.to_owned(), owner }
    }

    /// Our certificate, those between it and its authority, and its key; nothing, where neither is there.
    pub fn own_if_any(&self) -> Result<Option<Own>> {
        match self.path(self.owner.certificate).exists() || self.path(self.owner.key).exists() {
            true => Ok(Some((self.own_certificates()?, self.own_key()?))),
            false => Ok(None),
        }
    }

    /// Who signs certificates; nobody, where none is needed and the file is not there.
    pub fn authorities(&self, needed: bool) -> Result<Option<RootCertStore>> {
        if !needed && !self.path(AUTHORITIES).exists() {
            return Ok(None);
        }
        let mut authorities = RootCertStore::empty();
        for certificate in self.certificates(AUTHORITIES)? {
            authorities.add(certificate).map_err(|error| self.wrong(AUTHORITIES, error))?;
        }
        Ok(Some(authorities))
    }

    /// Our certificate, and those between it and its authority.
    pub fn own_certificates(&self) -> Result<Vec<CertificateDer<'static>>> {
        self.certificates(self.owner.certificate)
    }

    /// Its private key.
    pub fn own_key(&self) -> Result<PrivateKeyDer<'static>> {
        let file = self.owner.key;
        let text = self.read(file)?;
        PrivateKeyDer::from_pem_slice(&text).map_err(|error| match error {
            PemError::NoItemsFound => self.wrong(file, "there is no private key in it, or one with a passphrase"),
            error => self.wrong(file, error),
        })
    }

    /// What the authorities took back; nothing, where the file is not there.
    pub fn revocations(&self) -> Result<Vec<CertificateRevocationListDer<'static>>> {
        if !self.path(REVOCATIONS).exists() {
            return Ok(Vec::new());
        }
        self.all(REVOCATIONS, "revocation list")
    }

    /// Finds what our peers would find wrong with our certificate: that it is not of this time, not made for
    /// its owner, or not of these authorities.
    pub fn examine(&self, certificates: &[CertificateDer<'_>], authorities: Option<&RootCertStore>) -> Result<()> {
        let wrong = |error: webpki::Error| self.wrong(self.owner.certificate, self.owner.in_words(&error));
        let certificate = EndEntityCert::try_from(&certificates[0]).map_err(wrong)?;
        let itself;
        let anchors = match authorities {
            Some(authorities) => &authorities.roots[..],
            None => {
                itself = [anchor_from_trusted_cert(&certificates[0]).map_err(wrong)?];
                &itself
            }
        };
        let (now, usage) = (UnixTime::now(), (self.owner.usage)());
        let found =
            certificate.verify_for_usage(ALL_VERIFICATION_ALGS, anchors, &certificates[1..], now, usage, None, None);
        match found {
            // Whom our peers trust is not known here.
            Err(webpki::Error::UnknownIssuer) if authorities.is_none() => Ok(()),
            found => found.map(drop).map_err(wrong),
        }
    }

    /// What is wrong with certificate and key together.
    pub fn key_error(&self, error: &rustls::Error) -> Error {
        match error {
            rustls::Error::InconsistentKeys(_) => {
                self.wrong(self.owner.key, format!("it is not the key of {}", self.owner.certificate))
            }
            error => self.wrong(self.owner.key, error),
        }
    }

    /// What is wrong with authorities and revocation lists together.
    pub fn authority_error(&self, error: &VerifierBuilderError) -> Error {
        match error {
            VerifierBuilderError::InvalidCrl(error) => {
                self.wrong(REVOCATIONS, format!("no revocation list of use: {error:?}"))
            }
            error => self.wrong(AUTHORITIES, error),
        }
    }

    fn certificates(&self, file: &str) -> Result<Vec<CertificateDer<'static>>> {
        match self.all(file, "certificate")? {
            none if none.is_empty() => Err(self.wrong(file, "there is no certificate in it")),
            some => Ok(some),
        }
    }

    fn all<T: PemObject>(&self, file: &str, what: &str) -> Result<Vec<T>> {
        let text = self.read(file)?;
        let all = T::pem_slice_iter(&text).collect::<std::result::Result<_, _>>();
        all.map_err(|error| self.wrong(file, format!("no {what} in PEM: {error}")))
    }

    fn read(&self, file: &str) -> Result<Vec<u8>> {
        let path = self.path(file);
        fs::read(&path).context(|| format!("{}: reading it for TLS", path.display()))
    }

    /// Where this file of it is.
    pub fn path(&self, file: &str) -> PathBuf {
        self.path.join(file)
    }

    /// Where our certificate is, or would be.
    pub fn own_path(&self) -> PathBuf {
        self.path(self.owner.certificate)
    }

    fn wrong(&self, file: &str, why: impl Display) -> Error {
        Error::invalid(format!("{}: {why}", self.path(file).display()))
    }
}

impl Owner {
    fn in_words(&self, error: &webpki::Error) -> String {
        let whose = self.whose;
        match error {
            webpki::Error::CertExpired { .. } => "the certificate has expired: have a new one signed".into(),
            webpki::Error::CertNotValidYet { .. } => "the certificate is not valid yet: is the clock right?".into(),
            webpki::Error::UnknownIssuer => format!("no authority of {AUTHORITIES} signed it"),
            webpki::Error::CaUsedAsEndEntity => format!("it is an authority's certificate, not a {whose}'s"),
            webpki::Error::RequiredEkuNotFoundContext(_) => {
                format!("it is not made for a {whose} (extended key usage)")
            }
            error => error.to_string(),
        }
    }
}
