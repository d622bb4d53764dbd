//! Clients inside TLS, by rustls' own client: cut anywhere, turned away, lied to.
use super::super::HANDSHAKE_MAX;
use super::{BTreeMap, DISC, Ending, FLUSH, Progress, READ, SIZE, Scene, Style, any_client, chosen, option, replies};
use super::{CONTEXTS, Done, Ordering, flag, reply, request, wire, write};
use crate::control::options::TlsOptions;
use crate::io::Op;
use crate::tls::Credentials;
use crate::tls::tests::authority::Authority;
use formats::nbd::handshake::Reason;
use rustls::crypto::ring::default_provider;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::sync::{Arc, OnceLock};
use tempfile::TempDir;

/// Keys are dear, so all tests have one authority.
fn authority() -> &'static Authority {
    static AUTHORITY: OnceLock<Authority> = OnceLock::new();
    AUTHORITY.get_or_init(|| Authority::new("the authority"))
}

fn credentials(required: bool, allow: &[&str], revoked: Option<u64>) -> Credentials {
    let folder = TempDir::new().expect("a folder");
    authority().server_folder(folder.path());
    if let Some(serial) = revoked {
        std::fs::write(folder.path().join("ca-crl.pem"), authority().take_back(serial)).expect("a file");
    }
    let allow = allow.iter().map(|name| (*name).to_owned()).collect();
    let options = TlsOptions { required, certificates: folder.path().to_owned(), verify_peer: true, allow };
    Credentials::open(&options).expect("a good folder")
}

/// A client that shows this certificate.
fn client(shown: Option<(String, String)>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    let root = CertificateDer::from_pem_slice(authority().pem().as_bytes()).expect("PEM");
    roots.add(root).expect("an authority");
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()));
    let config = config.with_safe_default_protocol_versions().expect("TLS 1.3").with_root_certificates(roots);
    Arc::new(match shown {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => {
            let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).expect("PEM");
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("PEM");
            config.with_client_auth_cert(vec![certificate], key).expect("they fit")
        }
    })
}

fn known() -> Arc<ClientConfig> {
    client(Some(authority().issue("a client", |_| {})))
}

/// A scene whose client was told to go on inside TLS.
fn told(seed: u64, credentials: Credentials) -> Scene {
    let mut scene = Scene::new(seed, SIZE).with_tls(credentials);
    scene.say(&[&3_u32.to_be_bytes()[..], &option(wire::opt::STARTTLS, b"")].concat());
    assert_eq!(scene.run(), Progress::Running);
    let heard = scene.heard();
    assert_eq!(heard[18..], ack());
    scene
}

fn ack() -> Vec<u8> {
    [&wire::OPTION_REPLY_MAGIC.to_be_bytes()[..], &[0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 0]].concat()
}

/// A scene that is inside TLS, its export chosen.
fn scene(seed: u64, style: Style) -> Scene {
    let mut scene = told(seed, credentials(seed.is_multiple_of(2), &[], None));
    assert_eq!(scene.start_tls(known()), Progress::Running);
    chosen(scene, style, &CONTEXTS)
}

#[test]
fn inside_tls_every_request_is_answered_rightly_however_it_is_cut() {
    for seed in 0..45 {
        let style = [Style::Simple, Style::Structured, Style::Extended][seed as usize % 3];
        any_client(scene(seed, style), seed, style);
    }
}

/// With its keys, and what was received of them.
#[test]
fn inside_tls_too_a_connection_goes_to_another_thread() {
    for seed in 0..30 {
        let style = [Style::Simple, Style::Structured, Style::Extended][seed as usize % 3];
        let mut scene = scene(seed, style);
        scene.rest_one_in = 3 + seed % 20;
        any_client(scene, seed, style);
    }
}

