//! What a kill of the daemon must not make a mirror forget, beside its bitmap: which guest writes are under
//! way, what the target has in memory only, how far the seeder has come.
//!
//! Marks, claims and these lie in one file of the state folder, mapped into memory (`formats::planes`), so the
//! next daemon finds them as the last one left them at its last instruction. Then what it finds on the target
//! may differ from what it finds on the source only in chunks that are marked, claimed, unsettled or in
//! flight, or that the seeder has not seen. Order is everything here:
//!
//! 1. A guest's write is in flight before the source is touched, and until its mark is there or the target has
//!    it and its claim is gone. Also one that nobody is told of: a guest may have read its bytes, and would read
//!    the old ones after the pivot.
//! 2. What a copier, or a guest that writes to both sides, brought to the target is unsettled before its claim
//!    is released. The other way round, it is nowhere for a moment, and a kill loses the target's mapping.
//! 3. The generation is looked at after the target has the bytes. A settle turns the generation before it
//!    begins; so what is noted in the old one was there when the settle began, and may be forgotten when it is
//!    over, and not before.
//! 4. The seeder marks, and then says how far it has come.
//! 5. A job that ends says that its planes count no more, and then lets the guest write past its mirror. A kill between
//!    that and the end of the job leaves them behind.
//!
//! After another run of the system none of this holds, for a power cut takes what was not flushed from either
//! side: then source and target are compared, unless the last daemon left in order.
mod taken;

pub use taken::{TakenUp, Why};

use crate::bell::Bell;
use crate::dirty::{DirtyBitmap, words};
use crate::fault::{Fault, planted};
use crate::io::{View, Words};
use crate::sync::{AtomicU64, Ordering, fence};
use formats::planes::{
    COMPARE, FIXED_WORDS, GENERATION, HEADER_WORDS, Header, IN_ORDER, IN_ORDER_MARK, SEAL, SEEN, TAKING, UNFOLLOWED,
    seal,
};
use formats::range::ByteRange;
use std::sync::Arc;

/// What a mirror keeps through a kill; nothing where nobody would take it up.
#[derive(Default)]
pub struct Planes {
    kept: Option<Kept>,
    /// Rings when a guest's write is in flight no more.
    landed: Bell,
}

struct Kept {
    all: View,
    header: View,
    unsettled: [View; 2],
    flights: View,
    chunk_bits: u32,
    /// A kill loses something of what the target was told.
    settles: bool,
    /// Where the next flight looks for a place first.
    next: AtomicU64,
    /// Bytes that became unsettled since the generation was turned last.
    unsettled_len: AtomicU64,
}

/// A guest's write under way.
#[must_use = "a flight that never lands keeps its place"]
#[derive(Debug)]
pub struct Flight(Option<usize>);

impl Planes {
    /// The bitmap and the planes that lie in `words` as `taken` was laid out there. `settles` where a kill
    /// loses something of what the target was told.
    pub fn on(words: &Arc<Words>, header: &Header, settles: bool) -> (DirtyBitmap, Self) {
        let layout = header.layout();
        let view = |range| View::new(words, range);
        let kept = Kept {
            all: view(0..layout.words()),
            header: view(0..HEADER_WORDS),
            unsettled: layout.unsettled.map(view),
            flights: view(layout.flights),
            chunk_bits: header.chunk_bits,
            settles,
            next: AtomicU64::new(0),
            unsettled_len: AtomicU64::new(0),
        };
        let dirty = DirtyBitmap::on(header.size, header.chunk_bits, view(layout.marks), view(layout.claims));
        (dirty, Self { kept: Some(kept), landed: Bell::default() })
    }

    /// Bytes of memory that they take, beside the bitmap.
    pub fn memory(&self) -> u64 {
        let views = |kept: &Kept| {
            let views = [&kept.header, &kept.flights].into_iter().chain(&kept.unsettled);
            views.map(|view| view.count() as u64 * 8).sum()
        };
        self.kept.as_ref().map_or(0, views)
    }

    /// A guest's write of `range` is about to touch the source. `None` while there is no place for it: listen
    /// at `landed`, and ask again.
    pub fn depart(&self, range: ByteRange) -> Option<Flight> {
        let Some(kept) = self.kept.as_ref().filter(|_| !planted(Fault::NoFlight)) else { return Some(Flight(None)) };
        kept.depart(range).map(|place| Flight(Some(place)))
    }

