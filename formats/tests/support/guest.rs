//! A guest on an image: it writes, zeroes, discards and flushes with several requests in flight,
//! and remembers for each sector what may be found there.
//!
//! Sectors are filled with a tag that no other write has, so a stale or misplaced one is seen.
use super::disk::{Disk, SECTOR};
use super::notes::Notes;
use super::qemu::{check_of_qemu, with_snapshot};
use super::random::Random;
use formats::image::{Image, Place, Progress, Reservation, Reserve, Settle, Zeroed, Zeroing};
use formats::qcow2::{Check, Open, Qcow2, check, read_header, snapshots};
use formats::range::ByteRange;
use formats::storage::Storage;
use std::collections::HashMap;
use std::sync::Arc;

const SECTOR_BYTES: u64 = SECTOR as u64;
/// Tags from here on are of the image below, one a sector.
const BACKING: u64 = 1 << 60;
/// The time of what was written in place and not committed.
const NEVER: u64 = u64::MAX;
const IN_FLIGHT_MAX: usize = 6;

/// What a sector held, and from when on that was committed.
#[derive(Clone, Debug)]
struct Version {
    tag: u64,
    committed: u64,
}

/// A write that is not committed.
struct InFlight {
    reservation: Reservation,
    tag: u64,
    begun: u64,
    written: bool,
    /// The payload, where it is compressed.
    compressed: Option<Vec<u8>>,
}

/// A read of one sector that knows where to look, and has not looked yet.
struct Read {
    sector: u64,
    place: Place,
    tag: u64,
    begun: u64,
}

/// An image, its file and journal, and its guest.
pub struct Guest {
    pub disk: Arc<Disk>,
    /// What the payload is in: `disk`, or an external data file.
    payload: Arc<Disk>,
    notes: Arc<Notes>,
    image: Qcow2,
    open: Open,
    random: Random,
    /// By sector: what may be there after a power cut, the last one being there now.
    versions: Vec<Vec<Version>>,
    /// Where the payload of a guest subcluster was last committed.
    places: HashMap<u64, u64>,
    in_flight: Vec<InFlight>,
    reads: Vec<Read>,
    /// By tag: what its write covered.
    written: Vec<ByteRange>,
    settle: Option<(Progress, u64)>,
    time: u64,
    last_settled: u64,
    /// What internal snapshots hold, by the place of their L1 table and its entries: a tag a sector.
    snapshots: Vec<(u64, u32, Vec<u64>)>,
    /// The power is cut, in a copy of the world, in front of every flush.
    pub cut_at_flushes: bool,
    /// Some writes are of compressed clusters.
    pub compresses: bool,
    pub stats: Stats,
}

/// What a run came across: a test that saw none of something has not tested it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    pub settles: u64,
    pub dropped_settles: u64,
    pub committed: u64,
    pub dropped: u64,
    pub busy: u64,
    pub asked_to_settle: u64,
    pub kills: u64,
    pub zeroed_places: u64,
    pub compressed: u64,
}

impl Guest {
    /// A guest on the image in `disk`, which reads as zeroes or as the backing image.
    pub fn new(disk: Arc<Disk>, notes: usize, open: Open, seed: u64) -> Self {
        Self::with_payload_in(disk.clone(), disk, notes, open, seed)
    }

    /// The same with an external data file.
    pub fn with_payload_in(payload: Arc<Disk>, disk: Arc<Disk>, notes: usize, open: Open, seed: u64) -> Self {
        let notes = Arc::new(Notes::new(notes));
        let image = Qcow2::open(disk.clone(), notes.clone(), open).expect("a valid image");
        let sectors = image.size() / SECTOR_BYTES;
        let first = |sector| if open.has_backing { BACKING + sector } else { 0 };
        let versions = (0..sectors).map(|sector| vec![Version { tag: first(sector), committed: 0 }]).collect();
        Self {
            disk,
            payload,
            notes,
            image,
            open,
            random: Random::new(seed),
            versions,
            places: HashMap::new(),
            in_flight: Vec::new(),
            reads: Vec::new(),
            written: vec![ByteRange::default()],
            settle: None,
            time: 0,
            last_settled: 0,
            snapshots: Vec::new(),
            cut_at_flushes: false,
            compresses: false,
            stats: Stats::default(),
        }
    }

