//! The bitmaps of a disk that clients can ask for: what the target of its mirror lacks, and what its image keeps.
//!
//! The first has a name of its own, `mirror`, as long as its job is under way. A bitmap of the image that has
//! the same name cannot be asked for, whether there is a job or not: a client that takes one for the other would
//! copy too little.
use super::gate::Route;
use crate::dirty::DirtyBitmap;
use formats::error::{Error, Result};
use formats::qcow2::bitmaps::Bits;
use formats::range::ByteRange;
use std::sync::Arc;

/// The name of the bitmap of a job under way.
pub const MIRROR: &str = "mirror";

/// One of them.
pub enum Marked<'a> {
    /// What the target of a mirror lacks.
    Lacking(&'a DirtyBitmap),
    /// What was written since the image has this bitmap, or as long as it was enabled.
    Kept(Arc<Bits>),
}

impl Route {
    /// Names of those that can be asked for now: the mirror's first, for a client is told of so many only.
    pub fn bitmaps(&self) -> Vec<String> {
        let top = self.disk.chain().top();
        let kept = top.image.bitmap_names().unwrap_or_else(|error| {
            tracing::warn!("{}: its bitmaps: {}", top.path.display(), error.one_line());
            Vec::new()
        });
        let mirror = self.mirror.iter().map(|_| MIRROR.to_owned());
        mirror.chain(kept.into_iter().filter(|name| name != MIRROR)).collect()
    }

    /// The one of this name. It may have gone since a client asked for it.
    pub fn bitmap(&self, name: &str) -> Result<Marked<'_>> {
        let top = self.disk.chain().top();
        let marked = match name {
            MIRROR => self.mirror.as_ref().map(|mirror| Marked::Lacking(&mirror.dirty)),
            _ => top.image.bitmap(name).map_err(|error| error.at(top.path.display()))?.map(Marked::Kept),
        };
        marked.ok_or_else(|| Error::invalid(format!("there is no dirty bitmap {name} any more")))
    }
}

impl Marked<'_> {
    /// The bytes from `range.start` on that are alike, cut to `range`, and whether they are marked.
    pub fn run(&self, range: ByteRange) -> (ByteRange, bool) {
        match self {
            Self::Lacking(dirty) => dirty.run(range),
            Self::Kept(bits) => bits.run(range),
        }
    }
}
