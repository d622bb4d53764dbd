//! Memory that the kernel reads and writes while we do not look.
//!
//! An `Arena` is one page-aligned region whose size is the bound of what its thread has in flight;
//! the ring registers it once. A `Buffer` is the only view of its bytes. It is lent out in pieces by
//! a `Loan`, so that several operations can work on one buffer without anybody sharing a byte.
// UNSAFETY: aligned allocation and views of parts of it need raw pointers.
#![expect(unsafe_code)]
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Alignment and unit of allocation, in bytes: enough for direct I/O everywhere.
pub const PAGE: usize = 4096;

/// A region of memory to take buffers from. Clones are the same region.
#[derive(Clone, Debug)]
pub struct Arena(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    region: Region,
    pages: Mutex<Pages>,
}

impl Arena {
    /// A zeroed region of `len` bytes, rounded up to whole pages.
    ///
    /// The system backs it with memory as it is first used.
    pub fn new(len: usize) -> Self {
        let len = len.max(1).next_multiple_of(PAGE);
        Self::of(Region::new(len))
    }

    /// The same for what others can go on without: an error where the process may not have so much memory.
    pub fn allocate(len: usize) -> io::Result<Self> {
        let len = len.max(1).next_multiple_of(PAGE);
        let region = Region::allocate(len).ok_or_else(|| {
            io::Error::new(io::ErrorKind::OutOfMemory, format!("no memory for buffers of {len} bytes in all"))
        });
        region.map(Self::of)
    }

    fn of(region: Region) -> Self {
        let pages = Mutex::new(Pages::new(region.len / PAGE));
        Self(Arc::new(Inner { region, pages }))
    }

    /// A buffer of `len` bytes, page aligned; `None` where there is no room now.
    ///
    /// Its bytes are what their last user left.
    pub fn take(&self, len: usize) -> Option<Buffer> {
        let count = len.max(1).div_ceil(PAGE);
        let first = self.0.pages().take(count)?;
        let lease = Lease::Pages { arena: Arc::clone(&self.0), first, count };
        let start = self.0.region.at(first * PAGE);
        Some(Buffer { lease: Arc::new(lease), start, len })
    }

    /// The same, with memory of its own where there is no room now.
    pub fn buffer(&self, len: usize) -> Buffer {
        self.take(len).unwrap_or_else(|| Buffer::alone(len))
    }

    /// How many bytes the region has.
    pub fn len(&self) -> usize {
        self.0.region.len
    }

    /// Never: a region has a page at least.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Where the region begins, for the ring to register.
    pub(super) fn start(&self) -> *mut u8 {
        self.0.region.start.as_ptr()
    }

    /// Where `buffer` ends in the region; `None` where it is not a piece of it.
    pub(super) fn end_of(&self, buffer: &Buffer) -> Option<usize> {
        let mine = matches!(&*buffer.lease, Lease::Pages { arena, .. } if Arc::ptr_eq(arena, &self.0));
        mine.then(|| buffer.address().addr() + buffer.len - self.start().addr())
    }
}

impl Inner {
    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which pages of a region are taken, a bit each.
#[derive(Debug)]
struct Pages {
    taken: Vec<u64>,
    count: usize,
    /// Where the last search ended: small buffers come and go there.
    cursor: usize,
}

impl Pages {
    fn new(count: usize) -> Self {
        Self { taken: vec![0; count.div_ceil(64)], count, cursor: 0 }
    }

    fn take(&mut self, count: usize) -> Option<usize> {
        let first = self.find(self.cursor..self.count, count).or_else(|| self.find(0..self.count, count))?;
        self.set(first, count, true);
        self.cursor = first + count;
        Some(first)
    }

    fn give(&mut self, first: usize, count: usize) {
        self.set(first, count, false);
        self.cursor = first;
    }

    /// The first run of `count` free pages in `within`.
    fn find(&self, within: Range<usize>, count: usize) -> Option<usize> {
        let mut first = within.start;
        let mut page = first;
        while page - first < count {
            if page >= within.end {
                return None;
            }
            let word = self.taken[page / 64] >> (page % 64);
            if word == 0 {
                page = (page / 64 + 1) * 64;
            } else if word & 1 == 0 {
                page += word.trailing_zeros() as usize;
            } else {
                page += 1;
                first = page;
            }
        }
        (first + count <= within.end).then_some(first)
    }

