//! A guest on an image: it writes, zeroes, discards and flushes with several requests in flight,
//! and remembers for each sector what may be found there.
//!
//! Every write has stamps that no other has, so a stale, torn or misplaced one is seen.
use super::disk::{Disk, SECTOR, Sector};
use super::files::Files;
use super::history::History;
use super::notes::Notes;
use super::qemu::{check_of_qemu, with_snapshot};
use super::random::Random;
use super::stamp::{self, STAMP, Writer, sectors, stamped, tell};
use formats::image::{Extent, Image, Place, Progress, Reservation, Reserve, Settle, Zeroed, Zeroing};
use formats::qcow2::{Check, Open, Qcow2, check, read_header, snapshots};
use formats::range::ByteRange;
use formats::storage::Storage;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

const SECTOR_BYTES: u64 = SECTOR as u64;
const IN_FLIGHT_MAX: usize = 6;

/// A write that is not committed.
struct InFlight {
    reservation: Reservation,
    writer: Writer,
    begun: u64,
    written: bool,
    /// The payload, where it is compressed.
    compressed: Option<Vec<u8>>,
}

/// A read of one sector that knows where to look, and has not looked yet.
struct Read {
    sector: u64,
    extent: Extent,
    content: Sector,
    begun: u64,
}

/// What an internal snapshot holds.
struct Snapshot {
    l1_offset: u64,
    l1_entries: u32,
    bytes: Vec<u8>,
}

/// An image, its files and journal, and its guest.
pub struct Guest {
    pub files: Files,
    notes: Arc<Notes>,
    notes_max: usize,
    image: Qcow2,
    open: Open,
    random: Random,
    history: History,
    /// Bytes that an entry, or a bit of one, is about: a cluster, or a subcluster where there are any.
    granule: u64,
    /// Where the payload of a granule was last committed.
    places: HashMap<u64, u64>,
    in_flight: Vec<InFlight>,
    reads: Vec<Read>,
    writes: u32,
    settle: Option<(Progress, u64)>,
    time: u64,
    last_settled: u64,
    snapshots: Vec<Snapshot>,
    /// The disk does not grow beyond.
    size_max: u64,
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
    /// Power cuts that the guest went on after.
    pub restarts: u64,
    /// Files that a power cut left and that were judged.
    pub power_cuts: u64,
    pub zeroed_places: u64,
    pub compressed: u64,
    /// Times that the disk grew, and that a growth came to nothing.
    pub grown: u64,
    pub not_grown: u64,
}

impl Stats {
    pub fn add(&mut self, other: &Self) {
        self.settles += other.settles;
        self.dropped_settles += other.dropped_settles;
        self.committed += other.committed;
        self.dropped += other.dropped;
        self.busy += other.busy;
        self.asked_to_settle += other.asked_to_settle;
        self.kills += other.kills;
        self.restarts += other.restarts;
        self.power_cuts += other.power_cuts;
        self.zeroed_places += other.zeroed_places;
        self.compressed += other.compressed;
        self.grown += other.grown;
        self.not_grown += other.not_grown;
    }
}

impl Guest {
    /// A guest on the image in `files`, which reads as `bytes`, as its internal snapshots do, and has
    /// entries for `granule` bytes. The journal has room for `notes_max`.
    pub fn new(files: Files, bytes: &[u8], granule: u64, notes_max: usize, open: Open, seed: u64) -> Self {
        let notes = Arc::new(Notes::new(notes_max));
        let image = Qcow2::open(files.image.clone(), notes.clone(), open).expect("a valid image");
        assert_eq!(image.size(), bytes.len() as u64);
        let mut guest = Self {
            files,
            notes,
            notes_max,
            image,
            open,
            random: Random::new(seed),
            history: History::new(bytes),
            granule,
            places: HashMap::new(),
            in_flight: Vec::new(),
            reads: Vec::new(),
            writes: 0,
            settle: None,
            time: 0,
            last_settled: 0,
            snapshots: Vec::new(),
            size_max: bytes.len() as u64 * 3,
            cut_at_flushes: false,
            compresses: false,
            stats: Stats::default(),
        };
        guest.assert_all_there();
        guest.find_places();
        guest.find_snapshots(bytes);
        guest
    }

