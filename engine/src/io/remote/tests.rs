//! A queue over a real ring, against servers of our own that answer, dawdle, hang up or change their mind: in plain,
//! and inside TLS by rustls' own stream.
mod world;

use super::super::{Arena, Buffer, Completion, File, Io, Op, Ring, Token, Wait};
use super::{ANSWER_TIME_MAX, HURRIED_TIME_MAX, RECONNECT_TIME_MAX, Remote, Remotes};
use crate::tls::tests::authority::Authority;
use formats::nbd::wire::Header;
use formats::nbd::{Address, BlockSizes, Errno, ExportInfo, Handshake, Outcome, ReplyTo, Server, Style, Tls, TlsNames};
use formats::range::ByteRange;
use formats::storage::Storage;
use rustls::crypto::ring::default_provider;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use tempfile::TempDir;

const SIZE: u64 = 64 << 20;

/// How the server treats its clients, one after the other; the last one is for all that follow.
#[derive(Clone, Copy)]
enum Treats {
    Well,
    /// Answers so many requests and hangs up.
    HangsUpAfter(u64),
    /// Agrees and never answers.
    Silent,
    /// Has another disk of that name by now.
    Shrunk,
    /// Has no TLS.
    InPlain,
    /// Has somebody on the way who adds bytes to the ACK of STARTTLS.
    MeddledWith,
    /// Is somebody else, whose authority has the same name.
    Stranger,
}

/// Keys are dear, so all servers inside TLS have one authority.
struct Keys {
    ours: Arc<ServerConfig>,
    strangers: Arc<ServerConfig>,
    /// A client's folder, with whom it trusts.
    folder: TempDir,
}

fn keys() -> &'static Keys {
    static KEYS: OnceLock<Keys> = OnceLock::new();
    KEYS.get_or_init(|| {
        let (authority, stranger) = (Authority::new("the authority"), Authority::new("the authority"));
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("ca-cert.pem"), authority.pem()).expect("a file");
        Keys { ours: server_config(&authority), strangers: server_config(&stranger), folder }
    })
}

/// A server for `localhost`.
fn server_config(authority: &Authority) -> Arc<ServerConfig> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    authority.server_folder(folder.path());
    let certificate = CertificateDer::from_pem_file(folder.path().join("server-cert.pem")).expect("PEM");
    let key = PrivateKeyDer::from_pem_file(folder.path().join("server-key.pem")).expect("PEM");
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()));
    let config = config.with_safe_default_protocol_versions().expect("TLS 1.3").with_no_client_auth();
    Arc::new(config.with_single_cert(vec![certificate], key).expect("they fit"))
}

/// A client's connection, in plain or inside TLS.
trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// A disk that is written to; none where the server's is as `byte` says.
type Written = Option<Arc<Mutex<Vec<u8>>>>;

fn byte(at: u64) -> u8 {
    (at / 4096 * 7 + at) as u8 | 1
}

/// True where the server says that there is nothing but zeroes.
fn is_hole(at: u64) -> bool {
    at >> 20 & 3 == 2
}

fn export(size: u64, read_only: bool, multi_conn: bool) -> ExportInfo {
    ExportInfo {
        name: "disk".into(),
        description: String::new(),
        size,
        read_only,
        multi_conn,
        fast_zero: false,
        block_sizes: BlockSizes { minimum: 512, preferred: 4096, maximum: 256 << 10 },
        bitmaps: Vec::new(),
    }
}

