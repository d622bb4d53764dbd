//! Metadata goes into the file: one settle, three flushes at most.
//!
//! ```text
//! stage      written                                   why it may be written now
//! START      nothing
//!   flush ── of an external data file, where there is one: payload is durable
//! COUNTS     refcounts, a moved refcount table         nothing needs them to be low
//!   flush ── payload in the image's own file is durable too
//! REFTABLE   entries of new refcount blocks, or        their blocks are durable
//!            the header that names the moved table
//!   flush ── (only where there was something)
//! MAPPINGS   L2 slices and L1 entries                  payload, refcounts and new tables are durable
//!   flush
//! FINISH     the journal forgets; what was let go of waits for `recycle`
//! ```
//!
//! Guests go on while this happens. What they commit after the first call may have payload that
//! no flush covers, so it must not reach the file: slices are written with the entries that they
//! had at the start (`State::frozen_bytes`), and stay dirty where they have newer ones. New
//! refcounts go out as they are; they are too high at worst.
//!
//! A new table needs no writing of its own: its cluster reads as zeroes, or as the shared table that it
//! is a copy of, from the moment it is taken.
//! A settle that is dropped before its end leaves everything dirty; the next one writes it again.
use super::Shared;
use super::fault::{Fault, planted};
use super::header::REFTABLE_AT;
use super::refcounts::FrozenRefcounts;
use super::state::Frozen;
use super::table;
use crate::error::{Context, Result};
use crate::image::{Hold, Progress, Settle};
use std::sync::Arc;
use std::sync::atomic::Ordering;

const START: u32 = 0;
/// Nothing was dirty: payload alone needs the flush.
const PAYLOAD: u32 = 1;
const COUNTS: u32 = 2;
const REFTABLE: u32 = 3;
const MAPPINGS: u32 = 4;
const FINISH: u32 = 5;

/// How many slices are copied out under the lock at a time.
const BATCH_SLICES: usize = 64;

impl Shared {
    /// One stage.
    pub(super) fn settle(this: &Arc<Self>, progress: &mut Progress) -> Result<Settle> {
        if progress.stage == START {
            if !this.writable {
                progress.stage = PAYLOAD;
                return Ok(this.flush_of_payload());
            }
            let mut state = this.lock();
            if state.is_settling() {
                return Ok(Settle::Busy);
            }
            // Nothing to write, unless the journal is full of what was written: only a whole settle empties it.
            if state.is_clean() && state.has_notes_left(&*this.journal) {
                progress.stage = PAYLOAD;
                return Ok(this.flush_of_payload());
            }
            this.refuse_damaged()?;
            let id = state.begin_settle(&*this.journal)?;
            drop(state);
            progress.hold = Some(Hold::new(this.clone(), id));
            progress.stage = COUNTS;
            if this.geometry().external_data && !planted(Fault::EntriesBeforePayload) {
                return Ok(Settle::FlushPayload);
            }
        }
        let frozen = this.lock().frozen();
        match frozen {
            Some(frozen) if progress.hold.is_some() => {
                this.refuse_damaged()?;
                this.next_stage(&frozen, progress)
            }
            _ => Ok(Settle::Done),
        }
    }

    fn flush_of_payload(&self) -> Settle {
        if self.geometry().external_data { Settle::FlushPayload } else { Settle::Flush }
    }

    fn next_stage(&self, frozen: &Frozen, progress: &mut Progress) -> Result<Settle> {
        if progress.stage == COUNTS {
            let moved = frozen.refs.table.is_some();
            if planted(if moved { Fault::HeaderBeforeTable } else { Fault::BlockEntryBeforeBlock }) {
                self.write_reftable(&frozen.refs)?;
            }
            if !planted(Fault::EntriesBeforeCounts) {
                self.write_counts(&frozen.refs)?;
            }
            progress.stage = REFTABLE;
            let counts = !frozen.refs.slices.is_empty() || frozen.refs.table.is_some();
            if (counts || !self.geometry().external_data) && !planted(Fault::EntriesBeforePayload) {
                return Ok(Settle::Flush);
            }
        }
        if progress.stage == REFTABLE {
            let written = self.write_reftable(&frozen.refs)?;
            progress.stage = MAPPINGS;
            if written {
                return Ok(Settle::Flush);
            }
        }
        if progress.stage == MAPPINGS {
            if planted(Fault::EntriesBeforeCounts) {
                self.write_counts(&frozen.refs)?;
            }
            self.write_mappings(frozen)?;
            progress.stage = FINISH;
            if !frozen.l1.is_empty() || !frozen.l2.is_empty() {
                return Ok(Settle::Flush);
            }
        }
        self.finish(progress);
        Ok(Settle::Done)
    }