    /// Does one thing that one of its requests needs.
    pub fn step(&mut self) {
        self.time += 1;
        match self.random.below(20) {
            0 if self.compresses => self.begin_compressed_write(),
            0..=4 => self.begin_write(),
            5..=9 => self.advance(),
            10 => self.zero(),
            11..=13 => self.step_settle(),
            14 => self.drop_something(),
            15..=16 => self.begin_read(),
            17..=18 => self.end_read(),
            _ => self.recycle(),
        }
    }

    fn some_range(&mut self) -> ByteRange {
        let sectors = self.versions.len() as u64;
        let start = self.random.below(sectors);
        let most = if self.random.one_in(4) { sectors } else { 24 };
        let count = 1 + self.random.below(most.min(sectors - start));
        ByteRange { start: start * SECTOR_BYTES, end: (start + count) * SECTOR_BYTES }
    }

    fn begin_write(&mut self) {
        let range = self.some_range();
        if self.in_flight.len() >= IN_FLIGHT_MAX || self.meets_another(range) {
            return;
        }
        match self.image.reserve(range).expect("a valid image") {
            Reserve::Room(reservation) => {
                assert_eq!(reservation.guest.start, range.start);
                assert!(reservation.guest.end <= range.end && !reservation.guest.is_empty());
                let tag = self.written.len() as u64;
                self.written.push(reservation.guest);
                self.stats.zeroed_places += u64::from(reservation.zeroed);
                self.in_flight.push(InFlight { reservation, tag, begun: self.time, written: false, compressed: None });
            }
            Reserve::Busy => self.stats.busy += 1,
            Reserve::Settle => self.settle_as_asked(),
        }
    }

    fn begin_compressed_write(&mut self) {
        let (info, sector) = (self.image.info(), self.random.below(self.versions.len() as u64));
        let start = sector * SECTOR_BYTES / info.cluster_size * info.cluster_size;
        let range = ByteRange { start, end: (start + info.cluster_size).min(info.virtual_size) };
        if self.in_flight.len() >= IN_FLIGHT_MAX || self.meets_another(range) {
            return;
        }
        let tag = self.written.len() as u64;
        let cluster: Vec<u8> = tag.to_le_bytes().into_iter().cycle().take(info.cluster_size as usize).collect();
        let mut payload = vec![0; cluster.len()];
        let len = self.image.deflate(&cluster, &mut payload).expect("the same again and again");
        // Longer than it has to be, so that few of them fill a cluster and some reach into the next.
        let len = len + self.random.below((cluster.len() - len) as u64) as usize;
        payload.truncate(len);
        match self.image.reserve_compressed(range, len as u32).expect("a valid image") {
            Some(Reserve::Room(reservation)) => {
                assert_eq!((reservation.guest, reservation.fill), (range, [None, None]));
                self.written.push(range);
                let compressed = Some(payload);
                self.in_flight.push(InFlight { reservation, tag, begun: self.time, written: false, compressed });
                self.stats.compressed += 1;
            }
            Some(Reserve::Busy) => self.stats.busy += 1,
            Some(Reserve::Settle) => self.settle_as_asked(),
            None => {}
        }
    }

    fn settle_as_asked(&mut self) {
        self.stats.asked_to_settle += 1;
        self.settle_all();
    }

    fn meets_another(&self, range: ByteRange) -> bool {
        self.in_flight.iter().any(|write| write.reservation.guest.overlaps(range))
    }