/// Speaks with one client until it goes.
fn speak(socket: UnixStream, treats: Treats, multi_conn: bool, tls: bool, disk: &Written) -> io::Result<()> {
    let size = disk.as_ref().map_or(SIZE, |disk| disk.lock().expect("a disk").len() as u64);
    let size = if matches!(treats, Treats::Shrunk) { size / 2 } else { size };
    let export = export(size, disk.is_none(), multi_conn);
    let mut out = Vec::new();
    let offers_tls = tls && !matches!(treats, Treats::InPlain);
    let mut handshake = Handshake::new(if offers_tls { Tls::Required } else { Tls::Off }, &mut out);
    let mut client: Box<dyn Stream> = Box::new(socket.try_clone()?);
    loop {
        client.write_all(&std::mem::take(&mut out))?;
        let mut bytes = [0; 4096];
        let count = client.read(&mut bytes)?;
        let mut input = &bytes[..count];
        let mut outcome = Outcome::More;
        while !input.is_empty() && outcome == Outcome::More {
            outcome = handshake.step(&mut input, std::slice::from_ref(&export), &mut out);
        }
        match outcome {
            Outcome::Transmission(_) => break,
            Outcome::StartTls => {
                if let Treats::MeddledWith = treats {
                    out.extend_from_slice(b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x08\0\0\0\x01\0\0\0\0");
                }
                client.write_all(&std::mem::take(&mut out))?;
                let config = if let Treats::Stranger = treats { &keys().strangers } else { &keys().ours };
                let connection = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
                client = Box::new(StreamOwned::new(connection, socket.try_clone()?));
            }
            Outcome::More if count > 0 => {}
            _ => return Ok(()),
        }
    }
    client.write_all(&out)?;
    for number in 0.. {
        let mut header = [0; 28];
        client.read_exact(&mut header)?;
        let Header { flags, command, cookie, offset, len } =
            Header::parse(Style::Structured, &header).expect("a request");
        match treats {
            Treats::Silent => continue,
            Treats::HangsUpAfter(count) if number == count => return Ok(()),
            _ if command != 0 && disk.is_none() => return Ok(()),
            _ => {}
        }
        if let Some(disk) = disk {
            carry_out(&mut client, disk, flags, command, ByteRange { start: offset, end: offset + len })?;
            client.write_all(&ReplyTo { style: Style::Simple, cookie, offset }.done())?;
            continue;
        }
        assert!((offset | len) % 512 == 0 && len <= 256 << 10 && offset + len <= size, "{offset}, {len}");
        client.write_all(&answer(cookie, offset, len))?;
    }
    Ok(())
}

/// What a writable disk does.
fn carry_out(
    client: &mut impl Read,
    disk: &Mutex<Vec<u8>>,
    flags: u16,
    command: u16,
    range: ByteRange,
) -> io::Result<()> {
    let aligned = (range.start | range.end).is_multiple_of(512);
    assert!(aligned && (command == 6 || range.len() <= 256 << 10), "{command}: {range}");
    let mut bytes = vec![0; range.len() as usize];
    if command == 1 {
        client.read_exact(&mut bytes)?;
    }
    assert!(matches!(command, 1 | 3 | 6) && flags & !2 == 0 && (flags == 0 || command == 6), "{command}, {flags:#x}");
    disk.lock().expect("a disk")[range.start as usize..range.end as usize].copy_from_slice(&bytes);
    Ok(())
}

/// The last byte's chunk first, holes as holes, and nothing at all of the disk's last block.
fn answer(cookie: u64, offset: u64, len: u64) -> Vec<u8> {
    let to = ReplyTo { style: Style::Structured, cookie, offset };
    if offset + len == SIZE {
        return to.error(Errno::Io, "bad sector");
    }
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let mut at = offset;
    while at < offset + len {
        let end = (at + 1).next_multiple_of(64 << 10).min(offset + len);
        runs.push((at, end));
        at = end;
    }
    let mut out = Vec::new();
    for (number, (start, end)) in runs.iter().copied().enumerate().rev() {
        let (len, done) = ((end - start) as u32, number == 0);
        match is_hole(start) {
            true => out.extend_from_slice(&to.hole(start, len, done)),
            false => {
                out.extend_from_slice(&to.data(start, len, done));
                out.extend((start..end).map(byte));
            }
        }
    }
    out
}

/// An export that is open, its server for as long as somebody speaks with it.
fn open(treats: &'static [Treats], multi_conn: bool) -> Arc<Remote> {
    open_on(treats, multi_conn, false, None)
}

fn open_on(treats: &'static [Treats], multi_conn: bool, tls: bool, disk: Written) -> Arc<Remote> {
    try_open(treats, multi_conn, tls, disk).expect("an export")
}

fn try_open(
    treats: &'static [Treats],
    multi_conn: bool,
    tls: bool,
    disk: Written,
) -> formats::error::Result<Arc<Remote>> {
    let writable = disk.is_some();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).expect("a socket");
    std::thread::spawn(move || {
        for (number, client) in listener.incoming().enumerate() {
            let treats = treats[number.min(treats.len() - 1)];
            let (client, disk) = (client.expect("a client"), disk.clone());
            std::thread::spawn(move || {
                // A client that goes is no error.
                let _ = speak(client, treats, multi_conn, tls, &disk);
            });
        }
    });
    let server = Server::unix(path.to_str().expect("a name")).expect("a path");
    let names = TlsNames { certificates: None, hostname: Some("localhost".into()) };
    let address = Address { tls: tls.then_some(names), ..Address::new(server, "disk").expect("a name") };
    let remote = Remote::open(&address, writable, Some(keys().folder.path()));
    // Nobody reaches it by its name any more where the folder goes, so it stays until the test's process ends.
    drop(folder.keep());
    remote
}

