//! Simulated files and queues: everything happens in an order that one seed decides.
//!
//! A file is two arrays of bytes: what the page cache has, and what is durable. A flush copies the
//! first, as it was when the flush was asked for, onto the second. A kill keeps the first; a power
//! cut keeps the second, and of each sector that differs one or the other.
//!
//! Time is what each queue makes of it, a millisecond a look. Where files have a clock, it is the same for all of them, and
//! what is done to a file takes as long as its device needs.
use super::pages::Pages;
use crate::chain::{Look, Source};
use crate::disk::Disk;
use crate::io::{Completion, Io, Op, Token, Wait};
use formats::storage::Storage;
use std::cell::RefCell;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

pub const SECTOR: usize = 512;
/// ENOSPC.
const NO_SPACE: i32 = 28;

/// A small generator of numbers: the same seed, the same world.
#[derive(Clone)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % below
    }

    pub fn one_in(&mut self, count: u64) -> bool {
        count > 0 && self.roll(count) == 0
    }
}

/// What follows the bytes that were ever written is a hole, up to `len`.
#[derive(Default)]
pub struct FileBytes {
    cached: Pages,
    durable: Pages,
    len: usize,
    /// Which flush made `durable` what it is.
    flush: u64,
    /// There is no space for what is written, in the system's words, and how often that was said.
    full: Option<i32>,
    refused: u64,
    /// Nothing that is done to it ends.
    hung: bool,
    /// What is done to it takes so long, and when the last of that is through.
    pace: Pace,
    busy_until: Duration,
}

/// How fast a device is: one operation after the other through its middle, and each on its way for some time beside.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// 0 where bytes take no time.
    pub bytes_per_s: u64,
    pub latency: Duration,
    /// What a flush takes beside.
    pub flush: Duration,
}

/// All files of a world, by number, and its clock, in nanoseconds, if it has one.
#[derive(Clone, Default)]
pub struct Files(Arc<Mutex<Vec<FileBytes>>>, Option<Arc<AtomicU64>>);

impl Files {
    /// Files in a world whose time goes by when it is told to.
    pub fn with_clock() -> Self {
        Self(Arc::default(), Some(Arc::default()))
    }

    /// Everything that a disk in these files has.
    pub fn read_disk(&self, disk: &Disk) -> Vec<u8> {
        let mut bytes = vec![0; disk.size() as usize];
        let mut at = 0;
        while at < disk.size() {
            let (range, source) = disk.chain().map(at, disk.size() - at, Look::Images).expect("a mapping");
            if let Source::Data { layer, host } = source {
                let number = disk.chain().layers()[layer].file.file().number().expect("a simulated file");
                let bytes = &mut bytes[range.start as usize..range.end as usize];
                self.lock()[number as usize].read(host as usize, bytes);
            }
            at = range.end;
        }
        bytes
    }

    /// So much time goes by.
    pub fn pass(&self, time: Duration) {
        let clock = self.1.as_ref().expect("a world with a clock");
        clock.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// The time of the clock, if there is one.
    pub fn clock(&self) -> Option<Duration> {
        self.1.as_ref().map(|clock| Duration::from_nanos(clock.load(Ordering::Relaxed)))
    }

    /// From now on a file is that fast.
    pub fn set_pace(&self, number: u32, pace: Pace) {
        self.lock()[number as usize].pace = pace;
    }

    /// When an operation that is begun now can be over, where there is a clock.
    fn due(&self, op: &Op) -> Duration {
        let Some(now) = self.clock() else { return Duration::ZERO };
        let (file, len) = match op {
            Op::Timeout { after } => return now + *after,
            Op::Read { file, buf, .. } => (file, buf.len() as u64),
            Op::Write { file, buf, .. } => (file, buf.len() as u64),
            Op::Zero { file, .. } | Op::Flush { file } => (file, 0),
            _ => return now,
        };
        let file = &mut self.lock()[file.number().expect("a simulated file") as usize];
        let Pace { bytes_per_s, latency, flush } = file.pace;
        let mut takes = Duration::from_nanos((len * 1_000_000_000).checked_div(bytes_per_s).unwrap_or(0));
        if let Op::Flush { .. } = op {
            takes += flush;
        }
        file.busy_until = file.busy_until.max(now) + takes;
        file.busy_until + latency
    }

    /// One more file, durable as it is.
    pub fn add(&self, bytes: Vec<u8>) -> u32 {
        let mut files = self.lock();
        let cached = Pages::new(&bytes);
        let len = bytes.len();
        files.push(FileBytes { durable: cached.clone(), len, cached, ..FileBytes::default() });
        files.len() as u32 - 1
    }

    pub fn lock(&self) -> MutexGuard<'_, Vec<FileBytes>> {
        self.0.lock().expect("no panic under this lock")
    }

    pub fn storage(&self, number: u32) -> Arc<dyn Storage> {
        Arc::new(SimStorage { files: self.clone(), number })
    }

