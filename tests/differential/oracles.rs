//! Readers of qcow2 that neither we nor QEMU's people wrote as its reader, each in a child process: what they cannot
//! read they may answer with a panic.
//!
//! The child is this test program itself, told by its environment to be a reader.
use crate::support::folder;
use crate::support::tools::ran;
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use qcow2_rs::dev::Qcow2DevParams;
use qcow2_rs::helpers::Qcow2IoBuf;
use qcow2_rs::qcow2_default_params;
use qcow2_rs::utils::qcow2_setup_dev_sync;
use serde_json::Value;
use std::fs;
use std::future::Future;
use std::path::Path;
use std::pin::pin;
use std::process::Command;
use std::task::{Context, Poll, Waker};

/// In the child's environment: the reader's name, the image, and where its bytes go.
const READER: &str = "DIFFERENTIAL_READER";
const IMAGE: &str = "DIFFERENTIAL_IMAGE";
const BYTES: &str = "DIFFERENTIAL_BYTES";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Oracle {
    Imago,
    Qcow2Rs,
}

impl Oracle {
    pub const ALL: [Self; 2] = [Self::Imago, Self::Qcow2Rs];

    /// Whether it reads the chain of which `qemu-img info` says this, the top first.
    pub fn reads(self, chain: &Value) -> bool {
        let layers = chain.as_array().expect("a chain");
        let (below, is_qcow2) = (&layers[1..], |layer: &Value| layer["format"] == "qcow2");
        match self {
            Self::Imago => is_qcow2(&layers[0]) && layers.iter().all(Self::is_plain),
            Self::Qcow2Rs => {
                let large = |layer: &Value| layer["cluster-size"].as_u64() >= Some(4096);
                let modern = |layer: &Value| layer["format-specific"]["data"]["compat"] == "1.1";
                let absolute = |layer: &Value| layer["backing-filename"].as_str().is_none_or(|it| it.starts_with('/'));
                let size = |layer: &Value| layer["virtual-size"].as_u64();
                layers.iter().all(|it| is_qcow2(it) && Self::is_plain(it) && large(it) && modern(it) && absolute(it))
                    // Past the end of a shorter backing it returns what its buffer held.
                    && layers.iter().zip(below).all(|(top, below)| size(below) >= size(top))
            }
        }
    }

    /// Neither of them has these.
    fn is_plain(layer: &Value) -> bool {
        let data = &layer["format-specific"]["data"];
        data["compression-type"] != "zstd" && data["extended-l2"] != true && data["data-file"].is_null()
    }

    /// What it reads of the disk.
    #[track_caller]
    pub fn content(self, image: &Path) -> Vec<u8> {
        let folder = folder();
        let bytes = folder.path().join("bytes");
        let mut child = Command::new(std::env::current_exe().expect("this program"));
        child.args(["--exact", "oracles::reader", "--ignored", "--quiet"]);
        ran(child.env(READER, format!("{self:?}")).env(IMAGE, image).env(BYTES, &bytes));
        fs::read(&bytes).expect("what the child wrote")
    }
}

#[test]
#[ignore = "is run by the other tests in a process of its own"]
fn reader() {
    let Ok(reader) = std::env::var(READER) else { return };
    let place = |name| std::env::var_os(name).expect("the parent says");
    let (image, bytes) = (place(IMAGE), place(BYTES));
    let read = match reader.as_str() {
        "Imago" => by_imago(image.as_ref()),
        _ => by_qcow2_rs(image.as_ref()),
    };
    fs::write(bytes, read).expect("room");
}

fn by_imago(image: &Path) -> Vec<u8> {
    let qcow2 = Qcow2::<File>::builder_path(image).open(PermissiveImplicitOpenGate::default()).expect("an image");
    let disk = FormatAccess::new(qcow2);
    let mut bytes = vec![0; disk.size() as usize];
    disk.read(&mut bytes[..], 0).expect("its bytes");
    bytes
}

fn by_qcow2_rs(image: &Path) -> Vec<u8> {
    let disk = qcow2_setup_dev_sync(image, &qcow2_default_params!(true, false)).expect("an image");
    wait_for(disk.qcow2_prep_io()).expect("its tables");
    let len = disk.info.virtual_size() as usize;
    // It reads whole sectors, into memory that is aligned, a cluster of the top layer a call.
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let at = bytes.len();
        let cluster = disk.info.cluster_size();
        let mut piece = Qcow2IoBuf::<u8>::new((cluster - at % cluster).min(len - at));
        let count = wait_for(disk.read_at(&mut piece, at as u64)).expect("its bytes");
        bytes.extend_from_slice(&piece[..count]);
    }
    bytes
}

/// Its futures wait for nothing but each other.
fn wait_for<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return value;
        }
    }
}
