//! QMP lines: see `src/qmp`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| blkmirror_fuzz::qmp::run(data));
