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
    /// 2: a write to both sides whose target failed marks nothing.
    NoMarkOnTargetFailure,
    /// 2: a write to both sides that is answered without the target marks nothing.
    NoMarkWhenLate,
    /// 3: the copier looks where a chunk lives and reads it before it clears the mark.
    ClearAfterCopy,
    /// 3: a copy that failed does not mark again.
    NoMarkAgain,
    /// 3: a job is called ready while what failed was not brought over.
    ReadyWithoutWhatFailed,
    /// 3: a target that failed is tried again at once.
    TryAtOnce,
    /// 4: a guest's thread looks into the target's tables itself, whatever that waits for.
    TablesInGuest,
    /// 4: a write to both sides claims its chunks around the target's write alone.
    ClaimTargetOnly,
    /// 4: a write that the target has not ended is waited for no more, and its claim is released.
    ReleaseWhileLate,
    /// 4: a request looks at the mode twice: it writes by the first look, and marks by the second.
    LookAtTheModeTwice,
    /// 4: a write to both sides is marked all the same.
    MarkWhatBothHave,
    /// 5: zeroes are taken for "nothing to do".
    SkipZeroes,
    /// 6: the pivot does not wait for the requests inside.
    PivotWithoutDrain,
    /// 6: the pivot does not wait for the copies under way.
    PivotWithoutLastPass,
    /// 6: an end that waits to be finalized keeps the guests waiting.
    PendingHoldsGate,
    /// 7: the record overwrites the slot that counts.
    OverwriteTheNewestSlot,
    /// 7: the members of a group are recorded one by one.
    RecordApart,
    /// 8: the target of a pivot, or the disk below a snapshot, is not flushed before the record.
    RecordBeforeFlush,
    /// 8: the files of a snapshot's overlay are not durable before the record names it.
    RecordBeforeOverlay,
    /// 7: guests write to a snapshot's overlay before it is recorded.
    SwitchBeforeRecord,
    /// 8: an external data file is not flushed before the mappings of what is in it.
    MapBeforePayload,
    /// 8: a new mapping is not kept in the journal.
    ForgetInKill,
    /// 8: a disk that grew is shown before what is new reads as zeroes.
    GrownBeforeZeroes,
    /// 9: the gate opens on the source after the record.
    SourceAfterRecord,
    /// 10: a guest write is not noted before the source is touched.
    NoFlight,
    /// 10: the note of a guest write is taken away before its mark is there.
    LandBeforeMark,
    /// 10: a claim is released before its chunks are noted as unsettled.
    ReleaseBeforeUnsettled,
    /// 10: what is not settled is forgotten before the settle is over.
    ForgetBeforeSettled,
    /// 10: a job goes on with marks of whose chunks no part is noted.
    MarksWithoutParts,
    /// 10: a settle that is over forgets what was copied since it began.
    ForgetTheWrongGeneration,
    /// 10: the seeder's progress is noted ahead of its marks.
    SeenBeforeMarks,
    /// 10: a guest writes past the mirror of a job that ends before the planes say that they count no more.
    PassBeforeUnfollowed,
    /// 14: where both sides differ, marks are looked at before they are read, and flights after.
    MarksBeforeFlights,
    /// 15: after a pivot that keeps the source, guests write before the way back follows them.
    BackAfterOpen,
    /// 15: a mirror that was to go back is taken up without what its target had in the journal alone.
    ForgetOldJournal,
    /// 17: guests are not slowed where a deadline asks for it.
    LetGuestsGo,
    /// 17: guests are slowed as far as a bound asks for it, and further than they may be.
    SlowBeyondTheMost,
    /// 17: a job says that it is late when it is.
    SayItWhenItIsLate,
    /// 17: guests are spared again and again, where a copy in the background never gets ahead.
    SpareForEver,
    /// 17: the last pass of a pivot takes what it takes.
    PauseWithoutEnd,
    /// 12: a server that said ACK to STARTTLS is spoken to in plain.
    PlainBehindStartTls,
    /// 13: a write to another server's export is done while its bytes are still being sent.
    DoneBeforeSent,
    /// 16: what was received of requests that were not begun does not go along to another process.
    ForgetUnread,
    /// 16: a connection goes to its disk's thread before what its client is told has gone.
    MoveBeforeSent,
}

#[cfg(all(test, not(feature = "loom")))]
pub use kill::{Killed, kill_at_store, stored};

/// For the simulator's kills: nothing.
#[cfg(any(not(test), feature = "loom"))]
#[inline(always)]
pub fn stored(_: &std::sync::Arc<crate::io::Words>) {}

/// Kills in the middle of a step: a panic without a word, at a store to words that outlive the process.
#[cfg(all(test, not(feature = "loom")))]
mod kill {
    use crate::io::Words;
    use std::cell::RefCell;
    use std::panic::resume_unwind;
    use std::sync::Arc;

    /// What the panic carries.
    pub struct Killed;

    thread_local! {
        /// The words, and how many stores to them are made yet.
        static KILL: RefCell<Option<(Arc<Words>, u64)>> = const { RefCell::new(None) };
    }

    /// This thread is killed after so many more stores to `words`; `None` lets it live.
    pub fn kill_at_store(kill: Option<(Arc<Words>, u64)>) {
        KILL.set(kill);
    }

    /// Something was stored to `words`.
    pub fn stored(words: &Arc<Words>) {
        let killed = KILL.with_borrow_mut(|kill| {
            let Some((_, stores)) = kill.as_mut().filter(|(of, _)| Arc::ptr_eq(of, words)) else { return false };
            *stores = stores.saturating_sub(1);
            *stores == 0
        });
        if killed {
            KILL.set(None);
            resume_unwind(Box::new(Killed));
        }
    }
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
