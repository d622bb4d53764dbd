//! The images that the demo's disk is made of at first: `base.raw <- snap1.qcow2 <- snap2.qcow2`.
use super::disk::{BLOCK_LEN, Truth, fill};
use crate::failure::Failure;
use engine::io::FileStorage;
use formats::error::{Context, Error, Result};
use formats::image::{Image, Progress, Reserve, Settle};
use formats::journal::Forgetful;
use formats::qcow2::{self, Backing, Create, Open, Qcow2};
use formats::range::ByteRange;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes that are written at once: a cluster, so nothing has to be filled around them.
const PIECE_LEN: u64 = 64 << 10;
/// Memory for tables while an image is made.
const METADATA_BYTES_MAX: usize = 4 << 20;

/// Makes the chain in `folder`; `truth` learns what it holds. Returns the top layer's path.
///
/// The base has data in half of its pieces, snap1 in a fifth of the disk's, snap2 in a tenth.
///
/// # Errors
/// The system's, with the file.
pub fn make(folder: &Path, truth: &mut Truth) -> std::result::Result<PathBuf, Failure> {
    let top = folder.join("snap2.qcow2");
    let made = base(&folder.join("base.raw"), truth)
        .and_then(|()| overlay(&folder.join("snap1.qcow2"), ("base.raw", "raw"), truth, 5))
        .and_then(|()| overlay(&top, ("snap1.qcow2", "qcow2"), truth, 10));
    made.map(|()| top).map_err(|error| Failure::new(error.one_line()))
}

fn base(path: &Path, truth: &mut Truth) -> Result<()> {
    let file = create(path)?;
    file.set_len(truth.blocks() * BLOCK_LEN).context(|| path.display().to_string())?;
    write_pieces(truth, 2, |guest, bytes| file.write_all_at(bytes, guest.start).context(|| "writing"))
        .map_err(|error| error.at(path.display()))
}

fn overlay(path: &Path, (name, format): (&str, &str), truth: &mut Truth, every: u64) -> Result<()> {
    let file = create(path)?;
    let clone = file.try_clone().context(|| path.display().to_string())?;
    let storage = Arc::new(FileStorage::new(clone));
    let backing = Backing { name: name.into(), format: Some(format.into()) };
    let fill_it = || {
        qcow2::create(&*storage, &Create { backing: Some(backing), ..Create::new(truth.blocks() * BLOCK_LEN) })?;
        let open = Open { writable: true, has_backing: true, metadata_bytes_max: METADATA_BYTES_MAX };
        let image = Qcow2::open(storage, Arc::new(Forgetful), open)?;
        write_pieces(truth, every, |guest, bytes| put(&image, &file, guest, bytes))?;
        settle(&image, &file)
    };
    fill_it().map_err(|error: Error| error.at(path.display()))
}

fn create(path: &Path) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create_new(true).open(path).context(|| path.display().to_string())
}

/// Gives every `every`-th piece of the disk a stamp of its own and its bytes to `write`.
fn write_pieces(truth: &mut Truth, every: u64, mut write: impl FnMut(ByteRange, &[u8]) -> Result<()>) -> Result<()> {
    let blocks_a_piece = PIECE_LEN / BLOCK_LEN;
    let mut bytes = vec![0; PIECE_LEN as usize];
    for piece in (0..truth.blocks() / blocks_a_piece).step_by(every as usize) {
        let block = piece * blocks_a_piece;
        let stamp = truth.next_stamp();
        fill(block, stamp, &mut bytes);
        let start = block * BLOCK_LEN;
        write(ByteRange { start, end: start + PIECE_LEN }, &bytes)?;
        truth.set(block, blocks_a_piece, stamp);
    }
    Ok(())
}

/// Writes whole clusters of an image that nobody else uses.
fn put(image: &Qcow2, file: &File, guest: ByteRange, bytes: &[u8]) -> Result<()> {
    let mut left = guest;
    while !left.is_empty() {
        match image.reserve(left)? {
            Reserve::Room(reservation) => {
                assert!(reservation.fill == [None, None], "whole clusters need nothing around them");
                let written = reservation.guest;
                let from = (written.start - guest.start) as usize;
                let payload = &bytes[from..from + written.len() as usize];
                file.write_all_at(payload, reservation.host).context(|| format!("writing {written}"))?;
                image.commit(reservation)?;
                left.start = written.end;
            }
            Reserve::Settle => settle(image, file)?,
            Reserve::Busy => return Err(Error::invalid(format!("{left}: somebody else writes to this image"))),
        }
    }
    Ok(())
}

fn settle(image: &Qcow2, file: &File) -> Result<()> {
    let mut progress = Progress::default();
    loop {
        match image.settle(&mut progress)? {
            Settle::Flush | Settle::FlushPayload => file.sync_data().context(|| "flush")?,
            Settle::Done => return Ok(()),
            Settle::Busy => return Err(Error::invalid("somebody else settles this image")),
        }
    }
}
