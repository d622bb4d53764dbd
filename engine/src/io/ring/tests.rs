//! The kernel's queue with real files and sockets.
use super::super::{Arena, Buffer, File, Gather, Io, Op, Pool, Token, Turn, Until, Wait, Waker, Work, is_in_memory};
use super::needed::NEEDED;
use super::{Extra, Ring};
use std::collections::BTreeSet;
use std::time::Duration;

fn run(ring: &mut Ring, op: Op) -> (Op, std::io::Result<u32>) {
    let mut done = Vec::new();
    ring.submit(Token(9), op);
    while done.is_empty() {
        ring.reap(Wait::One, &mut done).expect("a ring that works");
    }
    let completion = done.remove(0);
    assert_eq!(completion.token, Token(9));
    (completion.op, completion.result)
}

#[test]
fn bytes_written_are_read_back_by_registered_and_other_buffers() {
    // More than is registered at first: some of it is registered when it is used.
    let arena = Arena::new(4 << 20);
    let mut ring = Ring::new(4, &arena).expect("a ring");
    let file = File::new(tempfile::tempfile().expect("a temporary file"));
    let [low, _between, high] = [8192, 2 << 20, 8192].map(|len| arena.take(len).expect("room"));
    for (mut buf, byte) in [(low, 5), (high, 6), (Buffer::alone(8192), 7)] {
        buf.fill(byte);
        let (op, result) = run(&mut ring, Op::Write { file: file.clone(), at: 4096, buf });
        assert_eq!(result.expect("a write"), 8192);
        let Op::Write { mut buf, .. } = op else { panic!("the same operation") };
        buf.fill(0);
        let (op, result) = run(&mut ring, Op::Read { file: file.clone(), at: 4096, buf });
        assert_eq!(result.expect("a read"), 8192);
        assert!(matches!(op, Op::Read { buf, .. } if buf.iter().all(|found| *found == byte)));
    }
    let zero = Op::Zero { file: file.clone(), at: 8192, len: 4096, unmap: true };
    run(&mut ring, zero).1.expect("a hole");
    run(&mut ring, Op::Flush { file: file.clone() }).1.expect("a flush");
    let buf = arena.take(12288).expect("room");
    let (op, result) = run(&mut ring, Op::Read { file, at: 4096, buf });
    assert_eq!(result.expect("a read up to the end"), 8192);
    let Op::Read { buf, .. } = op else { panic!("the same operation") };
    assert!(buf[..4096].iter().all(|byte| *byte == 7) && buf[4096..8192].iter().all(|byte| *byte == 0));
}

#[test]
fn files_in_memory_do_what_others_do() {
    let name = c"/dev/shm";
    let flags = rustix::fs::OFlags::TMPFILE | rustix::fs::OFlags::RDWR;
    let Ok(file) = rustix::fs::open(name, flags, rustix::fs::Mode::RUSR) else { return };
    assert!(is_in_memory(&file));
    let file = File::of_memory(file);
    let mut ring = Ring::new(4, &Arena::new(4096)).expect("a ring");
    let mut buf = Buffer::alone(8192);
    buf.fill(7);
    let (op, result) = run(&mut ring, Op::Write { file: file.clone(), at: 4096, buf });
    assert_eq!(result.expect("a write"), 8192);
    let Op::Write { buf, .. } = op else { panic!("the same operation") };
    run(&mut ring, Op::Zero { file: file.clone(), at: 8192, len: 4096, unmap: true }).1.expect("a hole");
    run(&mut ring, Op::Flush { file: file.clone() }).1.expect("a flush");
    let (op, result) = run(&mut ring, Op::Read { file: file.clone(), at: 8000, buf });
    assert_eq!(result.expect("a read up to the end"), 4288);
    let Op::Read { buf, .. } = op else { panic!("the same operation") };
    assert!(buf[..192].iter().all(|byte| *byte == 7) && buf[192..4288].iter().all(|byte| *byte == 0));
}

#[test]
fn more_operations_than_the_queue_has_room_for_are_all_done() {
    let arena = Arena::new(4096);
    let mut ring = Ring::new(2, &arena).expect("a ring");
    let file = File::new(tempfile::tempfile().expect("a temporary file"));
    for n in 0..100 {
        ring.submit(Token(n), Op::Write { file: file.clone(), at: n, buf: Buffer::alone(1) });
    }
    let mut done = Vec::new();
    while done.len() < 100 {
        ring.reap(Wait::One, &mut done).expect("a ring that works");
    }
    let mut tokens: Vec<u64> = done.iter().map(|completion| completion.token.0).collect();
    tokens.sort_unstable();
    assert!(tokens.into_iter().eq(0..100));
}

