//! Folders as they should be, and as they should not; clients' names.
pub mod authority;

use super::allowed::common_name;
use super::{ClientCredentials, Credentials};
use crate::control::options::TlsOptions;
use authority::Authority;
use rcgen::{ExtendedKeyUsagePurpose, date_time_ymd};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::fs;
use std::path::Path;
use tempfile::TempDir;
use webpki::EndEntityCert;

fn options(folder: &Path) -> TlsOptions {
    TlsOptions { required: true, certificates: folder.to_owned(), verify_peer: true, allow: Vec::new() }
}

/// A good folder, changed; what is said of it.
#[track_caller]
fn said(change: impl FnOnce(&Path, &Authority)) -> String {
    let folder = TempDir::new().expect("a folder");
    let authority = Authority::new("the authority");
    authority.server_folder(folder.path());
    Credentials::open(&options(folder.path())).expect("a good folder");
    change(folder.path(), &authority);
    let error = Credentials::open(&options(folder.path())).expect_err("it is not good any more").one_line();
    let place = format!("{}/", folder.path().display());
    error.strip_prefix(&place).unwrap_or_else(|| panic!("no file is named: {error}")).to_owned()
}

/// The same, where the server has another certificate.
#[track_caller]
fn said_of(issue: impl FnOnce(&Authority) -> (String, String)) -> String {
    said(|folder, authority| {
        let (certificate, key) = issue(authority);
        authority.folder(folder, "server", &certificate, &key);
    })
}

#[test]
fn a_file_that_is_not_there_is_named() {
    for file in ["ca-cert.pem", "server-cert.pem", "server-key.pem"] {
        let said = said(|folder, _| fs::remove_file(folder.join(file)).expect("a file"));
        assert_eq!(said, format!("{file}: reading it for TLS: No such file or directory (os error 2)"));
    }
}

#[test]
fn a_file_with_something_else_in_it_is_named() {
    for (file, empty) in [
        ("ca-cert.pem", "there is no certificate in it"),
        ("server-cert.pem", "there is no certificate in it"),
        ("server-key.pem", "there is no private key in it, or one with a passphrase"),
    ] {
        assert_eq!(said(|folder, _| fs::write(folder.join(file), "x").expect("a file")), format!("{file}: {empty}"));
        let cut = "-----BEGIN CERTIFICATE-----\nMII";
        assert!(said(|folder, _| fs::write(folder.join(file), cut).expect("a file")).starts_with(&format!("{file}: ")));
        let wrong = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----\n";
        assert!(
            said(|folder, _| fs::write(folder.join(file), wrong).expect("a file")).starts_with(&format!("{file}: "))
        );
    }
    let list = "-----BEGIN X509 CRL-----\nMIIB\n-----END X509 CRL-----\n";
    let said = said(|folder, _| fs::write(folder.join("ca-crl.pem"), list).expect("a file"));
    assert!(said.starts_with("ca-crl.pem: no revocation list"), "{said}");
}

#[test]
fn a_certificate_that_clients_would_not_take_is_refused_at_once() {
    let expired = said_of(|authority| authority.issue("x", |params| params.not_after = date_time_ymd(2020, 1, 1)));
    assert_eq!(expired, "server-cert.pem: the certificate has expired: have a new one signed");
    let early = said_of(|authority| authority.issue("x", |params| params.not_before = date_time_ymd(2120, 1, 1)));
    assert_eq!(early, "server-cert.pem: the certificate is not valid yet: is the clock right?");
    let others = said_of(|_| Authority::new("another").issue("x", |_| {}));
    assert_eq!(others, "server-cert.pem: no authority of ca-cert.pem signed it");
    let clients = said_of(|authority| {
        authority.issue("x", |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth])
    });
    assert_eq!(clients, "server-cert.pem: it is not made for a server (extended key usage)");
    let authorities = said(|folder, _| {
        fs::copy(folder.join("ca-cert.pem"), folder.join("server-cert.pem")).expect("a file");
    });
    assert_eq!(authorities, "server-cert.pem: it is an authority's certificate, not a server's");
}

#[test]
fn a_key_of_another_certificate_is_refused() {
    let said = said_of(|authority| (authority.issue("x", |_| {}).0, authority.issue("x", |_| {}).1));
    assert_eq!(said, "server-key.pem: it is not the key of server-cert.pem");
}