    /// Its mark is there, or the target has it.
    pub fn land(&self, flight: Flight) {
        if let (Some(kept), Some(place)) = (&self.kept, flight.0) {
            kept.flights.store(2 * place + 1, 0);
            self.landed.ring();
        }
    }

    /// True where a guest's write of some of `range` may be in flight. Where flights are not noted nobody knows.
    pub fn is_in_flight(&self, range: ByteRange) -> bool {
        self.kept.as_ref().is_none_or(|kept| kept.is_in_flight(range))
    }

    /// Rings when a place for a flight becomes free.
    pub fn landed(&self) -> &Bell {
        &self.landed
    }

    /// The target has `range`, and its claim is still held.
    pub fn brought(&self, range: ByteRange) {
        if let Some(kept) = self.kept.as_ref().filter(|kept| kept.settles) {
            kept.brought(range);
        }
    }

    /// A settle of the target is about to begin.
    pub fn turn(&self) {
        if let Some(kept) = &self.kept {
            kept.unsettled_len.store(0, Ordering::Relaxed);
            kept.header.store(GENERATION, 1 - kept.present() as u64);
            fence(Ordering::SeqCst);
        }
    }

    /// The settle is over, and the target has for good what it was told before it.
    pub fn settled(&self) {
        if let Some(kept) = &self.kept {
            let wrong = usize::from(planted(Fault::ForgetTheWrongGeneration));
            let old = &kept.unsettled[(1 - kept.present()) ^ wrong];
            (0..old.count()).filter(|word| old.load(*word) != 0).for_each(|word| old.store(word, 0));
        }
    }

    /// Bytes that a kill would have copied again, as far as the present generation knows.
    pub fn unsettled_len(&self) -> u64 {
        self.kept.as_ref().map_or(0, |kept| kept.unsettled_len.load(Ordering::Relaxed))
    }

    /// Everything before `at` is marked that has to be brought over.
    pub fn seen(&self, at: u64) {
        if let Some(kept) = &self.kept {
            kept.header.store(SEEN, at);
        }
    }

    /// The guest is about to write past the mirror.
    pub fn unfollow(&self) {
        if let Some(kept) = self.kept.as_ref().filter(|_| !planted(Fault::PassBeforeUnfollowed)) {
            kept.header.store(UNFOLLOWED, 1);
        }
    }

    /// Leaves in order: nobody writes to either side any more, and both are durable. True where there is something
    /// to be made durable by who has the file.
    pub fn leave(&self) -> bool {
        let Some(kept) = &self.kept else { return false };
        kept.unsettled.iter().for_each(|plane| (0..plane.count()).for_each(|word| plane.store(word, 0)));
        let words: Vec<u64> = (0..kept.all.count()).map(|word| kept.all.load(word)).collect();
        kept.header.store(SEAL, seal(&words));
        kept.header.store(IN_ORDER, IN_ORDER_MARK);
        true
    }

    /// Marked chunks need not be compared any more: everything was looked at once.
    pub fn compared(&self) {
        if let Some(kept) = &self.kept {
            kept.header.store(COMPARE, 0);
        }
    }
}

impl Kept {
    fn present(&self) -> usize {
        (self.header.load(GENERATION) & 1) as usize
    }

    /// The place that it got.
    fn depart(&self, range: ByteRange) -> Option<usize> {
        let places = self.flights.count() / 2;
        let first = self.next.fetch_add(1, Ordering::Relaxed) as usize;
        let place = (0..places).map(|step| (first + step) % places).find(|place| self.take_place(*place))?;
        self.flights.store(2 * place, range.start);
        // From here on it counts.
        self.flights.store(2 * place + 1, range.len());
        Some(place)
    }

    /// A place may get another flight between the two looks: the first one has landed by then, and marked before, and
    /// the second one began after this look.
    fn is_in_flight(&self, range: ByteRange) -> bool {
        (0..self.flights.count() / 2).any(|place| match self.flights.load(2 * place + 1) {
            0 => false,
            TAKING => true,
            len => ByteRange::new(self.flights.load(2 * place), len).is_none_or(|flight| flight.overlaps(range)),
        })
    }

