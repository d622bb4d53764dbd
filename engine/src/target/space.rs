//! Whether there is room for a copy: what it may need is held against what the target's file system has left.
//!
//! A word to whoever starts it, and no refusal: nobody knows what else will be written there, nor what is made room
//! for meanwhile. It is cheap: blocks are counted and not looked at, so a source that is compressed needs more.
use super::{ChainPlan, Found, Plan};
use crate::chain::Layer;
use crate::control::MirrorRequest;
use crate::control::creation::Preallocation;
use crate::disk::Disk;
use crate::open::lasting_name;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A block, as the system counts them.
const BLOCK: u64 = 512;

/// What there is to say where room may be short.
pub(super) fn warning(plan: &Plan, request: &MirrorRequest, source: &Disk) -> Option<String> {
    if plan.remote.is_some() || plan.found == Found::Device {
        return None;
    }
    let payload = plan.creation.as_ref().and_then(|creation| creation.data_file.as_ref());
    let path = payload.map_or(plan.path.as_path(), |data_file| data_file.path());
    // A link may lead to another file system.
    let path = &*lasting_name(path).ok()?;
    let needed = of_disk(request, source, plan.shallow);
    short(path.parent()?, needed.saturating_sub(taken(path).unwrap_or(0)))
}

/// The same of a whole chain.
pub(super) fn warning_of_chain(plan: &ChainPlan, request: &MirrorRequest, source: &Disk) -> Option<String> {
    let lower = plan.files.iter().fold(0_u64, |sum, file| sum.saturating_add(file.len_about()));
    short(plan.top.parent()?, lower.saturating_add(of_disk(request, source, true)))
}

/// What a copy of the disk may take.
fn of_disk(request: &MirrorRequest, source: &Disk, shallow: bool) -> u64 {
    let all = matches!(request.options.preallocation, Some(Preallocation::Falloc | Preallocation::Full));
    if all { source.size() } else { held(source, shallow) }
}

fn short(folder: &Path, missing: u64) -> Option<String> {
    let space = rustix::fs::statvfs(folder).ok()?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    (missing > free).then(|| {
        format!(
            "the copy may need {missing} bytes more, and the file system of {} has {free} left: make room before it is \
             full",
            folder.display()
        )
    })
}

/// What the layers that are copied take on their disks, but no more than what the disk holds.
pub(super) fn held(source: &Disk, shallow: bool) -> u64 {
    let layers = source.chain().layers();
    let copied = if shallow { &layers[..1] } else { layers };
    copied.iter().fold(0u64, |sum, layer| sum.saturating_add(of_layer(layer))).min(source.size())
}

/// All there can be where nobody knows: devices and other servers do not say.
fn of_layer(layer: &Layer) -> u64 {
    match layer.file.file().as_remote() {
        Some(_) => u64::MAX,
        None => taken(layer.data_path()).unwrap_or(u64::MAX),
    }
}

/// What a file takes; `None` for what is no file.
pub(super) fn taken(path: &Path) -> Option<u64> {
    let metadata = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    Some(metadata.blocks().saturating_mul(BLOCK))
}