    fn set(&mut self, first: usize, count: usize, taken: bool) {
        for page in first..first + count {
            let bit = 1 << (page % 64);
            assert!((self.taken[page / 64] & bit == 0) == taken, "a page is taken once and given back once");
            self.taken[page / 64] ^= bit;
        }
    }
}

/// Page-aligned memory.
#[derive(Debug)]
struct Region {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the allocation has one owner; who may touch which byte is settled by `Buffer`.
unsafe impl Send for Region {}
// SAFETY: a shared `Region` gives out addresses only, no bytes.
unsafe impl Sync for Region {}

impl Region {
    /// From here on memory is the system's own, in bytes: that is zeroed, and backed as it is first used. The allocator
    /// would fill it with zeroes, and so have all of it backed at once.
    const MAPPED_MIN: usize = 128 << 10;

    fn new(len: usize) -> Self {
        Self::allocate(len).unwrap_or_else(|| handle_alloc_error(Self::layout(len)))
    }

    fn allocate(len: usize) -> Option<Self> {
        let start = match len >= Self::MAPPED_MIN {
            true => {
                let (access, how) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
                // SAFETY: a new mapping, wherever there is room.
                unsafe { mmap_anonymous(std::ptr::null_mut(), len, access, how) }.ok()?.cast()
            }
            // SAFETY: the layout's size is a whole number of pages and not zero.
            false => unsafe { alloc_zeroed(Self::layout(len)) },
        };
        Some(Self { start: NonNull::new(start)?, len })
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len, PAGE).expect("whole pages, fewer than the address space")
    }

    fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.len);
        // SAFETY: inside the allocation, as asserted.
        unsafe { self.start.add(offset) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        match self.len >= Self::MAPPED_MIN {
            // SAFETY: mapped in `allocate` with this length. It can fail only where the system has no room for its notes of a
            // mapping that is cut in two, which this one is not.
            true => drop(unsafe { munmap(self.start.as_ptr().cast(), self.len) }),
            // SAFETY: allocated in `allocate` with this very layout.
            false => unsafe { dealloc(self.start.as_ptr(), Self::layout(self.len)) },
        }
    }
}

/// What keeps a buffer's memory, and takes it back when the last piece is gone.
#[derive(Debug)]
enum Lease {
    Pages { arena: Arc<Inner>, first: usize, count: usize },
    Alone(#[expect(dead_code, reason = "owned, never looked at")] Region),
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Self::Pages { arena, first, count } = self {
            arena.pages().give(*first, *count);
        }
    }
}

/// The only view of some bytes of an arena, or of memory of its own.
#[derive(Debug)]
pub struct Buffer {
    lease: Arc<Lease>,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: no other `Buffer` has these bytes, and their memory is kept by the lease, which is `Send`.
unsafe impl Send for Buffer {}
// SAFETY: a shared buffer gives shared bytes.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// A buffer of `len` zeroed bytes in memory of its own: for what is too large or too rare for
    /// an arena.
    pub fn alone(len: usize) -> Self {
        let region = Region::new(len.max(1).next_multiple_of(PAGE));
        let start = region.start;
        Self { lease: Arc::new(Lease::Alone(region)), start, len }
    }

    /// Keeps the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Keeps the first `len` bytes and gives the rest as a buffer of its own.
    pub fn split_off(&mut self, len: usize) -> Self {
        assert!(len <= self.len);
        // SAFETY: at most one past the end of our own bytes.
        let start = unsafe { self.start.add(len) };
        let rest = Self { lease: Arc::clone(&self.lease), start, len: self.len - len };
        self.len = len;
        rest
    }

