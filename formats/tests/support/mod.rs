//! What the format tests share: a disk that can lose power, a journal, a guest that remembers, and
//! images in files beside those of QEMU.
#![allow(dead_code, reason = "each test crate uses its part")]

pub mod act;
pub mod damage;
pub mod disk;
pub mod file;
pub mod files;
pub mod guest;
pub mod history;
pub mod notes;
pub mod qemu;
pub mod random;
pub mod stamp;
pub mod world;
pub mod written;
