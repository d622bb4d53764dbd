//! Every kept input of the fuzz targets, without a fuzzer: `fuzz/corpus/TARGET/` has what reaches
//! far, `fuzz/crashes/TARGET/` everything that ever failed.
#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use std::panic::catch_unwind;
use std::path::Path;

/// Runs the target's body on its inputs.
fn replay(target: &str, body: fn(&[u8])) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let mut count = 0;
    for folder in ["corpus", "crashes"].map(|folder| root.join(folder).join(target)) {
        let Ok(entries) = folder.read_dir() else { continue };
        for entry in entries {
            let path = entry.expect("an entry of a folder").path();
            let data = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            // The panic's own words are on stderr; the input's name is what it cannot know.
            assert!(catch_unwind(|| body(&data)).is_ok(), "{}", path.display());
            count += 1;
        }
    }
    assert!(count > 5, "fuzz/corpus/{target} has {count} inputs: it is kept in the repository");
}

#[test]
fn nbd_servers() {
    replay("nbd_client", fuzz::nbd_client::run);
}

#[test]
fn nbd_handshakes() {
    replay("nbd_handshake", fuzz::nbd_handshake::run);
}

#[test]
fn nbd_requests() {
    replay("nbd_requests", fuzz::nbd_requests::run);
}

#[test]
fn qcow2_images() {
    replay("qcow2", fuzz::qcow2::run);
}

#[test]
fn qcow2_tables() {
    replay("qcow2_tables", fuzz::qcow2::tables::run);
}

#[test]
fn qmp_lines() {
    replay("qmp", fuzz::qmp::run);
}

#[test]
fn pivot_records() {
    replay("record", fuzz::record::run);
}

#[test]
fn words_of_the_command_line() {
    replay("words", fuzz::words::run);
}