    fn finish(&self, progress: &mut Progress) {
        let mut state = self.lock();
        if let Some(hold) = &progress.hold
            && state.end_settle(hold.id(), false)
        {
            self.journal.forget();
            state.forgotten();
            self.settles.store(state.settles(), Ordering::SeqCst);
        }
        drop(state);
        progress.hold = None;
    }

    /// What the first so many `settles` made durable that it was let go of is free.
    pub(super) fn recycle(&self, settles: u64) {
        if self.damage.get().is_none() {
            self.lock().release_awaiting(settles);
        }
    }

    fn write_counts(&self, frozen: &FrozenRefcounts) -> Result<()> {
        for keys in frozen.slices.chunks(BATCH_SLICES) {
            let mut writes = Writes::default();
            let mut state = self.lock();
            let refs = &mut state.space()?.refs;
            for key in keys {
                let at = refs.slice_at(*key);
                writes.at(at).extend_from_slice(refs.bytes(*key));
            }
            drop(state);
            self.write("refcounts", writes)?;
        }
        let Some(entries) = &frozen.table else { return Ok(()) };
        let mut writes = Writes::default();
        table::encode(entries.iter().copied(), writes.at(frozen.place.start << self.geometry().cluster_bits));
        self.write("the refcount table", writes)
    }

    /// Makes new refcount blocks known; says whether there were any.
    fn write_reftable(&self, frozen: &FrozenRefcounts) -> Result<bool> {
        let place = frozen.place.start << self.geometry().cluster_bits;
        let mut writes = Writes::default();
        if frozen.table.is_some() {
            // Twelve bytes of one sector: the old place or the new one, never half of each.
            let field = writes.at(REFTABLE_AT);
            field.extend_from_slice(&place.to_be_bytes());
            field.extend_from_slice(&(frozen.place.count as u32).to_be_bytes());
        }
        for (index, entry) in &frozen.entries {
            table::encode([*entry], writes.at(place + *index as u64 * 8));
        }
        let any = !writes.0.is_empty();
        self.write("the refcount table", writes)?;
        Ok(any)
    }

    fn write_mappings(&self, frozen: &Frozen) -> Result<()> {
        for keys in frozen.l2.chunks(BATCH_SLICES) {
            let mut writes = Writes::default();
            let state = self.lock();
            for key in keys {
                let at = state.slice_at(*key)?;
                state.frozen_bytes(*key, writes.at(at));
            }
            drop(state);
            self.write("L2 entries", writes)?;
        }
        let mut writes = Writes::default();
        let state = self.lock();
        for (index, entry) in &frozen.l1 {
            table::encode([*entry], writes.at(state.l1_entry_at(*index)));
        }
        drop(state);
        self.write("L1 entries", writes)
    }

    fn write(&self, what: &str, writes: Writes) -> Result<()> {
        for (at, bytes) in writes.0 {
            self.storage.write_at(at, &bytes).context(|| format!("writing {what} at {at}"))?;
        }
        Ok(())
    }
}

/// Bytes to write, in pieces that are not next to each other where they came in order.
#[derive(Default)]
struct Writes(Vec<(u64, Vec<u8>)>);

impl Writes {
    /// Where to add the bytes for `at`.
    fn at(&mut self, at: u64) -> &mut Vec<u8> {
        let joins = self.0.last().is_some_and(|(start, bytes)| start + bytes.len() as u64 == at);
        if !joins {
            self.0.push((at, Vec::new()));
        }
        &mut self.0.last_mut().expect("just put there").1
    }
}
