//! Addresses as tables, and names that nobody would write.
use super::{Address, Server, TlsNames};
use proptest::option::of;
use proptest::prelude::{prop_oneof, proptest};
use proptest::strategy::Strategy;

fn tcp(host: &str, port: u16, export: &str) -> Address {
    let server = Server::Tcp { host: host.into(), port };
    Address { server, export: export.into(), tls: None }
}

fn unix(path: &str, export: &str) -> Address {
    Address { server: Server::Unix { path: path.into() }, export: export.into(), tls: None }
}

#[test]
fn addresses_are_read_in_both_manners() {
    for (name, wanted) in [
        ("nbd://host", tcp("host", 10809, "")),
        ("nbd://host/", tcp("host", 10809, "")),
        ("nbd://host:/x", tcp("host", 10809, "x")),
        ("nbd://host:1/x", tcp("host", 1, "x")),
        ("nbd://10.0.0.1:65535/a/b", tcp("10.0.0.1", 65535, "a/b")),
        ("nbd://host//x", tcp("host", 10809, "/x")),
        ("nbd://host/../x", tcp("host", 10809, "../x")),
        ("nbd://[::1]/x", tcp("::1", 10809, "x")),
        ("nbd://[fe80::1]:7/x%20y", tcp("fe80::1", 7, "x y")),
        ("nbd://host/%C3%BC%2f%25", tcp("host", 10809, "ü/%")),
        ("nbd+unix:///?socket=/s", unix("/s", "")),
        ("nbd+unix://?socket=s", unix("s", "")),
        ("nbd+unix:///disk%3F?socket=/tmp/a%20b", unix("/tmp/a b", "disk?")),
        ("nbd:host:1", tcp("host", 1, "")),
        ("nbd:host:1:exportname=a:b=c", tcp("host", 1, "a:b=c")),
        ("nbd:[::1]:1:exportname=x", tcp("::1", 1, "x")),
        ("nbd:unix:/s", unix("/s", "")),
        ("nbd:unix:/a:b:exportname=x%20y", unix("/a:b", "x%20y")),
    ] {
        assert_eq!(Address::parse(name).ok(), Some(wanted), "{name}");
    }
}

#[test]
fn addresses_inside_tls_name_certificates_and_whom_they_are_for() {
    let names = |certificates: Option<&str>, hostname: Option<&str>| {
        Some(TlsNames { certificates: certificates.map(str::to_owned), hostname: hostname.map(str::to_owned) })
    };
    for (name, server, tls) in [
        ("nbds://host/x", tcp("host", 10809, "x"), names(None, None)),
        ("nbds://host/x?tls-certificates=/a%20b", tcp("host", 10809, "x"), names(Some("/a b"), None)),
        ("nbds://[::1]:7/x?tls-hostname=::1&", tcp("::1", 7, "x"), names(None, Some("::1"))),
        ("nbds://host/?tls-type=x509&tls-verify-peer=1", tcp("host", 10809, ""), names(None, None)),
        ("nbds+unix:///x?socket=/s", unix("/s", "x"), names(None, None)),
        (
            "nbds+unix:///x?tls-hostname=there&tls-certificates=c&socket=/s",
            unix("/s", "x"),
            names(Some("c"), Some("there")),
        ),
    ] {
        let address = Address::parse(name).expect(name);
        assert_eq!(address.place(), server.to_string(), "one export, however it is reached");
        assert_eq!(address, Address { tls, ..server }, "{name}");
    }
}

