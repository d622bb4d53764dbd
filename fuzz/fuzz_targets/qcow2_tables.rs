//! Qcow2 images with damage of which the right answer is known: see `src/qcow2/tables.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| blkmirror_fuzz::qcow2::tables::run(data));