#[test]
fn without_an_authority_anyone_is_served_but_not_by_an_expired_server() {
    let folder = TempDir::new().expect("a folder");
    let authority = Authority::new("the authority");
    authority.server_folder(folder.path());
    let options = TlsOptions { verify_peer: false, ..options(folder.path()) };
    fs::remove_file(folder.path().join("ca-cert.pem")).expect("a file");
    Credentials::open(&options).expect("no authority is needed");
    let (certificate, key) = authority.issue("x", |params| params.not_after = date_time_ymd(2020, 1, 1));
    authority.folder(folder.path(), "server", &certificate, &key);
    fs::remove_file(folder.path().join("ca-cert.pem")).expect("a file");
    let error = Credentials::open(&options).expect_err("it has expired").one_line();
    assert!(error.ends_with("server-cert.pem: the certificate has expired: have a new one signed"), "{error}");
    let allow = TlsOptions { allow: vec!["x".into()], ..options };
    let error = Credentials::open(&allow).expect_err("nobody has a name").one_line();
    assert!(error.contains("--tls-allow needs --tls-verify-peer yes"), "{error}");
}

#[test]
fn the_common_name_is_found_in_any_subject_and_in_no_other_bytes() {
    let (certificate, _) = Authority::new("the authority").issue("Zoë's disk", |_| {});
    let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).expect("PEM");
    let certificate = EndEntityCert::try_from(&certificate).expect("a certificate");
    let subject = certificate.subject();
    assert_eq!(common_name(subject), Some("Zoë's disk"));
    for len in 0..subject.len() {
        let cut = common_name(&subject[..len]);
        assert!(cut.is_none_or(|name| name == "Zoë's disk"), "cut at {len}: {cut:?}");
    }
    for at in 0..subject.len() {
        for byte in 0..=255 {
            let mut subject = subject.to_vec();
            subject[at] = byte;
            // Whatever it is: no panic, and nothing longer than what there is.
            assert!(common_name(&subject).is_none_or(|name| name.len() < subject.len()));
        }
    }
}

/// A good client's folder, changed; what is said of it.
#[track_caller]
fn said_to_client(change: impl FnOnce(&Path, &Authority)) -> String {
    let folder = TempDir::new().expect("a folder");
    let authority = Authority::new("the authority");
    authority.client_folder(folder.path(), "the client");
    ClientCredentials::open(folder.path(), "localhost").expect("a good folder");
    change(folder.path(), &authority);
    let error = ClientCredentials::open(folder.path(), "localhost").expect_err("it is not good any more").one_line();
    let place = folder.path().display().to_string();
    error.strip_prefix(&place).unwrap_or_else(|| panic!("the folder is not named: {error}")).to_owned()
}

#[test]
fn a_clients_folder_is_looked_at_as_a_servers() {
    let remove =
        |file: &'static str| said_to_client(move |folder, _| fs::remove_file(folder.join(file)).expect("a file"));
    for file in ["ca-cert.pem", "client-cert.pem", "client-key.pem"] {
        assert_eq!(remove(file), format!("/{file}: reading it for TLS: No such file or directory (os error 2)"));
    }
    let gone = said_to_client(|folder, _| fs::remove_dir_all(folder).expect("a folder"));
    assert!(gone.starts_with(": there is no folder of certificates (ca-cert.pem, client-cert.pem"), "{gone}");
    let of = |issue: fn(&Authority) -> (String, String)| {
        said_to_client(move |folder, authority| {
            let (certificate, key) = issue(authority);
            authority.folder(folder, "client", &certificate, &key);
        })
    };
    let expired = of(|authority| authority.issue("x", |params| params.not_after = date_time_ymd(2020, 1, 1)));
    assert_eq!(expired, "/client-cert.pem: the certificate has expired: have a new one signed");
    let others = of(|_| Authority::new("another").issue("x", |_| {}));
    assert_eq!(others, "/client-cert.pem: no authority of ca-cert.pem signed it");
    let servers = of(|authority| {
        authority.issue("x", |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth])
    });
    assert_eq!(servers, "/client-cert.pem: it is not made for a client (extended key usage)");
    let key = of(|authority| (authority.issue("x", |_| {}).0, authority.issue("x", |_| {}).1));
    assert_eq!(key, "/client-key.pem: it is not the key of client-cert.pem");
}

#[test]
fn a_client_needs_no_certificate_but_a_name_to_verify_its_server_by() {
    let folder = TempDir::new().expect("a folder");
    fs::write(folder.path().join("ca-cert.pem"), Authority::new("the authority").pem()).expect("a file");
    for name in ["localhost", "a.b.example", "10.0.0.1", "fe80::1"] {
        ClientCredentials::open(folder.path(), name).expect(name);
    }
    let error = ClientCredentials::open(folder.path(), "a:b").expect_err("no name").one_line();
    assert!(error.contains("no certificate can be for \"a:b\"") && error.contains("tls-hostname=NAME"), "{error}");
}