/// A ring whose clock can be put forward.
struct Later {
    ring: Ring,
    by: Duration,
}

impl Io for Later {
    fn submit(&mut self, token: Token, op: Op) {
        self.ring.submit(token, op);
    }
    fn reap(&mut self, wait: Wait, done: &mut Vec<Completion>) -> io::Result<()> {
        self.ring.reap(wait, done)
    }
    fn now(&self) -> Duration {
        self.ring.now() + self.by
    }
}

fn queue() -> Remotes<Later> {
    let ring = Ring::new(16, &Arena::new(4096)).expect("a ring");
    Remotes::new(Later { ring, by: Duration::ZERO })
}

/// What became of reads of these ranges, all under way at once.
fn read(queue: &mut Remotes<Later>, file: &File, ranges: &[(u64, usize)]) -> BTreeMap<usize, io::Result<Vec<u8>>> {
    for (number, (at, len)) in ranges.iter().enumerate() {
        let buf = Buffer::alone(*len);
        queue.submit(Token(number as u64), Op::Read { file: file.clone(), at: *at, buf });
    }
    let (mut found, mut done) = (BTreeMap::new(), Vec::new());
    while found.len() < ranges.len() {
        queue.reap(Wait::One, &mut done).expect("a ring that works");
        for Completion { token, op, result } in done.drain(..) {
            let Op::Read { buf, .. } = op else { panic!("the same operation") };
            let bytes = result.map(|count| buf[..count as usize].to_vec());
            assert!(found.insert(token.0 as usize, bytes).is_none(), "one completion a read");
        }
    }
    found
}

fn truth(at: u64, len: usize) -> Vec<u8> {
    let end = (at + len as u64).min(SIZE);
    (at..end).map(|at| if is_hole(at) { 0 } else { byte(at) }).collect()
}

#[test]
fn reads_of_any_alignment_come_back_whole() {
    for (multi_conn, tls) in [(true, false), (false, false), (true, true), (false, true)] {
        let file = File::remote(open_on(&[Treats::Well], multi_conn, tls, None));
        let mut queue = queue();
        let ranges: Vec<(u64, usize)> = (0..150)
            .map(|n| (n * 357_913 % (SIZE - (2 << 20)), (n * n * 631 % (1 << 20)) as usize + 1))
            .chain([(SIZE, 10), (SIZE + 5, 1)])
            .collect();
        let found = read(&mut queue, &file, &ranges);
        for (number, (at, len)) in ranges.iter().enumerate() {
            let bytes = found[&number].as_ref().expect("a read");
            assert!(*bytes == truth(*at, *len), "{len} bytes at {at}, several connections: {multi_conn}, TLS: {tls}");
        }
        let failed = &read(&mut queue, &file, &[(SIZE - 512, 512)])[&0];
        let error = failed.as_ref().expect_err("a bad sector").to_string();
        assert!(error.contains("Input/output error") && error.contains("bad sector"), "{error}");
        assert!(read(&mut queue, &file, &[(0, 512)])[&0].is_ok(), "one refusal is not the end");
    }
}

#[test]
fn metadata_is_read_by_the_byte_and_only_read() {
    let remote = open(&[Treats::Well], true);
    let mut bytes = [0; 1000];
    remote.read_at(777, &mut bytes).expect("a read");
    assert_eq!(bytes.to_vec(), truth(777, 1000));
    assert_eq!(remote.len().expect("a length"), SIZE);
    let past = remote.read_at(SIZE, &mut [0]).expect_err("past the end");
    assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
    assert!(remote.write_at(0, &[0]).is_err() && remote.set_len(0).is_err());
    let mut queue = queue();
    queue.submit(Token(1), Op::Flush { file: File::remote(remote) });
    let mut done = Vec::new();
    queue.reap(Wait::One, &mut done).expect("a ring that works");
    assert!(done.len() == 1 && done[0].result.is_err());
}