    fn take_place(&self, place: usize) -> bool {
        self.flights.load(2 * place + 1) == 0 && self.flights.exchange(2 * place + 1, 0, TAKING)
    }

    fn brought(&self, range: ByteRange) {
        // The target's bytes before the look at the generation: see `turn`.
        fence(Ordering::SeqCst);
        let plane = &self.unsettled[self.present()];
        for (word, bits) in words(range.start >> self.chunk_bits, range.end.div_ceil(1 << self.chunk_bits)) {
            plane.set(word, bits);
        }
        self.unsettled_len.fetch_add(range.len(), Ordering::Relaxed);
    }
}

/// Puts what a job goes on with, or begins with, into words that are all zero.
pub fn lay_out(words: &Arc<Words>, header: &Header, taken: &TakenUp) {
    let all = View::new(words, 0..header.layout().words());
    (0..FIXED_WORDS).zip(header.words()).for_each(|(at, word)| all.store(at, word));
    all.store(SEEN, taken.seen);
    all.store(COMPARE, u64::from(taken.compare));
    let marks = taken.marks.iter().enumerate().filter(|(_, bits)| **bits != 0);
    marks.for_each(|(word, bits)| all.store(header.layout().marks.start + word, *bits));
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::{Planes, TakenUp, lay_out};
    use crate::dirty::Which;
    use crate::io::Words;
    use formats::planes::{Header, Left};
    use formats::range::ByteRange;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    fn header() -> Header {
        Header {
            boot: [1, 2],
            job: 3,
            size: 1 << 20,
            chunk_bits: 12,
            flights: 2,
            source: (4, 5),
            target: (6, 7),
            target_is_zero: false,
        }
    }

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange { start: start << 12, end: end << 12 }
    }

    /// What the next daemon would have to copy, in chunks.
    fn dirty(words: &Words) -> Vec<u64> {
        let words: Vec<u64> = words.iter().map(|word| word.load(Ordering::Relaxed)).collect();
        let dirty = Left::parse(&words).expect("planes").dirty().expect("inside the disk");
        (0..256).filter(|chunk| dirty[chunk / 64] >> (chunk % 64) & 1 == 1).map(|chunk| chunk as u64).collect()
    }

    #[test]
    fn everything_under_way_is_found_by_the_next_daemon() {
        let words = Arc::new(Words::in_memory(header().layout().words()));
        lay_out(&words, &header(), &TakenUp::nothing(&header()));
        let (map, planes) = Planes::on(&words, &header(), true);
        let flight = planes.depart(range(1, 3)).expect("a place");
        let other = planes.depart(range(200, 201)).expect("a place");
        assert!(planes.depart(range(0, 1)).is_none(), "two places");
        assert_eq!(dirty(&words), [1, 2, 200]);
        map.mark(range(1, 3));
        planes.land(flight);
        planes.land(other);
        assert_eq!(dirty(&words), [1, 2]);
        let claim = map.take(range(0, 256), 1, Which::Any).expect("marked");
        assert_eq!(dirty(&words), [1, 2]);
        planes.brought(map.claimed(&claim));
        map.release(claim);
        assert_eq!(dirty(&words), [1, 2], "not settled");
        planes.turn();
        let claim = map.take(range(0, 256), 1, Which::Any).expect("marked");
        planes.brought(map.claimed(&claim));
        map.release(claim);
        planes.settled();
        assert_eq!(dirty(&words), [2], "copied after the settle began");
        planes.turn();
        // It failed.
        planes.turn();
        assert_eq!(dirty(&words), [2]);
        planes.settled();
        assert!(dirty(&words).len() <= 1);
        planes.turn();
        planes.settled();
        assert!(dirty(&words).is_empty());
    }

    #[test]
    fn a_bitmap_that_is_taken_up_knows_its_marks() {
        let words = Arc::new(Words::in_memory(header().layout().words()));
        let marks = header().all_before(3 << 12);
        lay_out(&words, &header(), &TakenUp { marks, ..TakenUp::nothing(&header()) });
        let (map, _) = Planes::on(&words, &header(), true);
        assert_eq!(map.marked_bytes(), 3 << 12);
        let claim = map.take(range(0, 256), 9, Which::Any).expect("marked");
        assert_eq!(map.claimed(&claim), range(0, 3));
        assert!(map.is_clean());
        map.release(claim);
    }
}
