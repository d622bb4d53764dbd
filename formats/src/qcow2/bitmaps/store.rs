//! Puts bitmaps back into the file when an image is closed.
//!
//! New clusters are counted, and bits are there, before a table points at them; tables are there before
//! a flag says that they can be relied on; and what tables do not point at any more is let go of last.
//! The other way round, a power cut leaves a bitmap that shows other bytes as its bits.
use super::bits::Bits;
use super::live::Tracked;
use crate::error::{Context, Error, Result};
use crate::image::{Progress, Settle};
use crate::qcow2::{Shared, table};
use std::sync::Arc;

impl Shared {
    /// Stores what is live. Nobody writes any more; `flush` makes the file durable.
    pub(in crate::qcow2) fn store_bitmaps(this: &Arc<Self>, flush: &dyn Fn() -> Result<()>) -> Result<()> {
        let (tracked, changed) = this.bitmaps().take();
        if tracked.is_empty() && this.bitmaps().adopted().is_empty() {
            return Ok(());
        }
        Self::store_tracked(this, &tracked, changed, flush)?;
        Self::store_adopted(this, flush)?;
        Self::settle_with(this, flush)?;
        this.recycle(u64::MAX);
        Self::settle_with(this, flush)
    }

    /// Stores what was in the file before.
    fn store_tracked(
        this: &Arc<Self>,
        tracked: &[Tracked],
        changed: bool,
        flush: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        let mut unused = Vec::new();
        if changed {
            let mut write = |one: &Tracked| this.write_bits(&one.entry.name, &one.bits, one.table.clone(), &mut unused);
            let tables: Result<Vec<_>> = tracked.iter().map(&mut write).collect();
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
        Ok(())
    }

    /// Writes bits where their table says, or to new clusters, and returns the new table. Clusters that it does
    /// not need any more go to `unused`.
    pub(super) fn write_bits(
        &self,
        name: &str,
        bits: &Bits,
        mut table: Vec<u64>,
        unused: &mut Vec<u64>,
    ) -> Result<Vec<u64>> {
        let cluster = self.geometry().cluster_size();
        let mut bytes = vec![0; cluster as usize];
        for (at, entry) in (0..).step_by(cluster as usize).zip(&mut table) {
            let place = Some(*entry).filter(|place| *place >= cluster);
            if !bits.to_bytes(at, &mut bytes) {
                unused.extend(place);
                *entry = 0;
                continue;
            }
            let place = match place {
                Some(place) => place,
                None => self.lock().space()?.take(1)?.run.start << self.geometry().cluster_bits,
            };
            let written = self.storage.write_at(place, &bytes);
            written.context(|| format!("bitmap {name}: writing its bits at {place}"))?;
            *entry = place;
        }
        Ok(table)
    }

    pub(in crate::qcow2) fn settle_with(this: &Arc<Self>, flush: &dyn Fn() -> Result<()>) -> Result<()> {
        let mut progress = Progress::default();
        loop {
            match Self::settle(this, &mut progress)? {
                Settle::Flush => flush()?,
                // Durable already: nobody has written since the settle in front of the close.
                Settle::FlushPayload => {}
                Settle::Done => return Ok(()),
                Settle::Busy => return Err(Error::invalid("somebody else is settling the image")),
            }
        }
    }
}
