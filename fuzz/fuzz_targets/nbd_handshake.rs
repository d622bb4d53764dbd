//! NBD handshakes: see `src/nbd_handshake`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| blkmirror_fuzz::nbd_handshake::run(data));
