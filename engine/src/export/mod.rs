//! What a guest sees: a name, a disk behind a gate, and the sessions that serve it.
pub mod bitmaps;
pub mod gate;
pub mod late;
pub mod request;
pub mod roll;
pub mod session;