    /// The power goes: what was not flushed is there or not, sector by sector.
    pub fn cut_power(&self, dice: &mut Dice) {
        for file in self.lock().iter_mut() {
            let keep_all = dice.one_in(4);
            let len = file.cached.len().max(file.durable.len());
            file.cached.resize(len);
            file.durable.resize(len);
            for (cached, durable) in file.cached.differing(&file.durable) {
                for (cached, durable) in cached.chunks_mut(SECTOR).zip(durable.chunks(SECTOR)) {
                    if cached != durable && (keep_all || dice.one_in(2)) {
                        cached.copy_from_slice(durable);
                    }
                }
            }
            file.durable.clone_from(&file.cached);
        }
    }

    /// From now on there is no space for what is written to a file, or there is again. How often it was refused so far.
    pub fn set_full(&self, number: u32, full: bool) -> u64 {
        self.set_refusing(number, full.then_some(NO_SPACE))
    }

    /// The same with this error.
    pub fn set_refusing(&self, number: u32, errno: Option<i32>) -> u64 {
        let file = &mut self.lock()[number as usize];
        file.full = errno;
        file.refused
    }

    /// From now on nothing that is done to a file ends, or all of it does again.
    pub fn set_hung(&self, number: u32, hung: bool) {
        self.lock()[number as usize].hung = hung;
    }

    /// True where an operation cannot end now.
    fn holds(&self, op: &Op) -> bool {
        let (Op::Read { file, .. } | Op::Write { file, .. } | Op::Zero { file, .. } | Op::Flush { file }) = op else {
            return false;
        };
        file.number().is_some_and(|number| self.lock()[number as usize].hung)
    }

    /// Why what is to be written finds no space, if it finds none.
    fn refuses(&self, op: &Op) -> Option<i32> {
        let (Op::Write { file, .. } | Op::Zero { file, .. }) = op else { return None };
        let file = &mut self.lock()[file.number().expect("a simulated file") as usize];
        file.refused += u64::from(file.full.is_some());
        file.full
    }

    pub fn sync_one(&self, number: u32) {
        let file = &mut self.lock()[number as usize];
        file.durable.clone_from(&file.cached);
    }

    /// Everything is durable: a clean end.
    pub fn sync(&self) {
        self.lock().iter_mut().for_each(|file| file.durable.clone_from(&file.cached));
    }
}

thread_local!(static IS_GUEST: std::cell::Cell<bool> = const { std::cell::Cell::new(false) });

/// Who moves as long as this is there must not wait for a file that answers nothing.
pub struct AsGuest(());

impl AsGuest {
    pub fn new() -> Self {
        IS_GUEST.set(true);
        Self(())
    }
}

impl Drop for AsGuest {
    fn drop(&mut self) {
        IS_GUEST.set(false);
    }
}

struct SimStorage {
    files: Files,
    number: u32,
}

impl SimStorage {
    fn with<T>(&self, what: impl FnOnce(&mut FileBytes) -> T) -> T {
        let file = &mut self.files.lock()[self.number as usize];
        assert!(!(file.hung && IS_GUEST.get()), "a guest's thread waits for tables of a disk that answers nothing");
        what(file)
    }
}

impl Storage for SimStorage {
    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        let read = |file: &mut FileBytes| match file.read(at as usize, bytes) {
            count if count == bytes.len() => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        };
        self.with(read)
    }
    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.with(|file| match file.full {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => {
                file.write(at as usize, bytes);
                Ok(())
            }
        })
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.with(|file| file.len as u64))
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.with(|file| file.set_len(len as usize));
        Ok(())
    }
    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        Ok((at < self.len()?).then_some(at))
    }
    fn next_hole(&self, _: u64) -> io::Result<u64> {
        self.len()
    }
}

impl FileBytes {
    /// How many bytes there were to be read.
    pub fn read(&self, at: usize, bytes: &mut [u8]) -> usize {
        let count = self.len.saturating_sub(at).min(bytes.len());
        let written = self.cached.len().saturating_sub(at).min(count);
        if written > 0 {
            self.cached.read(at, &mut bytes[..written]);
        }
        bytes[written..count].fill(0);
        count
    }

    /// A bit of the device is not what it was, where there is something.
    pub fn rot(&mut self, at: usize) {
        if at < self.cached.len() {
            self.cached.flip(at);
        }
    }

    pub fn set_len(&mut self, len: usize) {
        self.cached.resize(self.cached.len().min(len));
        self.len = len;
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        if self.cached.len() < at + bytes.len() {
            self.cached.resize(at + bytes.len());
            self.len = self.len.max(self.cached.len());
        }
        self.cached.write(at, bytes);
    }
}

/// One thread's queue.
pub struct SimIo {
    files: Files,
    queue: Vec<Queued>,
    dice: RefCell<Dice>,
    /// One operation in so many fails; 0 for none.
    fail_one_in: u64,
    now: Duration,
}

struct Queued {
    token: Token,
    op: Op,
    /// Not over before that.
    due: Duration,
    /// What a flush makes durable: its file's bytes when it was asked for, and its number.
    snapshot: Option<(Pages, u64)>,
}