    /// Writes a payload, or commits one.
    fn advance(&mut self) {
        if self.in_flight.is_empty() {
            return;
        }
        let at = self.random.below(self.in_flight.len() as u64) as usize;
        if !self.in_flight[at].written {
            self.write_payload(at);
            return;
        }
        let InFlight { reservation, tag, compressed, .. } = self.in_flight.swap_remove(at);
        let (guest, host, in_place) = (reservation.guest, reservation.host, reservation.hold.is_none());
        self.image.commit(reservation).expect("a valid image");
        self.stats.committed += 1;
        for sector in sectors(guest) {
            let versions = &mut self.versions[sector as usize];
            match in_place {
                true => versions.last_mut().expect("never empty").committed = self.time,
                false => versions.push(Version { tag, committed: self.time }),
            }
        }
        if compressed.is_some() {
            let bytes = self.image.info().cluster_size;
            let gone = self.places_of(ByteRange { start: guest.start / bytes * bytes, end: guest.end }, 1 << 40);
            for (subcluster, _) in gone {
                self.places.remove(&subcluster);
            }
            return;
        }
        for (subcluster, place) in self.places_of(guest, host) {
            self.places.insert(subcluster, place);
        }
    }

    /// Bytes of what an image has an entry for, or a bit of one.
    fn subcluster_size(&self) -> u64 {
        let info = self.image.info();
        if info.extended_l2 { info.cluster_size / 32 } else { info.cluster_size }
    }

    /// Guest subclusters of a write, and the places of their first bytes.
    fn places_of(&self, guest: ByteRange, host: u64) -> Vec<(u64, u64)> {
        let size = self.subcluster_size();
        let first = host - guest.start % size;
        (guest.start / size..=(guest.end - 1) / size).zip((first..).step_by(size as usize)).collect()
    }

    fn write_payload(&mut self, at: usize) {
        let InFlight { reservation, tag, compressed, .. } = &self.in_flight[at];
        if let Some(payload) = compressed {
            self.disk.write_at(reservation.host, payload).expect("memory");
            self.in_flight[at].written = true;
            return;
        }
        let (guest, host, fill, tag) = (reservation.guest, reservation.host, reservation.fill, *tag);
        let (zeroed, in_place) = (reservation.zeroed, reservation.hold.is_none());
        if zeroed {
            self.assert_reads_as_zeroes(host, guest.len());
        }
        for part in fill.into_iter().flatten() {
            let place = host.wrapping_add(part.start.wrapping_sub(guest.start));
            if zeroed {
                self.assert_reads_as_zeroes(place, part.len());
            }
            for at in (part.start..part.end).step_by(SECTOR) {
                self.put(place + (at - part.start), self.tag_at(at / SECTOR_BYTES));
            }
        }
        let size = self.subcluster_size();
        // A kept cluster is written again: before the zeroes are durable, a power cut finds it there.
        let reused = self.places_of(guest, host).iter().any(|(at, place)| self.places.get(at) == Some(place));
        for at in (guest.start..guest.end).step_by(SECTOR) {
            self.put(host + (at - guest.start), tag);
            let versions = &mut self.versions[(at / SECTOR_BYTES) as usize];
            let last = versions.last().expect("never empty").committed;
            if in_place {
                versions.push(Version { tag, committed: NEVER });
            } else if reused && self.places.contains_key(&(at / size)) {
                versions.insert(versions.len() - 1, Version { tag, committed: last });
            }
        }
        self.in_flight[at].written = true;
    }

    fn begin_read(&mut self) {
        let sector = self.random.below(self.versions.len() as u64);
        let place = self.image.map(sector * SECTOR_BYTES, SECTOR_BYTES).expect("a valid image").place;
        let tag = self.tag_of(&self.payload, place, sector, 0);
        self.reads.push(Read { sector, place, tag, begun: self.time });
    }

    /// What is found where a sector was is still what it was, or another write to it.
    fn end_read(&mut self) {
        if self.reads.is_empty() {
            return;
        }
        let at = self.random.below(self.reads.len() as u64) as usize;
        let Read { sector, place, tag, .. } = self.reads.swap_remove(at);
        let found = self.tag_of(&self.payload, place, sector, 0);
        let of_it =
            found == 0 || self.written.get(found as usize).is_some_and(|range| sectors(*range).contains(&sector));
        assert!(found == tag || of_it, "sector {sector} at {place:?} had {tag:#x} and has {found:#x}");
    }

    fn put(&self, at: u64, tag: u64) {
        let bytes: Vec<u8> = tag.to_le_bytes().into_iter().cycle().take(SECTOR).collect();
        self.payload.write_at(at, &bytes).expect("memory");
    }

