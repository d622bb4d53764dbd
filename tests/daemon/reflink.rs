//! A copy that shares blocks with its source, on a file system that can: its guest writes all the time.
//!
//! Takes root, for a file system of its own.

use crate::support::folder;
use crate::support::images::{Chain, holding};
use crate::support::mount::Mount;
use crate::support::random::Random;
use crate::support::scene::Scene;
use crate::support::tools::ran;
use std::process::Command;

const DISK_LEN: usize = 96 << 20;

fn moves(format: &'static str, seed: u64, options: &[&str]) {
    let around = folder();
    let Some(xfs) = Mount::that_shares(around.path().join("place"), &around.path().join("xfs")) else { return };
    let folder = tempfile::tempdir_in(&xfs.0).expect("a folder of ours");
    let top = folder.path().join(format!("disk.{format}"));
    holding(&top, format, &Random::new(seed).bytes(DISK_LEN), &[]);
    let chain = Chain { top: top.clone(), format, layers: vec![(top, format)], told: String::new() };
    let mut scene = Scene::of(folder, chain, seed);
    scene.writes(50);
    scene.mirror(&[&["--raw"], options].concat());
    let ready = scene.daemon.wait_for("vda", "ready");
    let shared = ready["shared_bytes"].as_u64().expect("a number");
    match options.is_empty() {
        true => {
            assert!(shared > 80 << 20, "{ready}");
            // The file system says so too; what the guest wrote meanwhile is its own, on either side.
            let target = ready["target"].as_str().expect("a path");
            let extents = ran(Command::new("filefrag").args(["-v", target]));
            assert!(extents.contains("shared"), "{extents}");
        }
        false => assert_eq!(shared, 0, "{ready}"),
    }
    scene.writes(50);
    scene.daemon.pivot("vda");
    scene.ends_on_the_target("raw");
}

#[test]
fn a_raw_disk_is_shared_under_its_guest() {
    moves("raw", 1, &[]);
}

#[test]
fn the_clusters_of_a_qcow2_are_shared_with_a_raw_target() {
    moves("qcow2", 2, &[]);
}

#[test]
fn nothing_is_shared_with_who_does_not_want_it() {
    moves("raw", 3, &["--no-reflink"]);
}
