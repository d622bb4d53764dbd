//! A raw disk without any zeroes, and a guest that writes to it block by block.
use super::daemon::Daemon;
use super::nbd::{Client, Replies, Request};
use super::random::Random;
use std::path::{Path, PathBuf};

pub const DISK_LEN: u64 = 8 << 20;
pub const BLOCK: usize = 64 << 10;

/// A connection to the only export.
pub fn connect(daemon: &Daemon) -> Client {
    Client::connect(&daemon.socket(), "vda", Replies::Structured).expect("an NBD connection")
}

/// A raw disk without any zeroes, and the words that serve it.
pub fn full_disk(folder: &Path) -> (PathBuf, Vec<u8>, String) {
    let (disk, bytes) = (folder.join("disk.raw"), Random::new(3).bytes(DISK_LEN as usize));
    std::fs::write(&disk, &bytes).expect("a file of ours");
    let export = format!("vda={},format=raw", disk.display());
    (disk, bytes, export)
}

/// A guest's write of one block, to the disk and to what is known of it.
pub fn write(client: &mut Client, truth: &mut [u8], block: usize, random: &mut Random) {
    let bytes = random.bytes(BLOCK);
    truth[block * BLOCK..][..BLOCK].copy_from_slice(&bytes);
    client.ask(&Request::Write { at: (block * BLOCK) as u64, bytes });
}
