//! How an answer looks on the wire.
use super::outbound::Outbound;
use super::status::BlockExtent;
use crate::io::Buffer;
use formats::nbd::{Errno, ReplyTo, Style};
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
    /// Numbers of metadata contexts, each with at least one extent.
    Status(Vec<(u32, Vec<BlockExtent>)>),
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
pub(super) fn put(out: &mut Outbound, to: ReplyTo, answer: Answer) {
    match answer {
        Answer::Done => out.bytes(&to.done()),
        Answer::Data(range, buffer) => {
            match to.style {
                Style::Simple => out.bytes(&to.done()),
                Style::Structured | Style::Extended => out.bytes(&to.data(range.start, len(range), true)),
            }
            out.buffer(buffer);
        }
        Answer::Mixed(runs, buffer) => mixed(out, to, &runs, buffer),
        Answer::Hole(range) => out.bytes(&to.hole(range.start, len(range), true)),
        Answer::Status(contexts) => {
            for (number, (context, extents)) in contexts.iter().enumerate() {
                out.bytes(&to.block_status(*context, extents.len(), number + 1 == contexts.len()));
                extents.iter().for_each(|extent| out.bytes(&to.extent(extent.len, extent.state)));
            }
        }
        Answer::Failed(error, why) => out.bytes(&to.error(error, &why)),
    }
}

/// The runs in their order, the last one ending the reply.
fn mixed(out: &mut Outbound, to: ReplyTo, runs: &[Run], mut rest: Buffer) {
    for (number, Run { range, hole }) in runs.iter().enumerate() {
        let done = number + 1 == runs.len();
        let after = rest.split_off(range.len() as usize);
        let bytes = std::mem::replace(&mut rest, after);
        if *hole {
            out.bytes(&to.hole(range.start, len(*range), done));
        } else {
            out.bytes(&to.data(range.start, len(*range), done));
            out.buffer(bytes);
        }
    }
}

/// A READ's length, which came from 32 bits.
fn len(range: ByteRange) -> u32 {
    range.len() as u32
}
