//! What else an image keeps, for `info`: internal snapshots and persistent bitmaps.
use crate::date::date;
use crate::size;
use formats::qcow2::{bitmaps, snapshots};
use serde::Serialize;

const NSEC: u64 = 1_000_000_000;

/// An internal snapshot, by the names that qemu-img has; the disk's size is ours.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Snapshot {
    id: String,
    name: String,
    date_sec: u32,
    date_nsec: u32,
    vm_clock_sec: u64,
    vm_clock_nsec: u64,
    vm_state_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    icount: Option<u64>,
    disk_size: u64,
}

/// A persistent bitmap, likewise; whether it can be relied on is ours.
#[derive(Debug, Serialize)]
pub struct Bitmap {
    name: String,
    granularity: u64,
    flags: Vec<&'static str>,
    consistent: bool,
}

impl From<snapshots::Snapshot> for Snapshot {
    fn from(one: snapshots::Snapshot) -> Self {
        Self {
            id: one.id,
            name: one.name,
            date_sec: one.date_sec,
            date_nsec: one.date_nsec,
            vm_clock_sec: one.vm_clock_nsec / NSEC,
            vm_clock_nsec: one.vm_clock_nsec % NSEC,
            vm_state_size: one.vm_state_size,
            icount: one.icount,
            disk_size: one.disk_size,
        }
    }
}

impl From<bitmaps::Bitmap> for Bitmap {
    fn from(one: bitmaps::Bitmap) -> Self {
        let flags = [(one.in_use, "in-use"), (one.auto, "auto")];
        Self {
            name: one.name,
            granularity: 1 << one.granularity_bits,
            flags: flags.into_iter().filter_map(|(is_set, flag)| is_set.then_some(flag)).collect(),
            consistent: one.consistent,
        }
    }
}

impl Snapshot {
    /// In a line.
    pub fn line(&self) -> String {
        let Self { id, name, .. } = self;
        let state = size::format(self.vm_state_size);
        format!(
            "{id} {name} ({}, machine state {state}, disk {})",
            date(u64::from(self.date_sec)),
            size::format(self.disk_size)
        )
    }
}

impl Bitmap {
    /// In a line.
    pub fn line(&self) -> String {
        let mut facts = vec![format!("granularity {}", size::format(self.granularity))];
        facts.extend(self.flags.iter().map(|flag| (*flag).to_owned()));
        facts.extend((!self.consistent).then(|| "inconsistent".to_owned()));
        format!("{} ({})", self.name, facts.join(", "))
    }
}