#[test]
fn a_lost_connection_fails_everything_and_whoever_comes_later() {
    for (treats, reason) in [
        (&[Treats::Well, Treats::HangsUpAfter(3)][..], "hung up"),
        (&[Treats::Well, Treats::Shrunk], "not what it was"),
        (&[Treats::Well, Treats::HangsUpAfter(0)], "hung up"),
    ] {
        let file = File::remote(open(treats, true));
        let mut queue = queue();
        let ranges: Vec<(u64, usize)> = (0..100).map(|n| (n * 4096, 4096)).collect();
        for _ in 0..2 {
            let found = read(&mut queue, &file, &ranges);
            let lost = found.values().filter_map(|bytes| bytes.as_ref().err()).map(ToString::to_string);
            let lost: Vec<String> = lost.collect();
            assert!(lost.len() >= 97 && lost.iter().all(|error| error.contains(reason)), "{reason}: {lost:?}");
        }
    }
    let file = File::remote(open(&[Treats::HangsUpAfter(1)], false));
    let mut queue = queue();
    let found = read(&mut queue, &file, &[(0, 512), (512, 512), (0, 512)]);
    assert!(found[&0].is_ok() && found[&1].is_err() && found[&2].is_err(), "{found:?}");
}

/// It takes a second: a server is looked at no more often.
#[test]
fn a_server_that_never_answers_is_given_up() {
    let remote = open(&[Treats::Silent], true);
    let file = File::remote(remote);
    let mut queue = queue();
    for number in 0..3 {
        queue.submit(Token(number), Op::Read { file: file.clone(), at: 0, buf: Buffer::alone(512) });
    }
    // What is sent after the clock was put forward would be a sign of life.
    while queue.connections[0].1.asked.len() < 3 || queue.connections[0].1.sending {
        queue.reap(Wait::No, &mut Vec::new()).expect("a ring that works");
    }
    queue.below.by = ANSWER_TIME_MAX + Duration::from_secs(1);
    let mut done = Vec::new();
    while done.len() < 3 {
        queue.reap(Wait::One, &mut done).expect("a ring that works");
    }
    for completion in done {
        let error = completion.result.expect_err("nobody answered").to_string();
        assert!(error.contains("no answer within 30 s"), "{error}");
    }
}

#[test]
fn connections_go_with_their_exports() {
    let mut queue = queue();
    for round in 0..10 {
        let file = File::remote(open(&[Treats::Well], true));
        let found = read(&mut queue, &file, &[(round * 512, 512)]);
        assert_eq!(found[&0].as_ref().expect("a read"), &truth(round * 512, 512));
        assert!(queue.connections.len() <= 2, "{} connections", queue.connections.len());
    }
}

/// A disk to write to, and its export.
fn writable(treats: &'static [Treats], multi_conn: bool) -> (Arc<Mutex<Vec<u8>>>, Arc<Remote>) {
    writable_on(treats, multi_conn, false)
}

fn writable_on(treats: &'static [Treats], multi_conn: bool, tls: bool) -> (Arc<Mutex<Vec<u8>>>, Arc<Remote>) {
    let disk = Arc::new(Mutex::new(vec![0x55; 4 << 20]));
    let remote = open_on(treats, multi_conn, tls, Some(Arc::clone(&disk)));
    (disk, remote)
}

/// The ends of these operations, all under way at once.
fn carried_out(queue: &mut Remotes<Later>, ops: Vec<Op>) -> BTreeMap<u64, io::Result<u32>> {
    let count = ops.len();
    for (token, op) in (0..).zip(ops) {
        queue.submit(Token(token), op);
    }
    let (mut ends, mut done) = (BTreeMap::new(), Vec::new());
    while ends.len() < count {
        queue.reap(Wait::One, &mut done).expect("a ring that works");
        for completion in done.drain(..) {
            assert!(ends.insert(completion.token.0, completion.result).is_none(), "one completion an operation");
        }
    }
    ends
}