    fn assert_reads_as_zeroes(&self, at: u64, len: u64) {
        let mut bytes = vec![0; len as usize];
        let end = self.payload.len().expect("memory");
        let inside = len.min(end.saturating_sub(at));
        self.payload.read_at(at, &mut bytes[..inside as usize]).expect("memory");
        assert!(bytes.iter().all(|byte| *byte == 0), "{len} bytes at {at} were said to be zeroes");
    }

    fn zero(&mut self) {
        let range = self.some_range();
        if self.meets_another(range) {
            return;
        }
        let zeroing = [Zeroing::Unmap, Zeroing::Keep, Zeroing::Discard][self.random.below(3) as usize];
        match self.image.zero(range, zeroing).expect("a valid image") {
            Zeroed::Done(done) => {
                assert!(done.start == range.start && done.end <= range.end && !done.is_empty());
                self.zeroed(done, zeroing);
            }
            Zeroed::Host { guest, host } => {
                for at in (guest.start..guest.end).step_by(SECTOR) {
                    self.put(host + (at - guest.start), 0);
                    let now = Version { tag: 0, committed: self.time };
                    self.versions[(at / SECTOR_BYTES) as usize].push(now);
                }
            }
            Zeroed::Write(guest) => assert!(guest.start == range.start && guest.end <= range.end && !guest.is_empty()),
            Zeroed::Busy => self.stats.busy += 1,
            Zeroed::Settle => self.settle_as_asked(),
        }
    }

    fn zeroed(&mut self, done: ByteRange, zeroing: Zeroing) {
        let (info, size) = (self.image.info(), self.subcluster_size());
        for sector in sectors(done) {
            let now = self.tag_at(sector);
            let start = sector * SECTOR_BYTES / size * size;
            let whole = done.start <= start && (start + size).min(self.image.size()) <= done.end;
            if zeroing != Zeroing::Discard || whole && (info.version == 3 || !self.open.has_backing) {
                assert_eq!(now, 0, "sector {sector} was said to be zeroed ({zeroing:?})");
            }
            let versions = &mut self.versions[sector as usize];
            if now != versions.last().expect("never empty").tag {
                assert_eq!(now, 0, "sector {sector} has something else after {zeroing:?}");
                versions.push(Version { tag: 0, committed: self.time });
            }
        }
    }

    /// Goes on with a settle, or begins one.
    fn step_settle(&mut self) {
        let (mut progress, begun) = self.settle.take().unwrap_or((Progress::default(), self.time));
        match self.image.settle(&mut progress).expect("a valid image") {
            flush @ (Settle::Flush | Settle::FlushPayload) => {
                if self.cut_at_flushes {
                    self.assert_survives_power_cut();
                }
                if flush == Settle::Flush { &self.disk } else { &self.payload }.flush();
                self.settle = Some((progress, begun));
            }
            Settle::Done => self.settled(begun),
            Settle::Busy => panic!("nobody else settles"),
        }
    }

    /// What was committed by `time` is durable: older versions cannot come back.
    fn settled(&mut self, time: u64) {
        self.stats.settles += 1;
        self.last_settled = self.time;
        for versions in &mut self.versions {
            if let Some(last) = versions.iter().rposition(|version| version.committed <= time) {
                versions.drain(..last);
            }
        }
    }

    pub fn settle_all(&mut self) {
        while self.settle.is_some() {
            self.step_settle();
        }
        self.time += 1;
        self.step_settle();
        while self.settle.is_some() {
            self.step_settle();
        }
    }

    fn drop_something(&mut self) {
        if self.random.one_in(4) {
            self.stats.dropped_settles += u64::from(self.settle.take().is_some());
        } else if let Some(at) = self.in_flight.iter().position(|write| write.reservation.hold.is_some()) {
            drop(self.in_flight.swap_remove(at));
            self.stats.dropped += 1;
        }
    }

    fn recycle(&mut self) {
        let begun = self.in_flight.iter().map(|write| write.begun).chain(self.reads.iter().map(|read| read.begun));
        if begun.min().is_none_or(|begun| begun > self.last_settled) {
            self.image.recycle();
        }
    }

