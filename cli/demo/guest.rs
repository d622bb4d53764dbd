//! The demo's guest: writes all the time and remembers what was acknowledged.
use super::disk::{BLOCK_LEN, Random, Truth, fill};
use super::nbd::Nbd;
use crate::failure::Failure;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Blocks of the longest write.
const BLOCKS_MAX: u64 = 16;
/// One of so many requests is a flush.
const FLUSH_EVERY: u64 = 512;
/// One of so many writes is of zeroes.
const ZEROES_EVERY: u64 = 16;

/// A guest that is running.
pub struct Guest {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<Truth, Failure>>>,
}

/// What the guest has done so far, for whoever looks.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    writes: AtomicU64,
    bytes: AtomicU64,
    /// The longest wait for an answer since somebody asked, in microseconds.
    wait_us_max: AtomicU64,
}

impl Guest {
    /// Starts to write to `nbd`, whose disk holds what `truth` says.
    ///
    /// # Errors
    /// The system's, of the thread.
    pub fn start(nbd: Nbd, truth: Truth, seed: u64) -> Result<Self, Failure> {
        let shared = Arc::new(Shared::default());
        let told = Arc::clone(&shared);
        let thread = thread::Builder::new().name("guest".into()).spawn(move || write(nbd, truth, seed, &told));
        let thread = thread.map_err(|error| Failure::new(format!("the guest's thread: {error}")))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// How many writes were acknowledged.
    pub fn writes(&self) -> u64 {
        self.shared.writes.load(Ordering::Relaxed)
    }

    /// How many bytes were acknowledged.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// The longest wait for an answer since this was asked last.
    pub fn take_longest_wait(&self) -> Duration {
        Duration::from_micros(self.shared.wait_us_max.swap(0, Ordering::Relaxed))
    }

    /// Waits until `writes` more were acknowledged.
    ///
    /// # Errors
    /// That the guest has met with an error and stopped.
    pub fn wait_for_writes(&mut self, writes: u64) -> Result<(), Failure> {
        let until = self.writes() + writes;
        while self.writes() < until {
            self.check()?;
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Fails where the guest has met with an error and stopped.
    ///
    /// # Errors
    /// The guest's.
    pub fn check(&mut self) -> Result<(), Failure> {
        match self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
            true => self.stop().map(|_| ()),
            false => Ok(()),
        }
    }

    /// Ends the last request and returns what was acknowledged.
    ///
    /// # Errors
    /// The guest's, where it has met with one.
    pub fn stop(&mut self) -> Result<Truth, Failure> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let gone = || Failure::new("the guest has gone");
        self.thread.take().ok_or_else(gone)?.join().map_err(|_| gone())?
    }
}

fn write(mut nbd: Nbd, mut truth: Truth, seed: u64, shared: &Shared) -> Result<Truth, Failure> {
    let mut random = Random::new(seed);
    let mut bytes = vec![0; (BLOCKS_MAX * BLOCK_LEN) as usize];
    while !shared.stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        if random.below(FLUSH_EVERY) == 0 {
            nbd.flush()?;
        } else {
            let (block, count) = place(&mut random, truth.blocks());
            let stamp = if random.below(ZEROES_EVERY) == 0 { 0 } else { truth.next_stamp() };
            let bytes = &mut bytes[..(count * BLOCK_LEN) as usize];
            match stamp {
                0 => nbd.write_zeroes(block * BLOCK_LEN, bytes.len())?,
                _ => {
                    fill(block, stamp, bytes);
                    nbd.write(block * BLOCK_LEN, bytes)?;
                }
            }
            truth.set(block, count, stamp);
            shared.writes.fetch_add(1, Ordering::Relaxed);
            shared.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        let waited_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        shared.wait_us_max.fetch_max(waited_us, Ordering::Relaxed);
    }
    Ok(truth)
}

/// Where a guest writes next: three times of four in a quarter of its disk, as guests do.
fn place(random: &mut Random, blocks: u64) -> (u64, u64) {
    let count = 1 + random.below(BLOCKS_MAX.min(blocks));
    let end = if random.below(4) == 0 { blocks } else { (blocks / 4).max(count) };
    (random.below(end - count + 1), count)
}

#[cfg(test)]
mod tests {
    use super::{BLOCKS_MAX, place};
    use crate::demo::disk::Random;

    #[test]
    fn writes_are_inside_the_disk() {
        for blocks in [1, 2, 15, 16, 17, 100, 131_072] {
            let mut random = Random::new(blocks);
            for _ in 0..1000 {
                let (block, count) = place(&mut random, blocks);
                assert!((1..=BLOCKS_MAX).contains(&count) && block + count <= blocks, "{block} {count} of {blocks}");
            }
        }
    }
}
