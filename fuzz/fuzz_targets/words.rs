//! Words of the command line: see `src/words`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| blkmirror_fuzz::words::run(data));
