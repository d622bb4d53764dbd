//! Reading back what the target has: which chunks were equal on both sides since that was asked for.
//!
//! It goes on under guests that write. Order is everything here:
//!
//! 1. A chunk is claimed as for a copy before either side is read, and let go when both are: no copier, and no guest that
//!    writes to both sides, changes the target meanwhile. Without, what a copy has half written would be a mismatch.
//! 2. Sides that differ are no mismatch yet, for the source may have a guest's write whose mark is still to come. After
//!    both were read, first the writes in flight are looked at, then the marks. A write marks, and then lands, so it is
//!    found by one of the two looks. The other way round it marks and lands between them, and is found by neither: a
//!    mismatch that is none. Marks do not go meanwhile, for only a claim clears them.
//! 3. What differs, for whatever reason, is brought over under the same claim and read back once more, against the bytes
//!    that were sent. So a chunk that a guest writes all the time is verified in one go like any other, and a mismatch is
//!    mended before the claim is gone: a kill in between finds the claim, and copies again.
//! 4. It counts as verified when it was equal once with its claim held. What guests write later is followed as ever.
//! 5. It begins nothing unless the job is ready and not being ended. Who has counted its claim looks whether it may, and
//!    who ends the job first forbids it and then looks for claims: one of the two sees the other.
use super::Mirror;
use crate::dirty::{Claim, DirtyBitmap};
use crate::sync::{MutexGuard, Ordering};
use formats::range::ByteRange;
use std::collections::VecDeque;
use std::sync::PoisonError;

/// How many ranges may wait for another try before nothing new is begun.
const LATER_MAX: usize = 1024;
/// How many ranges are tried in one look for a claim.
const TRIES: usize = 64;

/// How a verification stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes that were equal once since it began.
    pub bytes: u64,
    /// How often the target had other bytes than it was given, with no write of a guest to explain it.
    pub mismatches: u64,
    /// Where that was first, and where last.
    pub first_at: Option<u64>,
    /// See `first_at`.
    pub last_at: Option<u64>,
}

impl Verified {
    /// True where every byte was equal once.
    pub fn is_complete(&self) -> bool {
        self.bytes == self.size
    }
}

/// Some chunks that are being verified.
#[must_use = "chunks that are forgotten are never verified"]
#[derive(Debug)]
pub struct Check {
    pub(super) claim: Claim,
    /// Their bytes.
    pub range: ByteRange,
    /// Which verification they are of.
    number: u64,
}

/// What became of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Both sides were equal.
    Equal,
    /// The target does not keep what it is given.
    Unequal,
    /// One side could not be read, or the target not be written.
    Failed,
}

impl Mirror {
    /// From now on every chunk is read back from the target once, and held against the source.
    pub fn verify(&self) {
        self.verification().begin(self.source.size());
        self.work.ring();
    }

    /// Lets that go on, or begin nothing more.
    pub fn set_verifying(&self, on: bool) {
        if self.verifies.swap(on, Ordering::SeqCst) != on && on {
            self.work.ring();
        }
    }

    /// What was not equal is read once more.
    pub fn verify_again(&self) {
        if self.verification().again() {
            self.work.ring();
        }
    }

    /// True where there may be something to verify.
    pub fn is_verifying(&self) -> bool {
        self.verifies.load(Ordering::SeqCst)
    }

    /// How far it is; `None` where nobody asked for it.
    pub fn verified(&self) -> Option<Verified> {
        self.verification().stands()
    }

    /// The next chunks to be verified, of `len_max` bytes at most.
    pub fn take_to_verify(&self, len_max: u64) -> Option<Check> {
        self.counted(|| match self.is_verifying() {
            true => self.verification().take(&self.dirty, len_max),
            false => None,
        })
    }

    /// A copier is done with them; `brought` where the target was changed.
    pub fn put_verified(&self, check: Check, brought: bool, outcome: Outcome) {
        if self.verification().put(&check, outcome) {
            tracing::info!("{}: all of it was read back", self.target.name());
        }
        let failed = outcome == Outcome::Failed;
        if failed {
            self.dirty.mark(check.range);
        }
        self.put_counted(check.claim, brought, failed);
    }

    /// True where a guest's write may be why the two sides differ in `range`, which is claimed and was read: it has
    /// reached the source, and is not on the target yet. In this order: see `verification`.
    pub fn is_being_written(&self, range: ByteRange) -> bool {
        self.planes.is_in_flight(range) || self.dirty.is_marked(range)
    }

    /// The target has other bytes than it was given, from `at` on.
    pub fn mismatch(&self, check: &Check, at: u64) {
        let count = self.verification().mismatch(check, at);
        // Not a line for each chunk of a target that was overwritten as a whole.
        if count <= 16 || count.is_power_of_two() {
            tracing::error!("{}: mismatch {count}: other bytes than it was given, at {at}", self.target.name());
        }
        self.progress.ring();
    }

