//! A queue over a real ring, against servers of our own that answer, dawdle, hang up or change their mind.
use super::super::{Arena, Buffer, Completion, File, Io, Op, Ring, Token, Wait};
use super::{ANSWER_TIME_MAX, Remote, Remotes};
use formats::nbd::wire::Header;
use formats::nbd::{Address, BlockSizes, Errno, ExportInfo, Handshake, Outcome, ReplyTo, Server, Style, Tls};
use formats::storage::Storage;
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

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
}

fn byte(at: u64) -> u8 {
    (at / 4096 * 7 + at) as u8 | 1
}

/// True where the server says that there is nothing but zeroes.
fn is_hole(at: u64) -> bool {
    at >> 20 & 3 == 2
}

/// Speaks with one client until it goes.
fn speak(mut client: UnixStream, treats: Treats, multi_conn: bool) -> io::Result<()> {
    let size = if matches!(treats, Treats::Shrunk) { SIZE / 2 } else { SIZE };
    let block_sizes = BlockSizes { minimum: 512, preferred: 4096, maximum: 256 << 10 };
    let export = ExportInfo {
        name: "disk".into(),
        description: String::new(),
        size,
        read_only: true,
        multi_conn,
        fast_zero: false,
        block_sizes,
        bitmaps: Vec::new(),
    };
    let mut out = Vec::new();
    let mut handshake = Handshake::new(Tls::Off, &mut out);
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
            Outcome::More if count > 0 => {}
            _ => return Ok(()),
        }
    }
    client.write_all(&out)?;
    for number in 0.. {
        let mut header = [0; 28];
        client.read_exact(&mut header)?;
        let Header { command, cookie, offset, len, .. } = Header::parse(Style::Structured, &header).expect("a request");
        match treats {
            Treats::Silent => continue,
            Treats::HangsUpAfter(count) if number == count => return Ok(()),
            _ if command != 0 => return Ok(()),
            _ => {}
        }
        assert!((offset | len) % 512 == 0 && len <= 256 << 10 && offset + len <= size, "{offset}, {len}");
        client.write_all(&answer(cookie, offset, len))?;
    }
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
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).expect("a socket");
    std::thread::spawn(move || {
        for (number, client) in listener.incoming().enumerate() {
            let treats = treats[number.min(treats.len() - 1)];
            let client = client.expect("a client");
            std::thread::spawn(move || {
                // A client that goes is no error.
                let _ = speak(client, treats, multi_conn);
            });
        }
    });
    let server = Server::unix(path.to_str().expect("a name")).expect("a path");
    let remote = Remote::open(&Address::new(server, "disk").expect("a name")).expect("an export");
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
    for multi_conn in [true, false] {
        let file = File::remote(open(&[Treats::Well], multi_conn));
        let mut queue = queue();
        let ranges: Vec<(u64, usize)> = (0..150)
            .map(|n| (n * 357_913 % (SIZE - (2 << 20)), (n * n * 631 % (1 << 20)) as usize + 1))
            .chain([(SIZE, 10), (SIZE + 5, 1)])
            .collect();
        let found = read(&mut queue, &file, &ranges);
        for (number, (at, len)) in ranges.iter().enumerate() {
            let bytes = found[&number].as_ref().expect("a read");
            assert!(*bytes == truth(*at, *len), "{len} bytes at {at}, several connections: {multi_conn}");
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
    while queue.connections[0].1.asked.len() < 3 {
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
