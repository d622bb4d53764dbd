//! A queue over a real ring, against servers of our own that answer, dawdle, hang up or change their mind.
mod far;
mod world;

use super::super::{Arena, Buffer, Completion, File, Io, Op, Ring, Token, Wait};
use super::{ANSWER_TIME_MAX, HURRIED_TIME_MAX, RECONNECT_TIME_MAX, Remote, Remotes};
use far::{SIZE, Treats, Written, byte, is_hole, keys, speak};
use formats::nbd::{Address, Server, TlsNames};
use formats::range::ByteRange;
use formats::storage::Storage;
use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

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