#[test]
fn a_gather_arrives_in_order_and_a_waker_wakes() {
    let arena = Arena::new(4096);
    let mut ring = Ring::new(4, &arena).expect("a ring");
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
    let (ours, theirs) = (File::new(ours), File::new(theirs));
    let mut gather = Gather::default();
    gather.push_bytes(b"abc");
    let mut buf = arena.take(3).expect("room");
    buf.copy_from_slice(b"def");
    gather.push_buffer(buf);
    let (_, result) = run(&mut ring, Op::Send { socket: ours, gather });
    assert_eq!(result.expect("a send"), 6);
    let (op, _) = run(&mut ring, Op::Receive { socket: theirs, buf: Buffer::alone(6), until: Until::Full });
    let Op::Receive { buf, .. } = op else { panic!("the same operation") };
    assert_eq!(&buf[..], b"abcdef");

    let waker = Waker::new().expect("an eventfd");
    waker.wake();
    run(&mut ring, Op::Wake { waker }).1.expect("a waking");
    run(&mut ring, Op::Timeout { after: Duration::from_millis(1) }).1.expect("an end");
}

/// A ring with an operation that was queued only hung for good when it was dropped: there was
/// nothing to cancel yet, and then nobody to end it.
#[test]
fn a_ring_that_goes_lets_nothing_go_before_the_kernel_did() {
    for submitted in [true, false] {
        let arena = Arena::new(4096);
        let mut ring = Ring::new(4, &arena).expect("a ring");
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
        let buf = arena.take(100).expect("room");
        ring.submit(Token(1), Op::Receive { socket: File::new(ours), buf, until: Until::Full });
        if submitted {
            ring.reap(Wait::No, &mut Vec::new()).expect("a ring that works");
        }
        drop(ring);
        assert!(arena.take(4096).is_some(), "the buffer came back");
    }
}

/// Rings with helpers and without: everything comes back, each with its own buffers and error.
#[test]
fn what_is_computed_comes_back_like_any_operation() {
    let pool = Pool::default();
    for _ in 0..2 {
        let pool = pool.clone();
        std::thread::spawn(move || pool.serve());
    }
    let arena = Arena::new(1 << 20);
    for helpers in [None, Some(pool)] {
        let ring = Ring::new(4, &arena).and_then(|ring| ring.helped_by(helpers, Turn::Guest));
        let mut ring = ring.expect("a ring");
        let compute = |number: u8| {
            let mut from = Buffer::alone(100);
            from.fill(number);
            let work = Work::new(|from, to| {
                to[..from.len()].copy_from_slice(from);
                if from[0] == 7 { Err(std::io::Error::other("seven")) } else { Ok(from.len()) }
            });
            Op::Compute { from, to: Buffer::alone(200), work }
        };
        (0..40).for_each(|number| ring.submit(Token(u64::from(number)), compute(number)));
        let mut done = Vec::new();
        while done.len() < 40 {
            ring.reap(Wait::One, &mut done).expect("a ring");
        }
        done.sort_unstable_by_key(|completion| completion.token);
        for (number, completion) in (0..).zip(done) {
            let Op::Compute { to, .. } = completion.op else { panic!("not what was asked") };
            assert_eq!(completion.token, Token(u64::from(number)));
            assert!(to[..100] == [number; 100]);
            assert_eq!(completion.result.ok(), (number != 7).then_some(100));
        }
        // A ring may go while the pool works for it.
        (0..40).for_each(|number| ring.submit(Token(0), compute(number)));
    }
}

/// What is looked for at the start is what is asked for later.
#[test]
fn every_operation_is_looked_for_at_the_start() {
    let arena = Arena::new(16 << 10);
    let mut ring = Ring::new(4, &arena).expect("a ring");
    let file = || File::new(tempfile::tempfile().expect("a temporary file"));
    let mut gather = Gather::default();
    gather.push_bytes(b"abc");
    let peer = rustix::net::SocketAddrUnix::new("/nobody").expect("a short name").into();
    let ops = [
        Op::Read { file: file(), at: 0, buf: Buffer::alone(1) },
        Op::Read { file: file(), at: 0, buf: arena.take(4096).expect("room") },
        Op::Write { file: file(), at: 0, buf: Buffer::alone(1) },
        Op::Write { file: file(), at: 0, buf: arena.take(4096).expect("room") },
        Op::Zero { file: file(), at: 0, len: 1, unmap: true },
        Op::Flush { file: file() },
        Op::Prefetch { file: file(), at: 0, len: 1 },
        Op::Receive { socket: file(), buf: Buffer::alone(1), until: Until::Some },
        Op::Send { socket: file(), gather },
        Op::Accept { listener: file(), accepted: None },
        Op::Connect { socket: file(), peer },
        Op::Timeout { after: Duration::ZERO },
        Op::Wake { waker: Waker::new().expect("an eventfd") },
    ];
    let code = |mut op: Op| ring.entry(&mut op, &mut Extra::None).get_opcode();
    let asked: BTreeSet<u32> = ops.into_iter().map(code).collect();
    assert!(asked.into_iter().eq(NEEDED.iter().map(|needed| needed.code.into()).collect::<BTreeSet<u32>>()));
}
