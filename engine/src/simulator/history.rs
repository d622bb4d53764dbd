//! What each sector may hold: every write with when it began and ended, and whether it is durable.
//!
//! A value may be seen unless a later write certainly replaced it: one that began after the value's
//! own write had ended, and that the observer may count on.

/// One write of one sector.
#[derive(Clone, Copy, Debug)]
struct Entry {
    value: u64,
    begin: u64,
    /// `None`: not over. It may be there or not.
    end: Option<u64>,
    /// It may have left what was there: a discard, or a write that failed.
    weak: bool,
    durable: bool,
}

/// What an observer may count on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Every write that was answered before this moment.
    AnsweredBefore(u64),
    /// Every write that was answered, and flushed by a flush that was answered.
    Flushed,
}

/// The writes of all sectors.
#[derive(Clone)]
pub struct History {
    sectors: Vec<Vec<Entry>>,
    clock: u64,
}

impl History {
    /// Sectors with these values, durable since ever.
    pub fn new(values: impl Iterator<Item = u64>) -> Self {
        let entry = |value| vec![Entry { value, begin: 0, end: Some(0), weak: false, durable: true }];
        Self { sectors: values.map(entry).collect(), clock: 1 }
    }

    pub fn len(&self) -> usize {
        self.sectors.len()
    }

    pub fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    pub fn begin(&mut self, sector: usize, value: u64, now: u64) {
        self.sectors[sector].push(Entry { value, begin: now, end: None, weak: false, durable: false });
    }

    /// It is over; `weak` where what was there before may still be there.
    pub fn end(&mut self, sector: usize, begin: u64, now: u64, weak: bool) {
        let entry = self.sectors[sector].iter_mut().rfind(|entry| entry.begin == begin).expect("it began");
        (entry.end, entry.weak) = (Some(now), weak);
    }

    /// A write that is over is durable by itself.
    pub fn durable(&mut self, sector: usize, begin: u64) {
        let entry = self.sectors[sector].iter_mut().find(|entry| entry.begin == begin).expect("it began");
        entry.durable = true;
    }

    /// A flush that began then was answered.
    pub fn flushed(&mut self, begin: u64) {
        for entry in self.sectors.iter_mut().flatten() {
            entry.durable |= entry.end.is_some_and(|end| end < begin);
        }
    }

    /// True where `value` may be seen.
    pub fn allows(&self, sector: usize, value: u64, trust: Trust) -> bool {
        let entries = &self.sectors[sector];
        let counts = |entry: &Entry| {
            !entry.weak
                && match trust {
                    Trust::AnsweredBefore(moment) => entry.end.is_some_and(|end| end < moment),
                    Trust::Flushed => entry.durable,
                }
        };
        entries.iter().filter(|entry| entry.value == value).any(|entry| {
            let replaced = |other: &&Entry| counts(other) && entry.end.is_some_and(|end| other.begin > end);
            !entries.iter().any(|other| replaced(&other))
        })
    }

    /// Every write is over: what a sector holds now is what it holds.
    pub fn settle(&mut self, sector: usize, value: u64) {
        let now = self.clock;
        self.sectors[sector] = vec![Entry { value, begin: now, end: Some(now), weak: false, durable: true }];
    }

    pub fn describe(&self, sector: usize) -> String {
        format!("{:x?}", self.sectors[sector])
    }
}