    fn verification(&self) -> MutexGuard<'_, Verification> {
        self.verification.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The verification that was asked for last.
#[derive(Debug, Default)]
pub(super) struct Verification {
    number: u64,
    stands: Option<Verified>,
    /// From here on nobody has looked.
    next: u64,
    /// What could not be claimed, or has to be looked at again.
    later: VecDeque<ByteRange>,
    /// What was not equal, or could not be read: it waits for `again`.
    resting: Vec<ByteRange>,
}

impl Verification {
    /// Begins anew, on a disk of `size` bytes.
    pub fn begin(&mut self, size: u64) {
        let stands = Some(Verified { size, ..Verified::default() });
        *self = Self { number: self.number + 1, stands, ..Self::default() };
    }

    /// `None` where none was ever asked for.
    pub fn stands(&self) -> Option<Verified> {
        self.stands
    }

    /// The next chunks, of `len_max` bytes at most, claimed.
    pub fn take(&mut self, dirty: &DirtyBitmap, len_max: u64) -> Option<Check> {
        let size = self.stands?.size;
        for _ in 0..TRIES {
            let range = match self.next < size && self.later.len() < LATER_MAX {
                true => ByteRange { start: self.next, end: (self.next + len_max).min(size) },
                false => self.later.pop_front()?,
            };
            self.next = self.next.max(range.end);
            let Some(claim) = dirty.claim_some(range) else {
                let first = range.prefix(dirty.chunk_len());
                self.put_off(ByteRange { start: first.end, ..range });
                self.later.push_back(first);
                continue;
            };
            let claimed = dirty.claimed(&claim);
            self.put_off(ByteRange { start: claimed.end, ..range });
            return Some(Check { claim, range: claimed, number: self.number });
        }
        None
    }

    /// The rest of what was looked at is the next to be looked at.
    fn put_off(&mut self, rest: ByteRange) {
        if rest.is_empty() {
            return;
        }
        match rest.end == self.next {
            true => self.next = rest.start,
            false => self.later.push_front(rest),
        }
    }

    /// `check` is over. True where that was the last of it.
    pub fn put(&mut self, check: &Check, outcome: Outcome) -> bool {
        let Some(stands) = self.stands.as_mut().filter(|_| check.number == self.number) else { return false };
        match outcome {
            Outcome::Equal => stands.bytes += check.range.len(),
            Outcome::Unequal | Outcome::Failed => self.resting.push(check.range),
        }
        outcome == Outcome::Equal && stands.is_complete()
    }

    /// What was not equal may be tried again. True where there is any.
    pub fn again(&mut self) -> bool {
        self.later.extend(&self.resting);
        !std::mem::take(&mut self.resting).is_empty()
    }

    /// The target has other bytes than it was given, from `at` on. How often that was.
    pub fn mismatch(&mut self, check: &Check, at: u64) -> u64 {
        let Some(stands) = self.stands.as_mut().filter(|_| check.number == self.number) else { return 0 };
        stands.mismatches += 1;
        stands.first_at.get_or_insert(at);
        stands.last_at = Some(at);
        stands.mismatches
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::{Outcome, Verification};
    use crate::dirty::DirtyBitmap;
    use formats::range::ByteRange;

    const CHUNK: u64 = 1 << 12;

    fn range(first: u64, end: u64) -> ByteRange {
        ByteRange { start: first * CHUNK, end: end * CHUNK }
    }

    #[test]
    fn every_chunk_is_verified_once_whatever_is_claimed_meanwhile() {
        let dirty = DirtyBitmap::new(20 * CHUNK - 7, 12);
        let mut verification = Verification::default();
        assert!(verification.take(&dirty, 4 * CHUNK).is_none(), "nobody asked for it");
        verification.begin(20 * CHUNK - 7);
        let elsewhere = dirty.claim(range(2, 3)).expect("free");
        let mut taken = Vec::new();
        while let Some(check) = verification.take(&dirty, 4 * CHUNK) {
            taken.push(check);
        }
        let found: Vec<ByteRange> = taken.iter().map(|check| check.range).collect();
        assert_eq!(found[..3], [range(0, 2), range(3, 7), range(7, 11)]);
        dirty.release(elsewhere);
        let last = verification.take(&dirty, 4 * CHUNK).expect("it was put off");
        assert_eq!(last.range, range(2, 3));
        taken.push(last);
        for check in taken {
            assert!(!verification.put(&check, Outcome::Unequal));
            dirty.release(check.claim);
        }
        assert!(verification.take(&dirty, CHUNK).is_none(), "not at once");
        assert!(verification.again() && !verification.again());
        let mut over = false;
        while let Some(check) = verification.take(&dirty, CHUNK * 4) {
            assert!(!over, "nothing is left after the last");
            over = verification.put(&check, Outcome::Equal);
            dirty.release(check.claim);
        }
        assert!(over && verification.stands().is_some_and(|stands| stands.is_complete()));
    }

    #[test]
    fn what_is_of_an_earlier_one_does_not_count() {
        let dirty = DirtyBitmap::new(CHUNK, 12);
        let mut verification = Verification::default();
        verification.begin(CHUNK);
        let check = verification.take(&dirty, CHUNK).expect("free");
        verification.begin(CHUNK);
        assert_eq!(verification.mismatch(&check, 0), 0);
        assert!(!verification.put(&check, Outcome::Equal));
        let stands = verification.stands().expect("asked for");
        assert_eq!((stands.bytes, stands.mismatches), (0, 0));
    }
}