    /// The tag of one sector now.
    fn tag_at(&self, sector: u64) -> u64 {
        let extent = self.image.map(sector * SECTOR_BYTES, SECTOR_BYTES).expect("a valid image");
        assert_eq!(extent.guest.len(), SECTOR_BYTES);
        self.tag_of(&self.payload, extent.place, sector, 0)
    }

    /// The tag of sector `sector`, which is `nth` of an extent at `place`.
    fn tag_of(&self, disk: &Disk, place: Place, sector: u64, nth: u64) -> u64 {
        match place {
            Place::Data { host } => read_tag(disk, host + nth * SECTOR_BYTES),
            Place::Absent if self.open.has_backing => BACKING + sector,
            Place::Absent | Place::Zero => 0,
            Place::Compressed { host, len, skip, inflated } => {
                let inside = u64::from(len).min(disk.len().expect("memory").saturating_sub(host));
                let mut compressed = vec![0; inside as usize];
                disk.read_at(host, &mut compressed).expect("memory");
                let mut cluster = vec![0; inflated as usize];
                self.image.inflate(&compressed, &mut cluster).expect("what was compressed");
                let at = skip as usize + nth as usize * SECTOR;
                tag_in(&cluster[at..][..SECTOR], host)
            }
        }
    }

    /// All sectors of `image`, by maximal extents.
    fn all_tags(&self, image: &Qcow2, disk: &Disk) -> Vec<u64> {
        let mut tags = Vec::new();
        while tags.len() < self.versions.len() {
            let first = tags.len() as u64;
            let extent = image.map(first * SECTOR_BYTES, u64::MAX).expect("a valid image");
            assert_eq!(extent.guest.start, first * SECTOR_BYTES);
            let count = extent.guest.len() / SECTOR_BYTES;
            tags.extend((0..count).map(|nth| self.tag_of(disk, extent.place, first + nth, nth)));
        }
        tags
    }

    /// Everything that was committed is there, and nothing else.
    pub fn assert_all_there(&self) {
        for (sector, (found, versions)) in
            self.all_tags(&self.image, &self.payload).iter().zip(&self.versions).enumerate()
        {
            let now = versions.last().expect("never empty").tag;
            assert_eq!(*found, now, "sector {sector}");
        }
        self.assert_raw_shows_the_same(&self.image, &self.payload);
    }

    /// A raw data file is the disk by itself.
    fn assert_raw_shows_the_same(&self, image: &Qcow2, payload: &Disk) {
        if image.header().data_file.as_ref().is_some_and(|data_file| data_file.raw) {
            for (sector, tag) in (0..).zip(self.all_tags(image, payload)) {
                assert_eq!(read_tag(payload, sector * SECTOR_BYTES), tag, "sector {sector} of the raw data file");
            }
        }
    }

    fn is_external(&self) -> bool {
        !Arc::ptr_eq(&self.disk, &self.payload)
    }

    /// The process is killed: what is in memory is gone, the file and the journal stay.
    pub fn kill(&mut self) {
        self.stats.kills += 1;
        // A kill runs no destructors; here they work on an image and a file that are gone.
        let is_external = self.is_external();
        self.disk = Arc::new(self.disk.copy());
        self.payload = if is_external { Arc::new(self.payload.copy()) } else { self.disk.clone() };
        let kept = self.notes.kept();
        self.end_all_requests();
        self.settle = None;
        self.image = Qcow2::open(self.disk.clone(), self.notes.clone(), self.open).expect("a valid image");
        self.image.replay(&kept).expect("its own notes");
        self.last_settled = 0;
        self.assert_all_there();
    }

    fn end_all_requests(&mut self) {
        self.reads.clear();
        self.in_flight.clear();
        for version in self.versions.iter_mut().flatten().filter(|version| version.committed == NEVER) {
            // Written in place and not acknowledged: it is there to stay.
            version.committed = self.time;
        }
    }