    /// Internal snapshots that are not known yet hold `bytes`.
    fn find_snapshots(&mut self, bytes: &[u8]) {
        let header = read_header(&*self.files.image).expect("a valid header");
        let all = snapshots::read(&*self.files.image, &header).expect("a valid table");
        let new = all.into_iter().skip(self.snapshots.len());
        self.snapshots.extend(new.map(|snapshot| Snapshot {
            l1_offset: snapshot.l1_offset,
            l1_entries: snapshot.l1_entries,
            bytes: bytes.to_vec(),
        }));
    }

    /// Where granules are in an image that was just opened.
    fn find_places(&mut self) {
        self.places.clear();
        let mut at = 0;
        while at < self.image.size() {
            let extent = self.image.map(at, u64::MAX).expect("a valid image");
            at = extent.guest.end;
            if let Place::Data { host } = extent.place {
                self.places.extend(self.places_of(extent.guest, host));
            }
        }
    }

    /// Something is below its image.
    pub fn has_backing(&self) -> bool {
        self.open.has_backing
    }

    /// Does one thing that one of its requests needs.
    pub fn step(&mut self) {
        self.time += 1;
        if self.random.one_in(100) {
            self.grow();
        }
        match self.random.below(20) {
            0 if self.compresses => self.begin_compressed_write(),
            0..=4 => {
                let range = self.some_range();
                self.begin_write(range, true);
            }
            5..=9 => self.advance(),
            10 => self.zero(),
            11..=13 => self.step_settle(),
            14 => self.drop_something(),
            15..=16 => self.begin_read(),
            17..=18 => self.end_read(),
            _ => self.recycle(),
        }
    }

    /// Mostly whole sectors.
    fn some_range(&mut self) -> ByteRange {
        let unit = if self.random.one_in(4) { STAMP } else { SECTOR_BYTES };
        let units = self.history.size() / unit;
        let start = self.random.below(units);
        let most = if self.random.one_in(4) { units } else { 24 };
        let count = 1 + self.random.below(most.min(units - start));
        ByteRange { start: start * unit, end: (start + count) * unit }
    }

    /// Takes room for a write of stamps, or of zeroes.
    fn begin_write(&mut self, range: ByteRange, stamps: bool) {
        if self.in_flight.len() >= IN_FLIGHT_MAX || self.meets_another(range) {
            return;
        }
        match self.image.reserve(range).expect("a valid image") {
            Reserve::Room(reservation) => {
                assert_eq!(reservation.guest.start, range.start);
                assert!(reservation.guest.end <= range.end && !reservation.guest.is_empty());
                self.writes += 1;
                let writer = if stamps { Writer::Guest(self.writes) } else { Writer::Nobody };
                self.stats.zeroed_places += u64::from(reservation.zeroed);
                let (begun, written, compressed) = (self.time, false, None);
                self.in_flight.push(InFlight { reservation, writer, begun, written, compressed });
            }
            Reserve::Busy => self.stats.busy += 1,
            Reserve::Settle => self.settle_as_asked(),
        }
    }

