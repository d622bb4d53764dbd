//! What may be found in each sector of a disk after a power cut: what was durable, or anything that
//! was written since.
use super::disk::{SECTOR, Sector};
use super::stamp::{overlay, sectors, tell};
use formats::range::ByteRange;

/// The time of what was written in place and not acknowledged.
const NEVER: u64 = u64::MAX;

/// What a sector held, and from when on that was committed.
#[derive(Clone)]
struct Version {
    content: Sector,
    committed: u64,
}

/// By sector: all that may be found, the last being there now.
pub struct History(Vec<Vec<Version>>);

impl History {
    /// A disk that has `bytes`, all of them durable.
    pub fn new(bytes: &[u8]) -> Self {
        let first = |content: &Sector| vec![Version { content: *content, committed: 0 }];
        Self(bytes.as_chunks::<SECTOR>().0.iter().map(first).collect())
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        (self.0.len() * SECTOR) as u64
    }

    /// The disk has so many bytes: zeroes are new, or the last ones are gone.
    pub fn resize(&mut self, size: u64) {
        self.0.resize(size as usize / SECTOR, vec![Version { content: [0; SECTOR], committed: 0 }]);
    }

    /// What `sector` has now.
    pub fn now(&self, sector: u64) -> &Sector {
        &self.last(sector).content
    }

    fn last(&self, sector: u64) -> &Version {
        self.0[sector as usize].last().expect("never empty")
    }

    /// The bytes of `range` now.
    pub fn bytes(&self, range: ByteRange) -> Vec<u8> {
        let all: Vec<u8> = sectors(range).flat_map(|sector| *self.now(sector)).collect();
        all[(range.start % SECTOR as u64) as usize..][..range.len() as usize].to_vec()
    }

    fn with(&self, sector: u64, range: ByteRange, bytes: &[u8]) -> Sector {
        let mut content = *self.now(sector);
        overlay(&mut content, sector, range, bytes);
        content
    }

    /// `bytes` are in `range` now, by a change that was committed at `time`.
    pub fn commit(&mut self, range: ByteRange, bytes: &[u8], time: u64) {
        for sector in sectors(range) {
            let content = self.with(sector, range, bytes);
            self.0[sector as usize].push(Version { content, committed: time });
        }
    }

    /// `bytes` were written where `range` is already, and are not acknowledged.
    pub fn write_in_place(&mut self, range: ByteRange, bytes: &[u8]) {
        self.commit(range, bytes, NEVER);
    }

    /// What was written in place to `range` is acknowledged.
    pub fn commit_in_place(&mut self, range: ByteRange, time: u64) {
        for sector in sectors(range) {
            self.0[sector as usize].last_mut().expect("never empty").committed = time;
        }
    }

    /// `bytes` were written to where `range` was before it was zeroed: until the zeroes are durable, a
    /// power cut may find them.
    pub fn write_where_it_was(&mut self, range: ByteRange, bytes: &[u8]) {
        for sector in sectors(range) {
            let (content, committed) = (self.with(sector, range, bytes), self.last(sector).committed);
            let versions = &mut self.0[sector as usize];
            versions.insert(versions.len() - 1, Version { content, committed });
        }
    }

    /// What was committed by `time` is durable: older versions cannot come back.
    pub fn settle(&mut self, time: u64) {
        for versions in &mut self.0 {
            if let Some(last) = versions.iter().rposition(|version| version.committed <= time) {
                versions.drain(..last);
            }
        }
    }

    /// The requests under way ended at `time`: what they wrote in place is there to stay.
    pub fn end_requests(&mut self, time: u64) {
        for version in self.0.iter_mut().flatten().filter(|version| version.committed == NEVER) {
            version.committed = time;
        }
    }

    /// Each sector of `found` is what it may be after a power cut.
    pub fn assert_possible(&self, found: &[u8]) {
        for (sector, (found, versions)) in found.as_chunks::<SECTOR>().0.iter().zip(&self.0).enumerate() {
            let possible = versions.iter().any(|version| version.content == *found);
            let told: Vec<String> = versions.iter().map(|version| tell(&version.content)).collect();
            assert!(possible, "sector {sector} has {}, possible is {told:?}", tell(found));
        }
    }

    /// Each sector of `found` is as it was last written.
    pub fn assert_now(&self, found: &[u8]) {
        for (sector, found) in (0..).zip(found.as_chunks::<SECTOR>().0) {
            let now = self.now(sector);
            assert!(now == found, "sector {sector} has {} and should have {}", tell(found), tell(now));
        }
    }
}
