//! Pivot records: see `src/record`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| blkmirror_fuzz::record::run(data));
