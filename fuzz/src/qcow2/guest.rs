//! A guest of an image that is whole: it knows what it wrote, and what it must find.
use super::super::support::disk::Disk;
use super::super::support::notes::Notes;
use super::super::support::random::Random;
use super::super::support::stamp::{Writer, stamped};
use super::{Act, NOTES, corruptions, look, open};
use formats::error::Error;
use formats::image::{Image, Place, Progress, Reservation, Reserve, Settle, Zeroed, Zeroing};
use formats::qcow2::Qcow2;
use formats::range::ByteRange;
use formats::storage::Storage;
use std::sync::Arc;

pub struct Guest {
    disk: Arc<Disk>,
    image: Option<Qcow2>,
    notes: Arc<Notes>,
    below: bool,
    /// What it reads.
    bytes: Vec<u8>,
    /// What it changed since everything was durable.
    changed: Vec<ByteRange>,
    /// Room that waits to be used, with its payload.
    held: Vec<(Reservation, u8)>,
    /// No error is right: nothing was done to this image.
    sound: bool,
    writes: u8,
}

impl Guest {
    /// A guest that reads `bytes`.
    pub fn new(disk: Arc<Disk>, image: Qcow2, notes: Arc<Notes>, below: bool, bytes: Vec<u8>, sound: bool) -> Self {
        if image.flush_first() {
            disk.flush();
        }
        let (changed, held) = (Vec::new(), Vec::new());
        Self { disk, image: Some(image), notes, below, bytes, changed, held, sound, writes: 0 }
    }

    /// Does all of it; an error that may be right ends it early.
    pub fn live(mut self, acts: &[Act]) {
        for act in acts {
            if let Err(error) = self.act(*act) {
                assert!(!self.sound, "{act:?}: {}", error.one_line());
                return;
            }
            if matches!(act, Act::End(_) | Act::Settle | Act::Close) {
                self.compare();
            }
        }
        self.compare();
        let sound = self.sound;
        if let Err(error) = self.close().map(|()| self.compare()) {
            assert!(!sound, "{}", error.one_line());
        }
    }

    fn image(&self) -> &Qcow2 {
        self.image.as_ref().expect("open between two acts")
    }

    fn act(&mut self, act: Act) -> Result<(), Error> {
        match act {
            Act::Look(at, len) => look(self.image(), at, u64::from(len).max(1)),
            Act::Write(at, len) => self.write(self.place(at, len.into()))?,
            Act::Reserve(at, len) => self.reserve(self.place(at, len.into()))?,
            Act::End(used) => self.end(used)?,
            Act::Zero(at, len, wish) => self.zero(self.place(at, len.into()), wish)?,
            Act::Settle => self.settle()?,
            Act::Close => self.close()?,
            Act::Kill => self.kill()?,
            Act::PowerCut(seed) => self.power_cut(seed)?,
        }
        Ok(())
    }

    fn place(&self, at: u32, len: u64) -> ByteRange {
        let size = self.bytes.len() as u64;
        let start = u64::from(at) % size.max(1);
        ByteRange { start, end: size.min(start + len.max(1)) }
    }

    fn write(&mut self, range: ByteRange) -> Result<(), Error> {
        let mut rest = range;
        while !rest.is_empty() {
            match self.image().reserve(rest)? {
                Reserve::Room(room) => {
                    rest.start = room.guest.end;
                    let byte = self.fill(&room)?;
                    self.commit(room, byte)?;
                }
                Reserve::Busy => {
                    assert!(!self.held.is_empty(), "nobody has room");
                    return Ok(());
                }
                Reserve::Settle if self.held.is_empty() => self.settle()?,
                Reserve::Settle => return Ok(()),
            }
        }
        Ok(())
    }

    fn reserve(&mut self, range: ByteRange) -> Result<(), Error> {
        if range.is_empty() || self.held.len() >= 8 {
            return Ok(());
        }
        if let Reserve::Room(room) = self.image().reserve(range)? {
            let byte = self.fill(&room)?;
            // In place, it is the disk's content at once.
            match room.hold {
                Some(_) => self.held.push((room, byte)),
                None => self.commit(room, byte)?,
            }
        }
        Ok(())
    }

    fn end(&mut self, used: bool) -> Result<(), Error> {
        if self.held.is_empty() {
            return Ok(());
        }
        let (room, byte) = self.held.remove(0);
        if used { self.commit(room, byte) } else { Ok(()) }
    }

    /// Brings a reservation's payload, and what is around it, to their place.
    fn fill(&mut self, room: &Reservation) -> Result<u8, Error> {
        self.writes = self.writes % 60 + 1;
        let byte = 180 + self.writes;
        for part in room.fill.into_iter().flatten() {
            let before = self.bytes[part.start as usize..part.end as usize].to_vec();
            let host = room.host.wrapping_add(part.start.wrapping_sub(room.guest.start));
            self.disk.write_at(host, &before).expect("memory");
        }
        self.disk.write_at(room.host, &vec![byte; room.guest.len() as usize]).expect("memory");
        Ok(byte)
    }

    fn commit(&mut self, room: Reservation, byte: u8) -> Result<(), Error> {
        let guest = room.guest;
        self.image().commit(room)?;
        self.set(guest, byte);
        Ok(())
    }

    fn set(&mut self, range: ByteRange, byte: u8) {
        self.bytes[range.start as usize..range.end as usize].fill(byte);
        self.changed.push(range);
    }