#[test]
fn what_is_no_address_is_refused_with_a_reason() {
    for (name, reason) in [
        ("nbd:", "port is missing"),
        ("nbd::1", "no host's name"),
        ("nbd:host", "port is missing"),
        ("nbd:host:x", "no port"),
        ("nbd:host:+1", "no port"),
        ("nbd:unix:", "no socket's path"),
        ("nbd://", "no host's name"),
        ("nbd:///x", "no host's name"),
        ("nbd://host:0/x", "port 0"),
        ("nbd://host:65536/x", "no port"),
        ("nbd://user@host/x", "user's name"),
        ("nbd://[::1/x", "bracket is not closed"),
        ("nbd://[::1]x/x", "follows a bracket"),
        ("nbd://host/%", "% without"),
        ("nbd://host/%+1", "% without"),
        ("nbd://host/%ff", "UTF-8"),
        ("nbd://host/%00", "NUL"),
        ("nbd://host/x#y", "fragment"),
        ("nbd://host/x?socket=/s", "no place here"),
        ("nbd://host/x?y=1", "\"y\" is not supported"),
        ("nbd://host/x?tls-certificates=/c", "belongs to nbds:"),
        ("nbd+unix:///x?socket=/s&tls-verify-peer=1", "belongs to nbds:"),
        ("nbds://host/x?tls-type=psk", "tls-type=psk is not supported"),
        ("nbds://host/x?tls-verify-peer=0", "always verified"),
        ("nbds://host/x?tls-verify-peer=false", "always verified"),
        ("nbds://host/x?tls-psk-file=/k", "\"tls-psk-file\" is not supported"),
        ("nbds://host/x?tls-certificates=", "no folder's path"),
        ("nbds://host/x?tls-certificates=/c%00", "no folder's path"),
        ("nbds://host/x?tls-hostname=a%20b", "no host's name"),
        ("nbds://host/x?tls-hostname=", "no host's name"),
        ("nbds://host/x?tls-hostname=a&tls-hostname=b", "\"tls-hostname\" is there twice"),
        ("nbd+unix:///x", "?socket=PATH"),
        ("nbd+unix://host/x?socket=/s", "no host"),
        ("nbd+unix:///x?socket=/s&socket=/t", "twice"),
        ("nbd+unix:///x?socket=", "no socket's path"),
        ("nbd+vsock://1/x", "no NBD address"),
        ("http://host/x", "no NBD address"),
    ] {
        let error = Address::parse(name).expect_err(name).one_line();
        assert!(error.contains(reason) && error.contains(&format!("{name:?}")), "{name}: {error}");
    }
    assert!(Server::unix("x".repeat(108)).is_err() && Server::unix("x".repeat(107)).is_ok());
    let server = Server::unix("/s").expect("a path");
    assert!(Address::new(server.clone(), "x".repeat(4097)).is_err() && Address::new(server, "x".repeat(4096)).is_ok());
}

fn addresses() -> impl Strategy<Value = Address> {
    let host = prop_oneof!["[a-z0-9.-]{1,40}", "[0-9a-f]{0,4}:[0-9a-f:]{1,20}"];
    let server = prop_oneof![
        (host, 1..=u16::MAX).prop_map(|(host, port)| Server::Tcp { host, port }),
        "[^\0]{1,26}".prop_map(|path| Server::Unix { path }),
    ];
    let names = (of("[^\0]{1,20}"), of("[a-z0-9.-]{1,20}"))
        .prop_map(|(certificates, hostname)| TlsNames { certificates, hostname });
    (server, "[^\0]{0,60}", of(names)).prop_map(|(server, export, tls)| Address { server, export, tls })
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(address in addresses()) {
        let written = address.to_string();
        assert!(Address::is_named_by(&written));
        assert_eq!(Address::parse(&written).ok(), Some(address), "{}", written);
    }

    /// What can be read is what its own writing says.
    #[test]
    fn any_text_is_an_address_or_an_error(text in "(nbds?(\\+unix)?://?)?[-a-z0-9:/?#=&%@.\\[\\]ü\0]{0,40}([?&](socket|tls-(certificates|hostname|type|verify-peer))=[a-z1/%]{0,9}){0,3}") {
        if let Ok(address) = Address::parse(&text) {
            assert_eq!(Address::parse(&address.to_string()).ok(), Some(address));
        }
    }
}
