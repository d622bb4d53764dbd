//! Qcow2 headers and tables: see `src/qcow2`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| blkmirror_fuzz::qcow2::run(data));