    fn zero(&mut self, range: ByteRange, zeroing: Zeroing) -> Result<(), Error> {
        let mut rest = range;
        while !rest.is_empty() {
            match self.image().zero(rest, zeroing)? {
                Zeroed::Done(done) if zeroing == Zeroing::Discard => {
                    rest.start = done.end;
                    self.discarded(done)?;
                }
                Zeroed::Done(done) => {
                    rest.start = done.end;
                    self.set(done, 0);
                }
                Zeroed::Host { guest, host } => {
                    rest.start = guest.end;
                    self.disk.write_at(host, &vec![0; guest.len() as usize]).expect("memory");
                    self.set(guest, 0);
                }
                Zeroed::Write(guest) => {
                    rest.start = guest.end;
                    self.write(guest)?;
                }
                Zeroed::Busy => {
                    assert!(!self.held.is_empty(), "nobody has room");
                    return Ok(());
                }
                Zeroed::Settle if self.held.is_empty() => self.settle()?,
                Zeroed::Settle => return Ok(()),
            }
        }
        Ok(())
    }

    /// What was discarded reads as zeroes, or as before.
    fn discarded(&mut self, range: ByteRange) -> Result<(), Error> {
        let now = read_all(self.image(), &self.disk, self.below)?;
        let here = range.start as usize..range.end as usize;
        for (before, now) in self.bytes[here.clone()].iter_mut().zip(&now[here]) {
            assert!(*now == 0 || now == before, "{range} after a discard");
            *before = *now;
        }
        self.changed.push(range);
        Ok(())
    }

    fn settle(&mut self) -> Result<(), Error> {
        let mut progress = Progress::default();
        loop {
            match self.image().settle(&mut progress)? {
                Settle::Flush => self.disk.flush(),
                Settle::FlushPayload => unreachable!("payload in another file has no guest here"),
                Settle::Done => break,
                Settle::Busy => panic!("nobody else settles"),
            }
        }
        self.image().recycle();
        self.changed.clear();
        Ok(())
    }

    fn close(&mut self) -> Result<(), Error> {
        self.held.clear();
        self.settle()?;
        self.settle()?;
        self.image().close(&|| Ok(()))?;
        self.disk.flush();
        self.check("after it was closed")?;
        self.start(Arc::new(Notes::new(NOTES)))
    }

    fn kill(&mut self) -> Result<(), Error> {
        let kept = self.end_process();
        self.start(Arc::new(Notes::new(NOTES)))?;
        self.image().replay(&kept)?;
        self.compare();
        self.settle()?;
        self.check("after a kill")?;
        Ok(())
    }

    fn power_cut(&mut self, seed: u8) -> Result<(), Error> {
        self.end_process();
        self.disk = Arc::new(self.disk.after_power_cut(&mut Random::new(seed.into())));
        self.check("after a power cut")?;
        self.start(Arc::new(Notes::new(NOTES)))?;
        let now = read_all(self.image(), &self.disk, self.below)?;
        let mut lost = vec![false; now.len()];
        for range in std::mem::take(&mut self.changed) {
            lost[range.start as usize..range.end as usize].fill(true);
        }
        for at in 0..now.len() {
            assert!(lost[at] || now[at] == self.bytes[at], "byte {at}, which was durable, after a power cut");
        }
        self.bytes = now;
        Ok(())
    }

    /// Drops everything that is in memory; returns what the journal kept.
    fn end_process(&mut self) -> Vec<formats::journal::Change> {
        let kept = self.notes.kept();
        self.held.clear();
        self.image = None;
        kept
    }

    fn start(&mut self, notes: Arc<Notes>) -> Result<(), Error> {
        self.notes = notes.clone();
        let image = open(&self.disk, self.below, true, notes)?;
        self.image = Some(image);
        Ok(())
    }

    fn check(&self, when: &str) -> Result<(), Error> {
        let mut found = corruptions(&self.disk)?;
        // Of two guest clusters that shared one of the file, the one that stayed has it alone now and
        // does not say so: whoever writes to it asks the refcount.
        found.retain(|problem| !problem.contains("the copied flag is false, and the refcount"));
        assert!(found.is_empty(), "{when}: {found:?}");
        Ok(())
    }

    fn compare(&self) {
        let now = read_all(self.image(), &self.disk, self.below).unwrap_or_else(|error| panic!("{}", error.one_line()));
        if let Some(at) = (0..now.len()).find(|at| now[*at] != self.bytes[*at]) {
            panic!("byte {at} is {:#04x} and should be {:#04x}", now[at], self.bytes[at]);
        }
    }
}

/// What a guest reads of all of `image`, whose extents lie one behind the other.
pub fn read_all(image: &Qcow2, disk: &Disk, below: bool) -> Result<Vec<u8>, Error> {
    read(image, disk, below, ByteRange { start: 0, end: image.size() })
}

/// What a guest reads in `range`, extent by extent.
pub fn read(image: &Qcow2, disk: &Disk, below: bool, range: ByteRange) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; range.len() as usize];
    let mut done = 0;
    while done < bytes.len() {
        let extent = image.map(range.start + done as u64, (bytes.len() - done) as u64)?;
        let here = &mut bytes[done..][..extent.guest.len() as usize];
        done += here.len();
        match extent.place {
            Place::Data { host } => disk.read_padded(host, here),
            Place::Absent if below => here.copy_from_slice(&stamped(extent.guest, Writer::Below)),
            Place::Absent | Place::Zero => here.fill(0),
            Place::Compressed { host, len, skip, inflated } => {
                let mut compressed = vec![0; len as usize];
                disk.read_padded(host, &mut compressed);
                let mut cluster = vec![0; inflated as usize];
                image.inflate(&compressed, &mut cluster)?;
                here.copy_from_slice(&cluster[skip as usize..][..here.len()]);
            }
        }
    }
    Ok(bytes)
}