    /// Takes room for one cluster of stamps that is compressed.
    fn begin_compressed_write(&mut self) {
        let size = self.image.info().cluster_size;
        let start = self.random.below(self.history.size().div_ceil(size)) * size;
        let range = ByteRange { start, end: (start + size).min(self.history.size()) };
        if self.in_flight.len() >= IN_FLIGHT_MAX || self.meets_another(range) {
            return;
        }
        let writer = Writer::Guest(self.writes + 1);
        let mut cluster = stamped(range, writer);
        cluster.resize(size as usize, 0);
        let mut payload = vec![0; cluster.len()];
        let Some(len) = self.image.deflate(&cluster, &mut payload) else { return };
        // Longer than it has to be, so that few of them fill a cluster and some reach into the next.
        let len = len + self.random.below((cluster.len() - len) as u64) as usize;
        payload.truncate(len);
        match self.image.reserve_compressed(range, len as u32).expect("a valid image") {
            Some(Reserve::Room(reservation)) => {
                assert_eq!((reservation.guest, reservation.fill), (range, [None, None]));
                self.writes += 1;
                self.stats.compressed += 1;
                let (begun, written, compressed) = (self.time, false, Some(payload));
                self.in_flight.push(InFlight { reservation, writer, begun, written, compressed });
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
        let InFlight { reservation, writer, compressed, .. } = self.in_flight.swap_remove(at);
        let (guest, host, in_place) = (reservation.guest, reservation.host, reservation.hold.is_none());
        let [head, tail] = reservation.fill;
        // What is around the payload moves with it.
        let moved = ByteRange {
            start: head.map_or(guest.start, |head| head.start),
            end: tail.map_or(guest.end, |tail| tail.end),
        };
        let moved_to = host - (guest.start - moved.start);
        self.image.commit(reservation).expect("a valid image");
        self.stats.committed += 1;
        match in_place {
            true => self.history.commit_in_place(guest, self.time),
            false => self.history.commit(guest, &stamped(guest, writer), self.time),
        }
        match compressed {
            None => self.places.extend(self.places_of(moved, moved_to)),
            // Nothing is in a place of its own any more.
            Some(_) => (guest.start / self.granule..guest.end.div_ceil(self.granule)).for_each(|nth| {
                self.places.remove(&nth);
            }),
        }
    }

    /// Granules of a write, and the places of their first bytes.
    fn places_of(&self, guest: ByteRange, host: u64) -> Vec<(u64, u64)> {
        let size = self.granule;
        let first = host - guest.start % size;
        (guest.start / size..=(guest.end - 1) / size).zip((first..).step_by(size as usize)).collect()
    }

    /// Writes the payload, and what has to be around it, in one.
    fn write_payload(&mut self, at: usize) {
        let InFlight { reservation, writer, compressed, .. } = &self.in_flight[at];
        if let Some(payload) = compressed {
            self.files.payload().write_at(reservation.host, payload).expect("memory");
            self.in_flight[at].written = true;
            return;
        }
        let (guest, host, [head, tail]) = (reservation.guest, reservation.host, reservation.fill);
        let (zeroed, in_place, writer) = (reservation.zeroed, reservation.hold.is_none(), *writer);
        let [before, after] = [head, tail].map(|part| part.map_or_else(Vec::new, |part| self.history.bytes(part)));
        let bytes = stamped(guest, writer);
        let (place, all) = (host - before.len() as u64, [&before[..], &bytes, &after].concat());
        if zeroed {
            self.assert_reads_as_zeroes(place, all.len() as u64);
        }
        self.files.payload().write_at(place, &all).expect("memory");
        if in_place {
            self.history.write_in_place(guest, &bytes);
        }
        // What was zeroed and kept its place is written there again.
        let size = self.granule;
        for (nth, place) in self.places_of(guest, host) {
            if !in_place && self.places.get(&nth) == Some(&place) {
                let here = guest.intersect(ByteRange { start: nth * size, end: (nth + 1) * size });
                let skip = (here.start - guest.start) as usize;
                self.history.write_where_it_was(here, &bytes[skip..][..here.len() as usize]);
            }
        }
        self.in_flight[at].written = true;
    }

    fn begin_read(&mut self) {
        let sector = self.random.below(self.history.size() / SECTOR_BYTES);
        let extent = self.image.map(sector * SECTOR_BYTES, SECTOR_BYTES).expect("a valid image");
        let content = self.content_at(&extent);
        self.reads.push(Read { sector, extent, content, begun: self.time });
    }

    /// What is found where a sector was is still what it was, or another write to it.
    fn end_read(&mut self) {
        if self.reads.is_empty() {
            return;
        }
        let at = self.random.below(self.reads.len() as u64) as usize;
        let Read { sector, extent, content, .. } = self.reads.swap_remove(at);
        let found = self.content_at(&extent);
        let right = found == content || stamp::is_of(&found, sector);
        assert!(right, "sector {sector} at {extent:?} had {} and has {}", tell(&content), tell(&found));
    }

    fn assert_reads_as_zeroes(&self, at: u64, len: u64) {
        let mut bytes = vec![0; len as usize];
        self.files.payload().read_padded(at, &mut bytes);
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
                let zeroes = vec![0; guest.len() as usize];
                self.files.payload().write_at(host, &zeroes).expect("memory");
                self.history.commit(guest, &zeroes, self.time);
            }
            Zeroed::Write(guest) => {
                assert!(guest.start == range.start && guest.end <= range.end && !guest.is_empty());
                self.begin_write(guest, false);
            }
            Zeroed::Busy => self.stats.busy += 1,
            Zeroed::Settle => self.settle_as_asked(),
        }
    }

