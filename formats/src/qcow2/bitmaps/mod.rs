//! Persistent bitmaps: which parts of the disk were written since somebody last asked (qcow2.rst,
//! "Bitmaps extension").
//!
//! ```text
//! header extension ─► directory ─► one entry a bitmap ─► bitmap table ─► clusters of bits
//! ```
//!
//! Their autoclear bit vouches for all of them: a program that does not know them clears it when it
//! writes, and then none of them is right.
mod adopt;
mod bits;
mod directory;
mod grow;
mod live;
mod still;
mod store;

pub(super) use grow::Grown;
pub(super) use live::Live;

pub use adopt::Carried;
pub use bits::Bits;
pub use directory::{Bitmap, Extension, read, read_table};
