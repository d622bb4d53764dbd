//! Answers of NBD servers: see `src/nbd_client`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| blkmirror_fuzz::nbd_client::run(data));