#[test]
fn what_is_said_in_plain_behind_starttls_is_never_obeyed() {
    // The export of who is on the way, instead of the client's.
    let behind = option(wire::opt::GO, b"\0\0\0\x03vda\0\0");
    for seed in 0..40 {
        let mut scene = Scene::new(seed, SIZE).with_tls(credentials(seed.is_multiple_of(2), &[], None));
        // With the request, or while the ACK is on its way.
        let together = seed % 4 < 2;
        scene.world.whole = together;
        scene.say(&3_u32.to_be_bytes());
        scene.run();
        scene.say(&option(wire::opt::STARTTLS, b""));
        if !together {
            scene.world.deaf = true;
            scene.run();
            scene.world.deaf = false;
        }
        scene.say(&behind);
        match scene.run() {
            Progress::Over(Ending::Handshake(Reason::BehindStartTls)) if together => {}
            Progress::Over(Ending::Tls(_)) if !together => {}
            other => panic!("seed {seed}: {other:?}"),
        }
        assert_eq!(scene.session.export(), None);
    }
}

#[test]
fn the_ack_goes_before_anything_is_received() {
    let mut scene = Scene::new(1, SIZE).with_tls(credentials(true, &[], None));
    scene.say(&3_u32.to_be_bytes());
    scene.run();
    scene.heard();
    scene.say(&option(wire::opt::STARTTLS, b""));
    scene.world.deaf = true;
    scene.run();
    assert_eq!((scene.world.under_way(Done::Send), scene.world.under_way(Done::Receive)), (1, 0));
    scene.world.deaf = false;
    scene.run();
    assert_eq!(scene.heard(), ack());
    assert_eq!(scene.world.under_way(Done::Receive), 1);
}

#[test]
fn only_clients_that_an_authority_and_the_list_know_come_in() {
    let issue = |name: &str, serial: u64, dns: &str| {
        client(Some(authority().issue(name, |params| {
            params.serial_number = Some(serial.into());
            params.subject_alt_names = vec![rcgen::SanType::DnsName(dns.try_into().expect("a name"))];
        })))
    };
    let expired = client(Some(authority().issue("one", |params| params.not_after = rcgen::date_time_ymd(2020, 1, 1))));
    let stranger = client(Some(Authority::new("the authority").issue("one", |_| {})));
    let refused = "no name of the client's certificate is in --tls-allow";
    for (who, allow, revoked, config, want) in [
        ("anyone", &[][..], None, issue("one", 1, "one.host"), None),
        ("by common name", &["two", "one"], None, issue("one", 1, "one.host"), None),
        ("by DNS name", &["one.host"], None, issue("one", 1, "one.host"), None),
        ("not in the list", &["two", "on", "one.hos"], None, issue("one", 1, "one.host"), Some(refused)),
        ("another was taken back", &[], Some(2), issue("one", 1, "one.host"), None),
        ("taken back", &[], Some(2), issue("one", 2, "one.host"), Some("the client's certificate: Revoked")),
        ("nobody", &[], None, client(None), Some("the client showed no certificate")),
        ("expired", &[], None, expired, Some("the client's certificate: certificate expired")),
        ("a stranger", &["one"], None, stranger, Some("the client's certificate: ")),
    ] {
        let mut scene = told(1, credentials(true, allow, revoked));
        scene.tls = None;
        let mut tls = rustls::ClientConnection::new(config, "localhost".try_into().expect("a name")).expect("a client");
        // It says its wish as soon as it can: nothing of it may be looked at before it is known.
        let progress = loop {
            let mut said = Vec::new();
            while tls.wants_write() {
                tls.write_tls(&mut said).expect("memory takes all");
            }
            scene.say(&said);
            let progress = scene.run();
            let heard = scene.heard();
            let mut heard = &heard[..];
            let mut alert = None;
            while !heard.is_empty() && alert.is_none() {
                tls.read_tls(&mut heard).expect("the client takes all");
                alert = tls.process_new_packets().err();
            }
            assert_eq!(alert.is_some(), want.is_some() && progress != Progress::Running, "{who}: {alert:?}");
            if progress != Progress::Running || (!tls.is_handshaking() && !tls.wants_write()) {
                break progress;
            }
        };
        match (want, progress) {
            (None, Progress::Running) => {}
            (Some(want), Progress::Over(Ending::Tls(said))) => assert!(said.starts_with(want), "{who}: {said}"),
            (want, progress) => panic!("{who}: {progress:?}, not {want:?}"),
        }
    }
}

