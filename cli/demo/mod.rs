//! `demo`: the main job with nothing but the program, and a proof that nothing was lost.
//!
//! ```text
//! story   the order of events, and what is said of them
//! chain   the images that the disk is made of at first
//! disk    what each block of it holds, and what it should hold
//! guest   writes all the time and remembers what was acknowledged
//! nbd     how the guest reaches the disk
//! daemon  the same program as a child, serving
//! proof   compares the disk with what was acknowledged
//! ```
mod chain;
mod daemon;
mod disk;
mod guest;
mod nbd;
mod proof;
mod story;

pub use story::run;
