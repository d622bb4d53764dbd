//! A file that can lose power: what was not flushed is there, or not, sector by sector.
use super::random::Random;
use formats::storage::Storage;
use std::collections::HashMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard};

pub const SECTOR: usize = 512;
pub type Sector = [u8; SECTOR];

/// A file in memory.
#[derive(Default)]
pub struct Disk(Mutex<Bytes>);

#[derive(Clone, Default)]
struct Bytes {
    len: u64,
    sectors: HashMap<u64, Sector>,
    /// As of the last flush.
    durable: HashMap<u64, Sector>,
    durable_len: u64,
    /// What was written since, oldest first.
    pending: HashMap<u64, Vec<Sector>>,
    pending_lens: Vec<u64>,
}

impl Disk {
    /// A file with these bytes, all of them durable.
    pub fn with(bytes: &[u8]) -> Self {
        let disk = Self::default();
        disk.set_len(bytes.len() as u64).expect("memory");
        for (nth, sector) in bytes.chunks(SECTOR).enumerate().filter(|(_, sector)| **sector != [0; SECTOR]) {
            disk.write_at((nth * SECTOR) as u64, sector).expect("memory");
        }
        disk.flush();
        disk
    }

    /// Makes everything durable.
    pub fn flush(&self) {
        let mut bytes = self.lock();
        let bytes = &mut *bytes;
        for sector in std::mem::take(&mut bytes.pending).into_keys() {
            match bytes.sectors.get(&sector) {
                Some(now) => bytes.durable.insert(sector, *now),
                None => bytes.durable.remove(&sector),
            };
        }
        bytes.durable_len = bytes.len;
        bytes.pending_lens.clear();
    }

    /// What the file is after a power cut now: `random` says which unflushed sectors made it, and in
    /// which of their versions. All that is left is durable.
    ///
    /// Sectors are lost one by one, so writes are torn, reordered and dropped; so are changes of the
    /// file's length.
    pub fn after_power_cut(&self, random: &mut Random) -> Self {
        let bytes = self.lock();
        let len = match random.below(bytes.pending_lens.len() as u64 + 1) {
            0 => bytes.durable_len,
            nth => bytes.pending_lens[nth as usize - 1],
        };
        let mut sectors = bytes.durable.clone();
        let loss = Loss::some(random);
        let mut pending: Vec<_> = bytes.pending.iter().collect();
        pending.sort_unstable_by_key(|(sector, _)| **sector);
        for (sector, versions) in pending {
            if let Some(version) = versions.get(loss.choose(versions.len(), random)) {
                sectors.insert(*sector, *version);
            }
        }
        sectors.retain(|sector, _| sector * (SECTOR as u64) < len);
        let (durable, durable_len) = (sectors.clone(), len);
        Self(Mutex::new(Bytes { len, sectors, durable, durable_len, ..Bytes::default() }))
    }

    /// A copy of what is there now, flushed or not.
    pub fn copy(&self) -> Self {
        Self(Mutex::new(self.lock().clone()))
    }

    /// All bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let len = self.lock().len;
        let mut bytes = vec![0; len as usize];
        self.read_at(0, &mut bytes).expect("all of it");
        bytes
    }

    /// Fills `bytes` from `at`; what lies past the end reads as zeroes.
    pub fn read_padded(&self, at: u64, bytes: &mut [u8]) {
        let inside = self.lock().len.saturating_sub(at).min(bytes.len() as u64) as usize;
        let (bytes, past) = bytes.split_at_mut(inside);
        if !bytes.is_empty() {
            self.read_at(at, bytes).expect("inside the file");
        }
        past.fill(0);
    }

    /// Fills an empty file of the system with the same bytes, and leaves holes where nothing was written.
    pub fn copy_to(&self, file: &std::fs::File) -> io::Result<()> {
        let bytes = self.lock();
        file.set_len(bytes.len)?;
        for (sector, now) in &bytes.sectors {
            let at = sector * SECTOR as u64;
            let len = SECTOR.min(bytes.len.saturating_sub(at) as usize);
            file.write_all_at(&now[..len], at)?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Bytes> {
        self.0.lock().expect("one thread")
    }
}

/// How much of what was not flushed a power cut takes.
#[derive(Clone, Copy)]
enum Loss {
    /// Every sector on its own has any of its versions.
    Any,
    /// Of so many sectors about one is lost, the others are as they were last.
    OneIn(u64),
    /// Of so many sectors about one is there.
    AllButOneIn(u64),
}

impl Loss {
    fn some(random: &mut Random) -> Self {
        match random.below(4) {
            0 => Self::OneIn(8),
            1 => Self::AllButOneIn(8),
            _ => Self::Any,
        }
    }

    /// The index of a sector's version, or one that there is not for the durable one.
    fn choose(self, versions: usize, random: &mut Random) -> usize {
        match self {
            Self::Any => random.below(versions as u64 + 1) as usize,
            Self::OneIn(sectors) if random.one_in(sectors) => versions,
            Self::AllButOneIn(sectors) if !random.one_in(sectors) => versions,
            _ => versions - 1,
        }
    }
}

impl Bytes {
    fn set(&mut self, sector: u64, now: Sector) {
        self.sectors.insert(sector, now);
        self.pending.entry(sector).or_default().push(now);
    }
}

/// The sectors that `len` bytes at `at` touch: number, range in the sector, range in the bytes.
fn pieces(at: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let here = at + done as u64;
        let start = (here % SECTOR as u64) as usize;
        let count = (SECTOR - start).min(len - done);
        let piece = (here / SECTOR as u64, start..start + count, done..done + count);
        done += count;
        (count > 0).then_some(piece)
    })
}

impl Storage for Disk {
    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        let disk = self.lock();
        if at.checked_add(bytes.len() as u64).is_none_or(|end| end > disk.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (sector, inside, outside) in pieces(at, bytes.len()) {
            match disk.sectors.get(&sector) {
                Some(now) => bytes[outside].copy_from_slice(&now[inside]),
                None => bytes[outside].fill(0),
            }
        }
        Ok(())
    }

    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let mut disk = self.lock();
        for (sector, inside, outside) in pieces(at, bytes.len()) {
            let mut now = disk.sectors.get(&sector).copied().unwrap_or([0; SECTOR]);
            now[inside].copy_from_slice(&bytes[outside]);
            disk.set(sector, now);
        }
        let end = at + bytes.len() as u64;
        if end > disk.len {
            disk.len = end;
            disk.pending_lens.push(end);
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut disk = self.lock();
        let first_gone = len.div_ceil(SECTOR as u64);
        let gone: Vec<u64> = disk.sectors.keys().copied().filter(|sector| *sector >= first_gone).collect();
        for sector in gone {
            disk.set(sector, [0; SECTOR]);
        }
        let cut = (len % SECTOR as u64) as usize;
        if cut > 0
            && let Some(mut last) = disk.sectors.get(&(len / SECTOR as u64)).copied()
        {
            last[cut..].fill(0);
            disk.set(len / SECTOR as u64, last);
        }
        disk.len = len;
        disk.pending_lens.push(len);
        Ok(())
    }

    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        Ok((at < self.lock().len).then_some(at))
    }

    fn next_hole(&self, _: u64) -> io::Result<u64> {
        self.len()
    }
}