    /// The address, for the kernel and for questions of alignment.
    pub fn address(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: valid and initialised while the lease lives, and ours alone: a buffer that the
        // kernel has is inside an `Op` that its queue owns, so nobody can call this then.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// A buffer that is lent out in pieces, from front to back, and is whole again when all are back.
#[derive(Debug)]
pub struct Loan {
    whole: Buffer,
    /// How many bytes were lent, from the front.
    lent: usize,
    /// How many of them came back.
    back: usize,
}

impl Loan {
    /// Nothing lent yet.
    pub fn new(whole: Buffer) -> Self {
        Self { whole, lent: 0, back: 0 }
    }

    /// The next `len` bytes.
    pub fn lend(&mut self, len: usize) -> Buffer {
        assert!(len <= self.whole.len - self.lent, "no byte is lent twice");
        // SAFETY: at most one past the end of the buffer's own bytes.
        let start = unsafe { self.whole.start.add(self.lent) };
        self.lent += len;
        Buffer { lease: Arc::clone(&self.whole.lease), start, len }
    }

    /// `len` bytes from `at` on; what is before them and was not lent stays here for good.
    pub fn lend_at(&mut self, at: usize, len: usize) -> Buffer {
        assert!(at >= self.lent, "pieces are lent from front to back");
        self.back += at - self.lent;
        self.lent = at;
        self.lend(len)
    }

    /// True where `buffer` was lent from here.
    pub fn is_mine(&self, buffer: &Buffer) -> bool {
        Arc::ptr_eq(&buffer.lease, &self.whole.lease)
    }

    /// Takes a piece back, whole or in parts.
    pub fn give_back(&mut self, piece: Buffer) {
        assert!(self.is_mine(&piece), "a piece of this buffer");
        self.back += piece.len;
        assert!(self.back <= self.lent, "a piece comes back once");
    }

    /// True where nothing is lent.
    pub fn is_whole(&self) -> bool {
        self.back == self.lent
    }

    /// The bytes, which can be lent once more from the front on.
    pub fn again(&mut self) -> &[u8] {
        assert!(self.is_whole(), "every piece is back");
        (self.lent, self.back) = (0, 0);
        &self.whole
    }

    /// The buffer, whole.
    pub fn end(self) -> Buffer {
        assert!(self.is_whole(), "every piece is back");
        self.whole
    }
}

#[cfg(test)]
mod tests {
    use super::{Arena, Buffer, Loan, PAGE};

    #[test]
    fn an_arena_gives_each_page_once() {
        let arena = Arena::new(130 * PAGE);
        let mut held: Vec<Buffer> = (0..13).map(|_| arena.take(10 * PAGE).expect("room")).collect();
        assert!(arena.take(1).is_none());
        for (n, buffer) in held.iter_mut().enumerate() {
            buffer.fill(n as u8);
        }
        assert!(held.iter().enumerate().all(|(n, buffer)| buffer.iter().all(|byte| *byte == n as u8)));
        held.remove(6);
        assert_eq!(arena.take(10 * PAGE).expect("what was given back").len(), 10 * PAGE);
        drop(held);
        assert!(arena.take(130 * PAGE).is_some());
    }

    #[test]
    fn memory_is_kept_until_the_last_piece_is_gone() {
        let arena = Arena::new(2 * PAGE);
        let mut head = arena.take(2 * PAGE).expect("room");
        let tail = head.split_off(100);
        drop(head);
        assert!(arena.take(1).is_none());
        drop(tail);
        assert!(arena.take(1).is_some());
    }

    #[test]
    fn a_loan_is_whole_when_all_is_back() {
        let mut loan = Loan::new(Buffer::alone(10_000));
        let (mut a, mut b) = (loan.lend(1_000), loan.lend(9_000));
        a.fill(1);
        b.fill(2);
        loan.give_back(b);
        loan.give_back(a);
        let whole = loan.end();
        assert!(whole[..1_000].iter().all(|byte| *byte == 1) && whole[1_000..].iter().all(|byte| *byte == 2));
    }

    #[test]
    #[should_panic(expected = "every piece is back")]
    fn a_loan_with_a_piece_out_cannot_end() {
        let mut loan = Loan::new(Buffer::alone(100));
        let _piece = loan.lend(10);
        loan.end();
    }
}
