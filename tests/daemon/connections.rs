//! Connections by the hundred and by the thousand, and clients that have no manners.
//!
//! Held here: hundreds are served at a time; thousands that came and went leave no descriptor, no thread and no memory
//! behind; whoever is silent, deaf or talks nonsense loses its own connection and disturbs nobody; what a client that is
//! gone had under way ends before its successor begins.

use crate::support::daemon::Daemon;
use crate::support::images;
use crate::support::nbd::{Client, Replies, Request};
use crate::support::server::Server;
use crate::support::{PATIENCE, assert_same, eventually, folder};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

const DISK_LEN: u64 = 16 << 20;
/// Connections at a time.
const AT_A_TIME: u64 = 300;
/// Descriptors of a connection: its socket, and what wakes it. Those of the threads come to less than another one each.
const FEW: usize = 3;
/// Connections one after the other.
const RECONNECTS: usize = 2000;
/// What a process's memory may grow by for no reason of ours, in bytes: allocators keep some.
const GROWTH_MAX: u64 = 16 << 20;

fn serve(folder: &Path) -> Daemon {
    let disk = folder.join("disk.qcow2");
    images::create(&disk, "qcow2", DISK_LEN, &[]);
    Daemon::serve(folder, &[format!("vda={},format=qcow2", disk.display())])
}

#[track_caller]
fn connect(daemon: &Daemon) -> Client {
    Client::connect(&daemon.socket(), "vda", Replies::Structured).expect("an NBD connection")
}

/// What the daemon holds of the system.
#[derive(Clone, Copy, Debug)]
struct Holds {
    descriptors: usize,
    threads: u64,
    memory: u64,
}

