//! What the format tests share: a disk that can lose power, a journal, and a guest that remembers.
#![allow(dead_code, reason = "each test crate uses its part")]

pub mod disk;
pub mod guest;
pub mod notes;
pub mod random;