fn write(file: &File, at: u64, len: usize, value: u8) -> Op {
    let mut buf = Buffer::alone(len);
    buf.fill(value);
    Op::Write { file: file.clone(), at, buf }
}

#[test]
fn writes_and_zeroes_arrive_whole_however_often_the_server_hangs_up() {
    const OFTEN: &[Treats] =
        &[Treats::Well, Treats::HangsUpAfter(5), Treats::HangsUpAfter(1), Treats::HangsUpAfter(20), Treats::Well];
    let ways = [(&[Treats::Well][..], true), (&[Treats::Well], false), (OFTEN, true)];
    for ((treats, multi_conn), tls) in ways.into_iter().flat_map(|way| [(way, false), (way, true)]) {
        let (disk, remote) = writable_on(treats, multi_conn, tls);
        let file = File::remote(remote);
        let mut truth = vec![0x55; 4 << 20];
        let mut ops = Vec::new();
        let mut at = 0;
        for number in 1..40u64 {
            let len = (number * number * 7 % 300 + 1) * 512;
            let range = at as usize..(at + len).min(4 << 20) as usize;
            if range.is_empty() {
                break;
            }
            let zero = number % 3 == 0;
            truth[range.clone()].fill(if zero { 0 } else { number as u8 });
            ops.push(match zero {
                true => Op::Zero { file: file.clone(), at, len: range.len() as u64, unmap: number % 2 == 0 },
                false => write(&file, at, range.len(), number as u8),
            });
            at += len + 512;
        }
        ops.push(Op::Flush { file: file.clone() });
        let ends = carried_out(&mut queue(), ops);
        assert!(ends.values().all(Result::is_ok), "{ends:?}");
        assert!(
            *disk.lock().expect("a disk") == truth,
            "several connections: {multi_conn}, treats: {}, TLS: {tls}",
            treats.len()
        );
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (_, remote) = writable(&[Treats::Well], true);
    let file = File::remote(remote);
    let zero = |at, len| Op::Zero { file: file.clone(), at, len, unmap: true };
    let ops = vec![
        write(&file, 100, 512, 1),
        write(&file, 0, 100, 1),
        write(&file, 4 << 20, 512, 1),
        zero(512, 1),
        zero(512, u64::MAX),
    ];
    let ends = carried_out(&mut queue(), ops);
    let said = |number: u64| ends[&number].as_ref().expect_err("a refusal").to_string();
    assert!(
        said(0).contains("whole blocks of 512") && said(1).contains("whole blocks") && said(3).contains("whole blocks")
    );
    assert!(said(2).contains("No space left") && said(4).contains("No space left"));
}

/// A flush counts for what was written since its connection was made, and for nothing before.
#[test]
fn a_flush_by_a_younger_connection_leaves_doubts() {
    let (_, remote) = writable(&[Treats::Well, Treats::HangsUpAfter(2), Treats::Well], true);
    let file = File::remote(Arc::clone(&remote));
    let mut queue = queue();
    let flush = || Op::Flush { file: file.clone() };
    let all_well = |ends: BTreeMap<u64, io::Result<u32>>| assert!(ends.values().all(Result::is_ok), "{ends:?}");
    all_well(carried_out(&mut queue, vec![write(&file, 0, 512, 1)]));
    all_well(carried_out(&mut queue, vec![flush()]));
    assert_eq!(remote.take_doubtful(), []);
    // Two were answered: this one comes by the next connection, and so does its flush.
    all_well(carried_out(&mut queue, vec![write(&file, 1 << 20, 512, 1)]));
    all_well(carried_out(&mut queue, vec![flush()]));
    assert_eq!(remote.take_doubtful(), []);
    // Another thread's connection is younger than this write.
    all_well(carried_out(&mut queue, vec![write(&file, 2 << 20, 512, 1)]));
    all_well(carried_out(&mut self::queue(), vec![flush()]));
    assert_eq!(remote.take_doubtful(), [ByteRange { start: 2 << 20, end: 3 << 20 }]);
    // The connection that waits was made before all of them.
    all_well(carried_out(&mut queue, vec![write(&file, 3 << 20, 512, 1)]));
    remote.flush_now().expect("a flush");
    assert_eq!(remote.take_doubtful(), []);
}

/// Steps until all of `count` operations are over, or a second has passed.
fn soon(queue: &mut Remotes<Later>, count: usize) -> Vec<io::Result<u32>> {
    let (mut ends, mut done) = (Vec::new(), Vec::new());
    let until = std::time::Instant::now() + Duration::from_secs(1);
    while ends.len() < count && std::time::Instant::now() < until {
        queue.reap(Wait::No, &mut done).expect("a ring that works");
        ends.extend(done.drain(..).map(|completion| completion.result));
        std::thread::yield_now();
    }
    ends
}

#[test]
fn a_server_that_stays_away_fails_what_waits_for_it() {
    let (_, remote) = writable(&[Treats::Well, Treats::HangsUpAfter(0)], true);
    let file = File::remote(Arc::clone(&remote));
    let mut queue = queue();
    queue.submit(Token(1), write(&file, 0, 512, 1));
    assert!(soon(&mut queue, 1).is_empty(), "given up too early");
    queue.below.by += RECONNECT_TIME_MAX;
    let mut done = Vec::new();
    while done.is_empty() {
        queue.reap(Wait::One, &mut done).expect("a ring that works");
    }
    let error = done[0].result.as_ref().expect_err("nobody answered").to_string();
    assert!(error.contains("hung up"), "{error}");
    // Whoever comes now gets one try.
    let ends = carried_out(&mut queue, vec![write(&file, 0, 512, 1)]);
    assert!(ends[&0].is_err(), "{ends:?}");
}

#[test]
fn who_must_not_wait_does_not_wait() {
    let (_, remote) = writable(&[Treats::Well, Treats::HangsUpAfter(0)], true);
    let file = File::remote(Arc::clone(&remote));
    remote.hurry(true);
    assert!(carried_out(&mut queue(), vec![write(&file, 0, 512, 1)])[&0].is_err());
    let (_, remote) = writable(&[Treats::Well, Treats::Silent], true);
    let file = File::remote(Arc::clone(&remote));
    let mut queue = queue();
    queue.submit(Token(1), write(&file, 0, 512, 1));
    assert!(soon(&mut queue, 1).is_empty(), "given up too early");
    remote.hurry(true);
    queue.below.by += HURRIED_TIME_MAX;
    let mut done = Vec::new();
    while done.is_empty() {
        queue.reap(Wait::One, &mut done).expect("a ring that works");
    }
    assert!(done[0].result.is_err());
}

/// The first connection, and those that are made when it was lost.
#[test]
fn nothing_is_said_to_a_server_that_is_not_inside_tls_or_not_who_was_meant() {
    let one_after_the_other = |first, other| &*vec![first, other].leak();
    for (wrong, reason) in [
        (Treats::InPlain, "the server has no TLS"),
        (Treats::MeddledWith, "bytes in plain came behind the ACK"),
        (Treats::Stranger, "signed by no authority of"),
    ] {
        let error = try_open(vec![wrong].leak(), true, true, None).expect_err(reason).one_line();
        assert!(error.contains(reason) && error.starts_with("nbds+unix:///disk?socket="), "{error}");
        // A server that takes one connection only is asked by the one that was made at the start.
        for (first, multi_conn) in [(Treats::Well, true), (Treats::HangsUpAfter(0), false)] {
            let (disk, remote) = writable_on(one_after_the_other(first, wrong), multi_conn, true);
            remote.hurry(true);
            let ends = carried_out(&mut queue(), vec![write(&File::remote(remote), 0, 512, 1)]);
            let error = ends[&0].as_ref().expect_err(reason).to_string();
            assert!(error.contains(reason), "{reason}: {error}");
            assert!(disk.lock().expect("a disk").iter().all(|byte| *byte == 0x55));
        }
    }
}

#[test]
fn an_export_that_is_another_by_now_is_not_written() {
    let (disk, remote) = writable(&[Treats::Well, Treats::Shrunk], true);
    let file = File::remote(Arc::clone(&remote));
    remote.hurry(true);
    let ends = carried_out(&mut queue(), vec![write(&file, 0, 512, 1)]);
    let error = ends[&0].as_ref().expect_err("another disk").to_string();
    assert!(error.contains("not what it was"), "{error}");
    assert!(disk.lock().expect("a disk").iter().all(|byte| *byte == 0x55));
}
