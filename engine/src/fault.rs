//! Faults planted for the simulator: each breaks one order that must not change, to show that the
//! simulator would see it. In the program none exists.

/// A broken order. The numbers are those of the promises in `docs/reliability.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// 1: the mapping is looked at while writes that mark nothing are still under way.
    LookBeforeOldWritesEnd,
    /// 1: copies begin while writes that mark nothing are still under way.
    CopyBeforeOldWritesEnd,
    /// 2: a guest write marks its chunks before the source has it.
    MarkBeforeWrite,
    /// 2: a guest write that failed marks nothing.
    NoMarkOnFailure,
    /// 3: the copier looks where a chunk lives and reads it before it clears the mark.
    ClearAfterCopy,
    /// 3: a copy that failed does not mark again.
    NoMarkAgain,
    /// 4: a write to both sides claims its chunks around the target's write alone.
    ClaimTargetOnly,
    /// 5: zeroes are taken for "nothing to do".
    SkipZeroes,
    /// 6: the pivot does not wait for the requests inside.
    PivotWithoutDrain,
    /// 6: the pivot does not wait for the copies under way.
    PivotWithoutLastPass,
    /// 7: the record overwrites the slot that counts.
    OverwriteTheNewestSlot,
    /// 8: the target is not flushed before the record.
    RecordBeforeFlush,
    /// 8: an external data file is not flushed before the mappings of what is in it.
    MapBeforePayload,
    /// 8: a new mapping is not kept in the journal.
    ForgetInKill,
    /// 9: the gate opens on the source after the record.
    SourceAfterRecord,
    /// 12: a server that said ACK to STARTTLS is spoken to in plain.
    PlainBehindStartTls,
}

#[cfg(test)]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Fault>> = const { std::cell::Cell::new(None) };
}

/// True where this very fault is planted on this thread.
#[cfg(test)]
pub fn planted(fault: Fault) -> bool {
    PLANTED.get() == Some(fault)
}

/// Never.
#[cfg(not(test))]
#[inline(always)]
pub fn planted(_: Fault) -> bool {
    false
}

/// Plants a fault on this thread, or removes it.
#[cfg(test)]
pub fn plant(fault: Option<Fault>) {
    PLANTED.set(fault);
}
