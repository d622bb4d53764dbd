//! What the format tests have already: a file that can lose power, a journal that minds its user, and
//! images written from the specification.
#![allow(dead_code, reason = "the format tests use the rest")]

#[path = "../../formats/tests/support/disk.rs"]
pub mod disk;
#[path = "../../formats/tests/support/notes.rs"]
pub mod notes;
#[path = "../../formats/tests/support/random.rs"]
pub mod random;
#[path = "../../formats/tests/support/stamp.rs"]
pub mod stamp;
#[path = "../../formats/tests/support/written.rs"]
pub mod written;