impl SimIo {
    pub fn new(files: &Files, seed: u64, fail_one_in: u64) -> Self {
        let dice = RefCell::new(Dice::new(seed));
        Self { files: files.clone(), queue: Vec::new(), dice, fail_one_in, now: Duration::ZERO }
    }

    fn roll(&self, below: u64) -> u64 {
        self.dice.borrow_mut().roll(below)
    }

    /// True where nothing is under way.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// What the kernel still does after its process is gone: some of it, in any order.
    pub fn abandon(&mut self) {
        while !self.queue.is_empty() {
            let pick = self.roll(self.queue.len() as u64) as usize;
            let mut queued = self.queue.swap_remove(pick);
            if self.roll(2) == 0 {
                let _ = self.carry_out(&mut queued);
            }
        }
    }

    fn carry_out(&self, queued: &mut Queued) -> io::Result<u32> {
        let mut files = self.files.lock();
        let file = |file: &crate::io::File| file.number().expect("a simulated file") as usize;
        match &mut queued.op {
            Op::Read { file: from, at, buf } => Ok(files[file(from)].read(*at as usize, buf) as u32),
            Op::Write { file: to, at, buf } => {
                files[file(to)].write(*at as usize, buf);
                Ok(buf.len() as u32)
            }
            Op::Zero { file: of, at, len, .. } => {
                let file = &mut files[file(of)];
                let end = ((*at + *len) as usize).min(file.cached.len());
                file.cached.fill_zeroes((*at as usize).min(end)..end);
                Ok(0)
            }
            Op::Flush { file: of } => {
                let file = &mut files[file(of)];
                let (bytes, flush) = queued.snapshot.take().expect("taken at submission");
                if flush > file.flush {
                    (file.durable, file.flush) = (bytes, flush);
                }
                Ok(0)
            }
            Op::Compute { from, to, work } => work.run(from, to),
            Op::Clone { from, at, to, to_at, len } => {
                let mut bytes = vec![0; *len as usize];
                files[file(from)].read(*at as usize, &mut bytes);
                files[file(to)].write(*to_at as usize, &bytes);
                Ok(0)
            }
            Op::Prefetch { .. } | Op::Timeout { .. } => Ok(0),
            op => unreachable!("not simulated: {op:?}"),
        }
    }

    /// The first half of a write may be there long before its end.
    fn tear(&self, op: &Op) {
        if let Op::Write { file, at, buf } = op
            && self.roll(2) == 0
        {
            let half = buf.len() / 2 / SECTOR * SECTOR;
            let number = file.number().expect("a simulated file") as usize;
            self.files.lock()[number].write(*at as usize, &buf[..half]);
        }
    }
}

impl Io for SimIo {
    fn submit(&mut self, token: Token, op: Op) {
        self.tear(&op);
        let snapshot = match &op {
            Op::Flush { file } => {
                thread_local!(static FLUSHES: std::cell::Cell<u64> = const { std::cell::Cell::new(0) });
                let flush = FLUSHES.replace(FLUSHES.get() + 1) + 1;
                let number = file.number().expect("a simulated file") as usize;
                Some((self.files.lock()[number].cached.clone(), flush))
            }
            _ => None,
        };
        let due = self.files.due(&op);
        self.queue.push(Queued { token, op, due, snapshot });
    }

    fn reap(&mut self, _: Wait, done: &mut Vec<Completion>) -> io::Result<()> {
        let clock = self.files.clock();
        self.now = clock.unwrap_or(self.now + Duration::from_millis(1));
        let is_able = |queued: &Queued| queued.due <= self.now && !self.files.holds(&queued.op);
        let able: Vec<usize> = (0..self.queue.len()).filter(|at| is_able(&self.queue[*at])).collect();
        if able.is_empty() {
            return Ok(());
        }
        let pick = able[self.roll(able.len() as u64) as usize];
        let mut queued = self.queue.swap_remove(pick);
        if let (Op::Timeout { after }, None) = (&queued.op, clock) {
            self.now += *after;
        }
        let fails = self.fail_one_in > 0 && self.roll(self.fail_one_in) == 0;
        let refused = self.files.refuses(&queued.op);
        let result = match (&queued.op, fails) {
            _ if refused.is_some() => Err(io::Error::from_raw_os_error(refused.unwrap_or_default())),
            // A failed write may have changed some of its sectors.
            (Op::Write { .. }, true) => {
                self.tear(&queued.op);
                Err(io::Error::from_raw_os_error(5))
            }
            (Op::Read { .. } | Op::Zero { .. } | Op::Clone { .. }, true) => Err(io::Error::from_raw_os_error(5)),
            _ => self.carry_out(&mut queued),
        };
        done.push(Completion { token: queued.token, op: queued.op, result });
        Ok(())
    }

    fn now(&self) -> Duration {
        self.files.clock().unwrap_or(self.now)
    }
}