    /// The power is cut now: the file has leaks at worst and everything that was flushed.
    pub fn assert_survives_power_cut(&mut self) {
        let disk = Arc::new(self.disk.after_power_cut(&mut self.random));
        let payload = match self.is_external() {
            true => Arc::new(self.payload.after_power_cut(&mut self.random)),
            false => disk.clone(),
        };
        let storage: Arc<dyn Storage> = disk.clone();
        let found = self.check(&disk);
        assert_eq!(found.corruptions, 0, "{:#?}", found.problems);
        self.assert_snapshots(&disk);
        let image = Qcow2::open(storage, Arc::new(Notes::new(0)), self.open).expect("a valid image");
        for (sector, (found, versions)) in self.all_tags(&image, &payload).iter().zip(&self.versions).enumerate() {
            let possible = versions.iter().any(|version| version.tag == *found);
            assert!(possible, "sector {sector} has {found:#x}, possible is {versions:?}");
        }
        self.assert_raw_shows_the_same(&image, &payload);
    }

    /// Closes the image as a clean end does, and checks it.
    pub fn close(&mut self) -> Check {
        self.end_all_requests();
        self.settle_all();
        self.image.recycle();
        self.settle_all();
        self.image.trim_end().expect("memory");
        self.disk.flush();
        self.assert_snapshots(&self.disk);
        self.check(&self.disk)
    }

    fn check(&self, disk: &Arc<Disk>) -> Check {
        let found = check(&**disk).expect("an image that can be walked");
        if !self.snapshots.is_empty() {
            let theirs = check_of_qemu(disk);
            let numbers = (theirs.corruptions, theirs.leaks);
            assert_eq!((found.corruptions, found.leaks), numbers, "{:#?}\n{:#?}", found.problems, theirs.problems);
        }
        found
    }

    /// Closes the image, has QEMU take a snapshot of it, and goes on with what that left.
    pub fn take_snapshot(&mut self) {
        let found = self.close();
        assert_eq!(found.corruptions, 0, "{:#?}", found.problems);
        let bytes = with_snapshot(&self.disk, self.snapshots.len());
        self.disk = Arc::new(Disk::with(&bytes));
        self.payload = self.disk.clone();
        self.notes = Arc::new(Notes::new(self.notes.capacity()));
        self.image = Qcow2::open(self.disk.clone(), self.notes.clone(), self.open).expect("a valid image");
        let header = read_header(&*self.disk).expect("a valid header");
        let newest = snapshots::read(&*self.disk, &header).expect("a valid table").pop().expect("the new one");
        let tags = self.versions.iter().map(|versions| versions.last().expect("never empty").tag).collect();
        self.snapshots.push((newest.l1_offset, newest.l1_entries, tags));
        self.assert_all_there();
    }

    /// Each snapshot holds what it did: its L1 table, put in the header's place, shows it.
    fn assert_snapshots(&self, disk: &Disk) {
        for (l1_offset, l1_entries, tags) in &self.snapshots {
            let view = Arc::new(disk.copy());
            view.write_at(36, &l1_entries.to_be_bytes()).expect("memory");
            view.write_at(40, &l1_offset.to_be_bytes()).expect("memory");
            let open = Open { writable: false, ..self.open };
            let image = Qcow2::open(view, Arc::new(Notes::new(0)), open).expect("a valid image");
            assert!(self.all_tags(&image, disk) == *tags, "the snapshot with its L1 table at {l1_offset} has changed");
        }
    }
}

fn sectors(range: ByteRange) -> std::ops::Range<u64> {
    range.start / SECTOR_BYTES..range.end / SECTOR_BYTES
}

fn read_tag(disk: &Disk, at: u64) -> u64 {
    let mut bytes = [0; SECTOR];
    if disk.read_at(at, &mut bytes).is_err() {
        // Past the end of the file.
        return 0;
    }
    tag_in(&bytes, at)
}

fn tag_in(bytes: &[u8], at: u64) -> u64 {
    let mut tag = [0; 8];
    tag.copy_from_slice(&bytes[..8]);
    assert!(bytes.chunks(8).all(|part| part == tag), "a torn sector at {at}");
    u64::from_le_bytes(tag)
}
