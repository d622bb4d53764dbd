//! How an answer looks on the wire.
use super::outbound::Outbound;
use super::status::BlockExtent;
use crate::io::Buffer;
use formats::nbd::{Errno, wire};
use formats::range::ByteRange;

/// What became of a request.
pub(super) enum Answer {
    /// Done, nothing to say.
    Done,
    /// These bytes of the disk.
    Data(ByteRange, Buffer),
    /// These bytes of the disk, some of which are holes and were read as zeroes.
    Mixed(Vec<Run>, Buffer),
    /// These bytes of the disk are zeroes; only for clients that take structured replies.
    Hole(ByteRange),
    /// Extents of the metadata context of this number; at least one.
    Status(u32, Vec<BlockExtent>),
    /// Failed, and why in words.
    Failed(Errno, String),
}

/// A run of a read's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Which bytes of the disk.
    pub range: ByteRange,
    /// They read as zeroes.
    pub hole: bool,
}

/// Puts `answer` to a request on its way.
pub(super) fn put(out: &mut Outbound, structured: bool, cookie: u64, answer: Answer) {
    match answer {
        // Only a READ has to have a chunk; a simple reply is shorter.
        Answer::Done => out.bytes(&wire::simple_reply(cookie, None)),
        Answer::Data(range, buffer) if structured => {
            out.bytes(&wire::offset_data_chunk(cookie, range.start, len(range), true));
            out.buffer(buffer);
        }
        Answer::Data(_, buffer) => {
            out.bytes(&wire::simple_reply(cookie, None));
            out.buffer(buffer);
        }
        Answer::Mixed(runs, buffer) => mixed(out, cookie, &runs, buffer),
        Answer::Hole(range) => out.bytes(&wire::offset_hole_chunk(cookie, range.start, len(range), true)),
        Answer::Status(context, extents) => {
            out.bytes(&wire::block_status_chunk(cookie, context, extents.len()));
            extents.iter().for_each(|extent| out.bytes(&wire::block_extent(extent.len, extent.state)));
        }
        // With words where the client takes them; a READ must then have a chunk.
        Answer::Failed(error, why) if structured => out.bytes(&wire::error_chunk(cookie, error, &why)),
        Answer::Failed(error, _) => out.bytes(&wire::simple_reply(cookie, Some(error))),
    }
}

/// The runs in their order, the last one ending the reply.
fn mixed(out: &mut Outbound, cookie: u64, runs: &[Run], mut rest: Buffer) {
    for (number, Run { range, hole }) in runs.iter().enumerate() {
        let done = number + 1 == runs.len();
        let after = rest.split_off(range.len() as usize);
        let bytes = std::mem::replace(&mut rest, after);
        if *hole {
            out.bytes(&wire::offset_hole_chunk(cookie, range.start, len(*range), done));
        } else {
            out.bytes(&wire::offset_data_chunk(cookie, range.start, len(*range), done));
            out.buffer(bytes);
        }
    }
}

/// A READ's length, which came from 32 bits.
fn len(range: ByteRange) -> u32 {
    range.len() as u32
}
