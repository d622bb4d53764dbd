//! Puts bitmaps back into the file when an image is closed.
//!
//! New clusters are counted, and bits are there, before a table points at them; tables are there before
//! a flag says that they can be relied on; and what tables do not point at any more is let go of last.
//! The other way round, a power cut leaves a bitmap that shows other bytes as its bits.
use super::live::Tracked;
use crate::error::{Context, Error, Result};
use crate::image::{Progress, Settle};
use crate::qcow2::{Shared, table};
use std::sync::Arc;

impl Shared {
    /// Stores what is live. Nobody writes any more; `flush` makes the file durable.
    pub(in crate::qcow2) fn store_bitmaps(this: &Arc<Self>, flush: &dyn Fn() -> Result<()>) -> Result<()> {
        let (tracked, changed) = this.bitmaps.take();
        if tracked.is_empty() {
            return Ok(());
        }
        let mut unused = Vec::new();
        if changed {
            let tables: Result<Vec<_>> = tracked.iter().map(|one| this.write_bits(one, &mut unused)).collect();
            let tables = tables?;
            Self::settle_with(this, flush)?;
            for (one, entries) in tracked.iter().zip(tables) {
                let mut bytes = Vec::with_capacity(entries.len() * 8);
                table::encode(entries, &mut bytes);
                let written = this.storage.write_at(one.entry.table_offset, &bytes);
                written.context(|| format!("bitmap {}: writing its table", one.entry.name))?;
            }
            flush()?;
        }
        tracked.iter().try_for_each(|one| one.entry.write_flags(&*this.storage, one.entry.flags))?;
        flush()?;
        this.lock().let_go(&unused);
        Self::settle_with(this, flush)?;
        this.recycle();
        Self::settle_with(this, flush)
    }

    /// Writes the bits of `one` where they were, or to new clusters; returns its new table. Clusters that it
    /// does not need any more go to `unused`.
    fn write_bits(&self, one: &Tracked, unused: &mut Vec<u64>) -> Result<Vec<u64>> {
        let cluster = self.geometry.cluster_size();
        let mut bytes = vec![0; cluster as usize];
        let mut entries = one.table.clone();
        for (at, entry) in (0..).step_by(cluster as usize).zip(&mut entries) {
            let place = Some(*entry).filter(|place| *place >= cluster);
            if !one.bits.to_bytes(at, &mut bytes) {
                unused.extend(place);
                *entry = 0;
                continue;
            }
            let place = match place {
                Some(place) => place,
                None => self.lock().space()?.take(1)?.run.start << self.geometry.cluster_bits,
            };
            self.storage
                .write_at(place, &bytes)
                .context(|| format!("bitmap {}: writing its bits at {place}", one.entry.name))?;
            *entry = place;
        }
        Ok(entries)
    }

    fn settle_with(this: &Arc<Self>, flush: &dyn Fn() -> Result<()>) -> Result<()> {
        let mut progress = Progress::default();
        loop {
            match Self::settle(this, &mut progress)? {
                Settle::Flush => flush()?,
                Settle::Done => return Ok(()),
                Settle::Busy => return Err(Error::invalid("somebody else is settling the image")),
            }
        }
    }
}
