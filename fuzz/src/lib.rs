//! What the fuzz targets do with their bytes.
//!
//! Each target knows the right answer to every input and panics where the program gives another.
//! The targets proper are in `fuzz_targets/`; `tests/fuzz_corpus.rs` of the root package has this
//! file as a module of its own and runs the kept inputs without a fuzzer.
pub mod nbd_client;
pub mod nbd_handshake;
pub mod nbd_requests;
pub mod qcow2;
pub mod qmp;
pub mod record;
mod support;
pub mod words;
