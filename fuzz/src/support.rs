//! What the format tests have already: a file that can lose power, and a journal that minds its user.
#![allow(dead_code, reason = "the format tests use the rest")]

#[path = "../../formats/tests/support/disk.rs"]
pub mod disk;
#[path = "../../formats/tests/support/notes.rs"]
pub mod notes;
#[path = "../../formats/tests/support/random.rs"]
pub mod random;
