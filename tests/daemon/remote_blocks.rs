//! A disk on a server that takes whole blocks only, and guests that write parts of them.
//!
//! Held here: after a pivot to an export whose smallest block has 512 bytes, requests at any byte are done as before, for
//! connections from before the pivot too; and two guests that write to the two halves of one block both have what they wrote.

use crate::support::daemon::Daemon;
use crate::support::images::thin_disk;
use crate::support::nbd::{Client, Replies, Request};
use crate::support::random::Random;
use crate::support::server::{Server, held, two_folders};
use crate::support::{assert_same, folder};
use std::path::Path;

const DISK_LEN: usize = 4 << 20;
const BLOCK: usize = 512;
const WHOLE_BLOCKS: [&str; 4] =
    ["blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=1M", "blocksize-error-policy=error"];

/// A disk that is served from such an export, and a connection from before it was.
fn on_blocks(folder: &Path, filters: &[&str], words: &[&str]) -> (Server, Daemon, Client) {
    let source = folder.join("disk.raw");
    std::fs::write(&source, thin_disk(DISK_LEN)).expect("a file of ours");
    let (theirs, ours) = two_folders(folder);
    let words = [&["--filter=blocksize-policy"], filters, &["memory", "4M"], &WHOLE_BLOCKS, words].concat();
    let server = Server::nbdkit(&theirs, &words);
    let daemon = Daemon::serve(&ours, &[format!("vda={},format=raw", source.display())]);
    let client = connect(&daemon);
    daemon.ok("mirror", &["vda", &server.uri(""), "--pivot"]);
    assert_eq!(daemon.status("vda")["serving"], server.uri(""));
    (server, daemon, client)
}

fn connect(daemon: &Daemon) -> Client {
    Client::connect(&daemon.socket(), "vda", Replies::Structured).expect("an NBD connection")
}

#[test]
fn parts_of_blocks_are_written_zeroed_and_trimmed_as_on_a_file() {
    let folder = folder();
    let (server, daemon, mut client) = on_blocks(folder.path(), &[], &[]);
    let (mut truth, mut random) = (thin_disk(DISK_LEN), Random::new(17));
    assert_eq!(client.block_min(), 1, "a guest may ask for any byte");
    for number in 0..600 {
        let len = [1, 100, BLOCK, 4096, 70_000, 200_000][random.below(6) as usize];
        let at = random.below((DISK_LEN - len) as u64) as usize;
        // Now and then one that is whole at one end, or at both.
        let at = if random.below(3) == 0 { at / BLOCK * BLOCK } else { at };
        let (here, start, length) = (at..at + len, at as u64, len as u32);
        match number % 5 {
            0 => {
                client.ask(&Request::Zero { at: start, len: length, keep: number % 2 == 0 });
                truth[here].fill(0);
            }
            1 => {
                client.ask(&Request::Trim { at: start, len: length });
                // What a discard leaves is nobody's promise, but that it touches nothing else.
                let left = client.ask(&Request::Read { at: start, len: length });
                truth[here].copy_from_slice(&left);
            }
            2 => assert_same("a read", &client.ask(&Request::Read { at: start, len: length }), &truth[here]),
            _ => {
                let bytes = random.bytes(len);
                truth[here].copy_from_slice(&bytes);
                client.ask(&Request::Write { at: start, bytes });
            }
        }
    }
    assert_same("the disk as it is served", &connect(&daemon).content(), &truth);
    assert_same("what the server has", &held(&server.uri(""), folder.path()), &truth);
}

/// Between the read of a block and its write somebody else's write would be undone: both take a while here.
#[test]
fn writers_of_two_parts_of_a_block_do_not_undo_each_other() {
    const BLOCKS: usize = 24;
    let folder = folder();
    let (server, daemon, first) = on_blocks(folder.path(), &["--filter=delay"], &["rdelay=2ms", "wdelay=2ms"]);
    let (mut truth, mut random) = (thin_disk(DISK_LEN), Random::new(18));
    let mut clients = [first, connect(&daemon)];
    for _ in 0..20 {
        for block in 0..BLOCKS {
            let middle = 1 + random.below(BLOCK as u64 - 2) as usize;
            for (client, part) in clients.iter_mut().zip([0..middle, middle..BLOCK]) {
                let (at, len) = (block * BLOCK + part.start, part.len());
                let bytes = random.bytes(len);
                truth[at..at + len].copy_from_slice(&bytes);
                client.send(&Request::Write { at: at as u64, bytes });
            }
        }
        for client in &mut clients {
            for _ in 0..BLOCKS {
                client.receive().expect("an answer").result.expect("a write that is done");
            }
        }
    }
    assert_same("what the server has", &held(&server.uri(""), folder.path()), &truth);
}