    /// All of it reads as zeroes, or after a discard each whole cluster of it.
    fn zeroed(&mut self, done: ByteRange, zeroing: Zeroing) {
        let info = self.image.info();
        for sector in sectors(done) {
            let (before, now) = (*self.history.now(sector), self.sector_at(sector));
            let start = sector * SECTOR_BYTES;
            let here = done.intersect(ByteRange { start, end: start + SECTOR_BYTES });
            let mut wanted = before;
            stamp::overlay(&mut wanted, sector, here, &vec![0; here.len() as usize]);
            // Of a compressed cluster only all can be discarded.
            let unit = if self.is_compressed(sector) { info.cluster_size } else { self.granule };
            let first = start / unit * unit;
            let whole = done.start <= first && (first + unit).min(self.image.size()) <= done.end;
            let must = zeroing != Zeroing::Discard || whole && (info.version == 3 || !self.open.has_backing);
            let right = now == wanted || !must && now == before;
            assert!(right, "sector {sector} of {done} has {} after {zeroing:?}", tell(&now));
            if now != before {
                self.history.commit(here, &vec![0; here.len() as usize], self.time);
            }
        }
    }

    /// A larger disk, or one that was to be larger and is not.
    pub fn grow(&mut self) {
        let old = self.history.size();
        let sectors = (self.size_max.saturating_sub(old) / SECTOR_BYTES).min(1200);
        if sectors == 0 {
            return;
        }
        self.end_all_requests();
        self.settle_all();
        let new = old + SECTOR_BYTES * (1 + self.random.below(sectors));
        let below = if self.open.has_backing { u64::MAX } else { 0 };
        let cuts = RefCell::new((Vec::new(), Random::new(self.random.next())));
        let files = self.files.clone();
        let cut_at_flushes = self.cut_at_flushes;
        let flush = || {
            let (cuts, random) = &mut *cuts.borrow_mut();
            cuts.extend(cut_at_flushes.then(|| files.after_power_cut(random)));
            files.image.flush();
            files.payload().flush();
            Ok(())
        };
        let Ok(range) = self.image.grow(new, below, &flush) else {
            let old_version = self.image.info().version == 2;
            assert!(old_version && (self.open.has_backing || !self.snapshots.is_empty()), "an image that can grow");
            return;
        };
        self.history.resize(new);
        self.zero_now(range);
        match self.random.below(4) {
            0 => {
                self.stats.not_grown += 1;
                self.image.ungrow(old);
                self.history.resize(old);
            }
            1 => {
                self.stats.not_grown += 1;
                self.history.resize(old);
                self.kill();
            }
            _ => {
                self.stats.grown += 1;
                self.settle_all();
                self.image.keep_size(&flush).expect("memory");
            }
        }
        for cut in cuts.into_inner().0 {
            self.judge(&cut);
        }
        assert_eq!(self.image.size(), self.history.size());
        self.assert_all_there();
    }

    /// Zeroes all of `range`, which nobody else touches.
    fn zero_now(&mut self, mut range: ByteRange) {
        while !range.is_empty() {
            let part = match self.image.zero(range, Zeroing::Unmap).expect("a valid image") {
                Zeroed::Done(part) => part,
                Zeroed::Host { guest, host } => {
                    self.files.payload().write_at(host, &vec![0; guest.len() as usize]).expect("memory");
                    guest
                }
                Zeroed::Write(part) => {
                    self.begin_write(part, false);
                    let Some(write) = self.in_flight.last() else { continue };
                    let part = write.reservation.guest;
                    self.write_payload(0);
                    self.advance();
                    part
                }
                Zeroed::Busy => panic!("nobody else writes"),
                Zeroed::Settle => {
                    self.settle_as_asked();
                    continue;
                }
            };
            range.start = part.end;
        }
    }