impl Holds {
    fn of(daemon: &Daemon) -> Self {
        let process = Path::new("/proc").join(daemon.pid().to_string());
        let status = std::fs::read_to_string(process.join("status")).expect("a process of ours");
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a line of /proc/PID/status");
            line.split_whitespace().next().and_then(|word| word.parse::<u64>().ok()).expect("a number")
        };
        Self {
            descriptors: std::fs::read_dir(process.join("fd")).expect("a process of ours").count(),
            threads: number("Threads:"),
            memory: number("VmRSS:") << 10,
        }
    }

    /// Waits until the daemon holds no more than before.
    #[track_caller]
    fn come_back(self, daemon: &Daemon) {
        let begun = Instant::now();
        loop {
            // Threads that are over are let go of when the next client comes.
            connect(daemon).ask(&Request::Flush);
            let now = Self::of(daemon);
            // That client's own may not be gone yet.
            let same = now.descriptors <= self.descriptors + 8 && now.threads <= self.threads + 2;
            if same && now.memory <= self.memory + GROWTH_MAX {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "before: {self:?}, now: {now:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A client that says what it likes: connected, and greeted.
fn stream(daemon: &Daemon) -> UnixStream {
    let mut stream = UnixStream::connect(daemon.socket()).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    stream.read_exact(&mut [0; 18]).expect("the greeting");
    stream.write_all(&3_u32.to_be_bytes()).expect("a server that listens");
    stream
}

/// EXPORT_NAME, which is answered by ten bytes.
fn named(daemon: &Daemon) -> UnixStream {
    let mut stream = stream(daemon);
    stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x03vda").expect("a server that listens");
    stream
}

/// What has simple replies only.
fn request(command: u16, at: u64, len: u32) -> Vec<u8> {
    let words = [0x2560_9513_u32.to_be_bytes(), u32::from(command).to_be_bytes()].concat();
    [words, 7_u64.to_be_bytes().to_vec(), at.to_be_bytes().to_vec(), len.to_be_bytes().to_vec()].concat()
}

/// The server closes the connection, at last.
#[track_caller]
fn assert_ended(mut stream: UnixStream) {
    match stream.read_to_end(&mut Vec::new()) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
    }
}

#[test]
fn hundreds_are_served_at_a_time() {
    let folder = folder();
    let mut daemon = serve(folder.path());
    connect(&daemon).ask(&Request::Flush);
    let first = Holds::of(&daemon);
    let round = || {
        let mut clients: Vec<Client> = (0..AT_A_TIME).map(|_| connect(&daemon)).collect();
        let bytes = |number: u64| vec![number as u8; 4096];
        for (number, client) in (0..).zip(&mut clients) {
            client.send(&Request::Write { at: number * 4096, bytes: bytes(number) });
        }
        for client in &mut clients {
            client.receive().expect("an answer").result.expect("a write that is done");
        }
        // Each reads what its neighbour wrote.
        for (number, client) in (0..).zip(&mut clients) {
            let next = (number + 1) % AT_A_TIME;
            let found = client.ask(&Request::Read { at: next * 4096, len: 4096 });
            assert_same(&format!("client {number}"), &found, &bytes(next));
        }
        let processors = std::thread::available_parallelism().expect("a system that knows").get() as u64;
        eventually("threads are those of the disk alone", || {
            let now = Holds::of(&daemon);
            (now.threads <= first.threads + processors && now.descriptors <= first.descriptors + FEW * clients.len())
                .then_some(())
        });
    };
    round();
    // Small pieces of memory are the allocator's to keep, for the next ones.
    Holds { memory: Holds::of(&daemon).memory, ..first }.come_back(&daemon);
    let before = Holds::of(&daemon);
    round();
    before.come_back(&daemon);
    daemon.stop();
}

#[test]
fn thousands_that_came_and_went_leave_nothing() {
    let folder = folder();
    let mut daemon = serve(folder.path());
    let come_and_go = |number: usize| match number % 6 {
        0 => drop(connect(&daemon).ask(&Request::Write { at: 4096, bytes: vec![1; 4096] })),
        1 => drop(connect(&daemon).ask(&Request::Read { at: 0, len: 65_536 })),
        2 => drop(UnixStream::connect(daemon.socket()).expect("a connection")),
        3 => drop(stream(&daemon)),
        4 => drop(named(&daemon)),
        _ => {
            let mut stream = named(&daemon);
            stream.write_all(&[0xff; 28]).expect("a server that listens");
            assert_ended(stream);
        }
    };
    (0..RECONNECTS / 10).for_each(come_and_go);
    let before = Holds::of(&daemon);
    (0..RECONNECTS).for_each(come_and_go);
    before.come_back(&daemon);
    daemon.stop();
}

/// It has 10 s to choose an export.
#[test]
fn who_is_silent_in_the_handshake_is_dropped() {
    let folder = folder();
    let mut daemon = serve(folder.path());
    let begun = Instant::now();
    let silent: Vec<UnixStream> = (0..20).map(|_| stream(&daemon)).collect();
    let mut half = stream(&daemon);
    half.write_all(b"IHAVEOPT\0\0\0\x07\0\0\xff\xff").expect("a server that listens");
    let mut polite = connect(&daemon);
    assert!(silent.iter().all(|stream| stream.set_nonblocking(true).is_ok()));
    for mut stream in &silent {
        let heard = stream.read(&mut [0]).map_err(|error| error.kind());
        assert!(heard == Err(ErrorKind::WouldBlock) || begun.elapsed() > Duration::from_secs(9), "so soon: {heard:?}");
    }
    assert!(silent.iter().all(|stream| stream.set_nonblocking(false).is_ok()));
    silent.into_iter().chain([half]).for_each(assert_ended);
    // Who is served may be silent for as long as it likes.
    polite.ask(&Request::Flush);
    daemon.stop();
}

/// Its requests wait in its own socket: what it is given has a bound.
#[test]
fn who_never_takes_its_replies_costs_its_share_and_disturbs_nobody() {
    const SHARE: u64 = 64 << 20;
    let folder = folder();
    let mut daemon = serve(folder.path());
    let mut polite = connect(&daemon);
    polite.ask(&Request::Write { at: 0, bytes: vec![5; 8 << 20] });
    let before = Holds::of(&daemon);
    let mut deaf = named(&daemon);
    deaf.set_write_timeout(Some(Duration::from_millis(500))).expect("a socket");
    // Until the server takes no more.
    let asked = (0..1_000_000).take_while(|_| deaf.write_all(&request(0, 0, 8 << 20)).is_ok()).count();
    assert!((8..1_000_000).contains(&asked), "{asked} requests were taken");
    let now = Holds::of(&daemon);
    assert!(now.memory <= before.memory + SHARE + GROWTH_MAX, "before: {before:?}, now: {now:?}");
    assert_same("another's read", &polite.ask(&Request::Read { at: 4096, len: 4096 }), &[5; 4096]);
    drop(deaf);
    before.come_back(&daemon);
    daemon.stop();
}

#[test]
fn nonsense_ends_the_connection_that_it_came_by_alone() {
    let folder = folder();
    let mut daemon = serve(folder.path());
    let mut polite = connect(&daemon);
    for number in 0..20 {
        let at = number * 65_536;
        polite.send(&Request::Write { at, bytes: vec![3; 65_536] });
        let mut rude = named(&daemon);
        rude.read_exact(&mut [0; 10]).expect("the export's size and flags");
        rude.write_all(&[&request(0, 0, 512), &[0; 28][..], &request(0, 0, 512)].concat()).expect("a socket");
        // The request before the nonsense is answered, the one behind it is none.
        rude.read_exact(&mut [0; 16 + 512]).expect("an answer");
        assert_ended(rude);
        let mut rude = stream(&daemon);
        rude.write_all(b"IHAVEOPTIHAVEOPT").expect("a server that listens");
        assert_ended(rude);
        polite.receive().expect("an answer").result.expect("a write that is done");
        assert_same("another's read", &polite.ask(&Request::Read { at, len: 512 }), &[3; 512]);
    }
    daemon.stop();
}

/// A write of the old connection is held below; the new one's write to the same place waits for it. Without that, the
/// old one would land last.
#[test]
fn what_a_gone_client_had_under_way_ends_before_its_successor_begins() {
    let folder = folder();
    let (disk, gate, ours) = (folder.path().join("disk.raw"), folder.path().join("gate"), folder.path().join("ours"));
    images::create(&disk, "raw", DISK_LEN, &[]);
    std::fs::create_dir(&ours).expect("a folder of ours");
    // Only the first write meets the gate: it makes it one of its own.
    let server = Server::gated_once(folder.path(), &disk, &gate);
    let mut daemon = Daemon::serve(&ours, &[format!("vda={},format=raw", server.uri(""))]);
    let mut old = connect(&daemon);
    old.send(&Request::Write { at: 0, bytes: vec![1; 4096] });
    let held = gate.with_extension("held");
    eventually("the old write is held", || held.exists().then_some(()));
    drop(old);
    let mut new = connect(&daemon);
    new.send(&Request::Write { at: 0, bytes: vec![2; 4096] });
    // Time enough to go wrong: an answer now would be too early.
    std::thread::sleep(Duration::from_millis(300));
    std::fs::write(&gate, "").expect("a folder of ours");
    new.receive().expect("an answer").result.expect("a write that is done");
    assert_same("the new client's read", &new.ask(&Request::Read { at: 0, len: 4096 }), &[2; 4096]);
    daemon.stop();
    drop(server);
    assert_same("the disk", &std::fs::read(&disk).expect("a file of ours")[..4096], &[2; 4096]);
}
