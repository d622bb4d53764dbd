//! NBD requests: see `src/nbd_requests`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| blkmirror_fuzz::nbd_requests::run(data));
