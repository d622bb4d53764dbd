//! Certificates for tests, by a library that is not ours: an authority, and folders laid out as QEMU's.
#![allow(dead_code, reason = "each test uses its own part of this")]

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber, date_time_ymd,
};
use std::fs;
use std::path::Path;

/// Who signs certificates.
pub struct Authority {
    certificate: Certificate,
    key: KeyPair,
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let mut params = params(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key");
        Self { certificate: params.self_signed(&key).expect("a certificate"), key }
    }

    /// A certificate and its key, in PEM. Without a change it is for servers and for clients, today.
    pub fn issue(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> (String, String) {
        let mut params = params(name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.certificate, &self.key).expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    }

    /// Its own certificate, in PEM.
    pub fn pem(&self) -> String {
        self.certificate.pem()
    }

    /// A list that takes back the certificate of this number, in PEM.
    pub fn take_back(&self, serial: u64) -> String {
        let revoked = RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(2124, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.certificate, &self.key).expect("a list");
        list.pem().expect("PEM")
    }

    /// A server's folder, for `localhost`.
    pub fn server_folder(&self, folder: &Path) {
        let (certificate, key) = self.issue("the server", |params| {
            params.subject_alt_names =
                CertificateParams::new(["localhost".to_owned()]).expect("a name").subject_alt_names;
        });
        self.folder(folder, "server", &certificate, &key);
    }

    /// The folder of a client whose common name is `name`.
    pub fn client_folder(&self, folder: &Path, name: &str) {
        let (certificate, key) = self.issue(name, |_| {});
        self.folder(folder, "client", &certificate, &key);
    }

    pub fn folder(&self, folder: &Path, whose: &str, certificate: &str, key: &str) {
        fs::create_dir_all(folder).expect("a folder");
        let put = |file: String, text: &str| fs::write(folder.join(file), text).expect("a file");
        put("ca-cert.pem".into(), &self.pem());
        put(format!("{whose}-cert.pem"), certificate);
        put(format!("{whose}-key.pem"), key);
    }
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::OrganizationName, "blkmirror's tests");
    params.distinguished_name.push(DnType::CommonName, name);
    params
}