    fn is_compressed(&self, sector: u64) -> bool {
        let extent = self.image.map(sector * SECTOR_BYTES, SECTOR_BYTES).expect("a valid image");
        matches!(extent.place, Place::Compressed { .. })
    }

    /// Goes on with a settle, or begins one.
    fn step_settle(&mut self) {
        let (mut progress, begun) = self.settle.take().unwrap_or((Progress::default(), self.time));
        match self.image.settle(&mut progress).expect("a valid image") {
            flush @ (Settle::Flush | Settle::FlushPayload) => {
                if self.cut_at_flushes {
                    self.assert_survives_power_cut();
                }
                if flush == Settle::Flush { &self.files.image } else { self.files.payload() }.flush();
                self.settle = Some((progress, begun));
            }
            Settle::Done => self.settled(begun),
            Settle::Busy => panic!("nobody else settles"),
        }
    }

    fn settled(&mut self, begun: u64) {
        self.stats.settles += 1;
        self.last_settled = self.time;
        self.history.settle(begun);
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

    /// What is in one sector now.
    fn sector_at(&self, sector: u64) -> Sector {
        self.content_at(&self.image.map(sector * SECTOR_BYTES, SECTOR_BYTES).expect("a valid image"))
    }

    /// What is where a sector is said to be.
    fn content_at(&self, extent: &Extent) -> Sector {
        let mut content = [0; SECTOR];
        assert_eq!(extent.guest.len(), SECTOR_BYTES);
        self.fetch(&self.image, self.files.payload(), extent, &mut content);
        content
    }

    /// All of `image`, whose payload is on `disk`, by maximal extents.
    fn read_all(&self, image: &Qcow2, disk: &Disk) -> Vec<u8> {
        let mut bytes = vec![0; image.size() as usize];
        let mut at = 0;
        while at < image.size() {
            let extent = image.map(at, u64::MAX).expect("a valid image");
            assert_eq!(extent.guest.start, at);
            self.fetch(image, disk, &extent, &mut bytes[at as usize..extent.guest.end as usize]);
            at = extent.guest.end;
        }
        bytes
    }

    fn fetch(&self, image: &Qcow2, disk: &Disk, extent: &Extent, bytes: &mut [u8]) {
        match extent.place {
            Place::Data { host } => disk.read_padded(host, bytes),
            Place::Absent if self.open.has_backing => bytes.copy_from_slice(&stamped(extent.guest, Writer::Below)),
            Place::Absent | Place::Zero => bytes.fill(0),
            Place::Compressed { host, len, skip, inflated } => {
                let mut compressed = vec![0; len as usize];
                disk.read_padded(host, &mut compressed);
                let mut cluster = vec![0; inflated as usize];
                image.inflate(&compressed, &mut cluster).expect("a valid cluster");
                bytes.copy_from_slice(&cluster[skip as usize..][..bytes.len()]);
            }
        }
    }

    /// Everything that was committed is there, and nothing else.
    pub fn assert_all_there(&self) {
        let found = self.read_all(&self.image, self.files.payload());
        self.history.assert_now(&found);
        self.assert_raw(&self.files, &found);
    }

    /// A raw data file has what the guest reads.
    fn assert_raw(&self, files: &Files, found: &[u8]) {
        if self.image.header().data_file.as_ref().is_some_and(|data_file| data_file.raw) {
            let mut bytes = vec![0; found.len()];
            files.payload().read_padded(0, &mut bytes);
            assert!(bytes == found, "the raw data file shows something else than the image");
        }
    }

    /// The process is killed: what is in memory is gone, the files and the journal stay.
    pub fn kill(&mut self) {
        self.stats.kills += 1;
        let kept = self.notes.kept();
        self.start_again(self.files.copy(), self.notes.clone());
        self.image.replay(&kept).expect("its own notes");
        self.assert_all_there();
    }

    /// The power is cut, and the guest goes on with what is there then.
    pub fn power_cut(&mut self) {
        self.stats.restarts += 1;
        let (files, found) = self.after_power_cut();
        self.start_again(files, Arc::new(Notes::new(self.notes_max)));
        self.history = History::new(&found);
        self.find_places();
    }

    /// A new process on the files as they were left.
    fn start_again(&mut self, files: Files, notes: Arc<Notes>) {
        // A kill runs no destructors; here they work on an image and files that are gone.
        self.files = files;
        self.end_all_requests();
        self.settle = None;
        self.notes = notes;
        self.image = Qcow2::open(self.files.image.clone(), self.notes.clone(), self.open).expect("a valid image");
        self.last_settled = 0;
    }

    fn end_all_requests(&mut self) {
        self.reads.clear();
        self.in_flight.clear();
        self.history.end_requests(self.time);
    }

    /// If the power is cut now, the files have leaks at worst, everything that was flushed, and nothing
    /// that was not written there.
    pub fn assert_survives_power_cut(&mut self) {
        self.after_power_cut();
    }

    /// What the files are if the power is cut now, and what a guest reads from them then.
    pub fn after_power_cut(&mut self) -> (Files, Vec<u8>) {
        let files = self.files.after_power_cut(&mut self.random);
        let found = self.judge(&files);
        (files.copy(), found)
    }

    /// What a guest reads from the files that a power cut left.
    fn judge(&mut self, files: &Files) -> Vec<u8> {
        self.stats.power_cuts += 1;
        // QEMU takes its time.
        let found = if self.random.one_in(32) { self.check_twice(files) } else { self.check(files) };
        assert_eq!(found.corruptions, 0, "{:#?}", found.problems);
        self.assert_snapshots(&files.image);
        let image = Qcow2::open(files.image.clone(), Arc::new(Notes::new(0)), self.open).expect("a valid image");
        let found = self.read_all(&image, files.payload());
        self.history.assert_possible(&found);
        self.assert_raw(files, &found);
        found
    }

    /// Closes the image as a clean end does, and checks it.
    pub fn close(&mut self) -> Check {
        self.end_all_requests();
        self.settle_all();
        self.image.recycle();
        self.settle_all();
        let image = &self.files.image;
        let flush = || {
            image.flush();
            Ok(())
        };
        self.image.close(&flush).expect("memory");
        image.flush();
        self.assert_snapshots(image);
        self.check_twice(&self.files)
    }

    fn check(&self, files: &Files) -> Check {
        check(&*files.image).expect("an image that can be walked")
    }

    /// Where there are internal snapshots, QEMU has to find the same.
    fn check_twice(&self, files: &Files) -> Check {
        let found = self.check(files);
        if !self.snapshots.is_empty() {
            let theirs = check_of_qemu(&files.image);
            let numbers = (theirs.corruptions, theirs.leaks);
            assert_eq!((found.corruptions, found.leaks), numbers, "{:#?}\n{:#?}", found.problems, theirs.problems);
        }
        found
    }

    /// Closes the image, has QEMU take a snapshot of it, and goes on with what that left.
    pub fn take_snapshot(&mut self) {
        let found = self.close();
        assert_eq!(found.corruptions, 0, "{:#?}", found.problems);
        let bytes = with_snapshot(&self.files.image, self.snapshots.len());
        self.start_again(Files::new(Disk::with(&bytes), None), Arc::new(Notes::new(self.notes_max)));
        self.find_snapshots(&self.history.bytes(ByteRange { start: 0, end: self.history.size() }));
        self.assert_all_there();
    }

    /// Each snapshot's L1 table, put in the header's place, shows what it holds.
    fn assert_snapshots(&self, disk: &Disk) {
        for Snapshot { l1_offset, l1_entries, bytes } in &self.snapshots {
            let view = Arc::new(disk.copy());
            view.write_at(24, &(bytes.len() as u64).to_be_bytes()).expect("memory");
            view.write_at(36, &l1_entries.to_be_bytes()).expect("memory");
            view.write_at(40, &l1_offset.to_be_bytes()).expect("memory");
            let open = Open { writable: false, ..self.open };
            let image = Qcow2::open(view, Arc::new(Notes::new(0)), open).expect("a valid image");
            let unchanged = self.read_all(&image, disk) == *bytes;
            assert!(unchanged, "the snapshot with its L1 table at {l1_offset} has changed");
        }
    }
}