#[test]
fn plain_options_behind_the_ack_end_the_connection() {
    let mut scene = told(1, credentials(false, &[], None));
    scene.say(&option(wire::opt::GO, b"\0\0\0\x03vda\0\0"));
    let Progress::Over(Ending::Tls(_)) = scene.run() else { panic!("it is no TLS") };
}

#[test]
fn a_client_that_stops_inside_the_handshake_is_dropped() {
    let mut scene = told(1, credentials(true, &[], None));
    scene.say(&[0x16, 3, 1]);
    assert_eq!(scene.run(), Progress::Running);
    scene.world.expired = true;
    assert_eq!(scene.run(), Progress::Over(Ending::Deadline), "within {HANDSHAKE_MAX:?}");
    let mut scene = told(2, credentials(true, &[], None));
    scene.world.hung_up = true;
    assert_eq!(scene.run(), Progress::Over(Ending::Gone));
}

#[test]
fn the_farewell_comes_after_the_last_reply() {
    for seed in 0..30 {
        let mut scene = scene(seed, Style::Structured);
        scene.world.disk_rests = true;
        scene.say(&write(0, 1, 0, &[7; 4096]));
        scene.say(&request(DISC, 0, 2, 0, 0));
        assert_eq!(scene.run(), Progress::Running);
        scene.world.disk_rests = false;
        assert_eq!(scene.run(), Progress::Over(Ending::Disconnected));
        assert_eq!(reply(&mut scene).error, 0);
        let tls = scene.tls.as_mut().expect("it is inside TLS");
        assert!(tls.process_new_packets().expect("right").peer_has_closed(), "seed {seed}: a close_notify");
    }
}

#[test]
fn a_client_that_says_farewell_ends_its_session() {
    let mut scene = scene(3, Style::Structured);
    scene.say(&request(FLUSH, 0, 1, 0, 0));
    scene.tls.as_mut().expect("it is inside TLS").send_close_notify();
    scene.say_tls();
    assert_eq!(scene.run(), Progress::Over(Ending::Gone));
    assert_eq!(reply(&mut scene).error, 0);
}

#[test]
fn a_stop_says_farewell() {
    let mut scene = scene(4, Style::Structured);
    scene.session.stop().store(true, Ordering::Release);
    scene.world.rung = true;
    assert_eq!(scene.run(), Progress::Over(Ending::Stopped));
    scene.heard();
    let tls = scene.tls.as_mut().expect("it is inside TLS");
    assert!(tls.process_new_packets().expect("right").peer_has_closed());
}

#[test]
fn what_is_encrypted_for_a_deaf_client_is_bounded() {
    let mut scene = scene(5, Style::Structured);
    scene.world.deaf = true;
    scene.world.whole = true;
    scene.say(&write(0, 99, 0, &vec![7; SIZE as usize]));
    (0..40).for_each(|cookie| scene.say(&request(READ, flag::DF, cookie, 0, SIZE as u32)));
    let mut sent_max = 0;
    for _ in 0..400 {
        scene.world.deaf = !scene.world.deaf;
        scene.step();
        for (_, op) in &scene.world.pending {
            if let Op::Send { gather, .. } = op {
                sent_max = sent_max.max(gather.remaining());
            }
        }
    }
    assert!((200 << 10..300 << 10).contains(&sent_max), "{sent_max} bytes encrypted at once");
    scene.world.deaf = false;
    scene.run();
    let replies = replies(&scene.heard(), &BTreeMap::new());
    assert_eq!(replies.len(), 41);
    assert!(replies.values().all(|reply| reply.error == 0));
}

#[test]
fn keys_change_under_way() {
    let mut scene = scene(6, Style::Structured);
    for cookie in 0..20 {
        scene.tls.as_mut().expect("it is inside TLS").refresh_traffic_keys().expect("TLS 1.3 can");
        scene.say(&write(0, cookie, 0, &[cookie as u8; 512]));
        assert_eq!(scene.run(), Progress::Running);
        assert_eq!(reply(&mut scene).error, 0);
        assert_eq!(scene.world.files[0][511], cookie as u8);
    }
}
