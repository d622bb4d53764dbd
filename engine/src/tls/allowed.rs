//! Which clients may come in, of those that an authority vouches for: an allow list of names.
//!
//! A client's names are the common name in its certificate's subject and the DNS names beside it. They are
//! compared whole, letter by letter: `*` is a letter too.
use rustls::client::danger::HandshakeSignatureValid;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::sync::Arc;
use webpki::EndEntityCert;

/// Clients with one of these names.
#[derive(Debug)]
pub struct Allowed {
    known: Arc<dyn ClientCertVerifier>,
    names: Vec<String>,
}

impl Allowed {
    /// Those among `known`.
    pub fn new(known: Arc<dyn ClientCertVerifier>, names: &[String]) -> Self {
        Self { known, names: names.to_vec() }
    }

    fn is_allowed(&self, certificate: &CertificateDer<'_>) -> bool {
        let Ok(certificate) = EndEntityCert::try_from(certificate) else { return false };
        let allowed = |name: &str| self.names.iter().any(|allowed| allowed == name);
        certificate.valid_dns_names().any(allowed) || common_name(certificate.subject()).is_some_and(allowed)
    }
}

impl ClientCertVerifier for Allowed {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.known.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.known.verify_client_cert(certificate, intermediates, now)?;
        match self.is_allowed(certificate) {
            true => Ok(verified),
            false => Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.known.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.known.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.known.supported_verify_schemes()
    }
}

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OBJECT_IDENTIFIER: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;
/// `id-at-commonName`, 2.5.4.3.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

/// The last common name of a subject (X.501's RDNSequence in DER, without its own header). The last is the
/// most special, as X.500 has it; a name in any other alphabet than UTF-8's is none.
pub(super) fn common_name(mut subject: &[u8]) -> Option<&str> {
    let mut name = None;
    while !subject.is_empty() {
        let mut set = element(&mut subject, SET)?;
        while !set.is_empty() {
            let mut attribute = element(&mut set, SEQUENCE)?;
            if element(&mut attribute, OBJECT_IDENTIFIER)? == COMMON_NAME {
                let tag = *attribute.first().filter(|tag| [UTF8_STRING, PRINTABLE_STRING].contains(tag))?;
                name = Some(std::str::from_utf8(element(&mut attribute, tag)?).ok()?);
            }
        }
    }
    name
}

/// Takes one element off the front of `bytes`: what is in it, where its tag is `tag`. DER has lengths in the
/// shortest form; names are shorter than 64 KiB.
fn element<'a>(bytes: &mut &'a [u8], tag: u8) -> Option<&'a [u8]> {
    let (len, head) = match **bytes {
        [found, len @ ..=0x7f, ..] if found == tag => (usize::from(len), 2),
        [found, 0x81, len, ..] if found == tag => (usize::from(len), 3),
        [found, 0x82, high, low, ..] if found == tag => (usize::from(u16::from_be_bytes([high, low])), 4),
        _ => return None,
    };
    let content = bytes.get(head..head + len)?;
    *bytes = &bytes[head + len..];
    Some(content)
}
