//! A guest that writes all the time and keeps its own copy of the truth.
//!
//! It behaves as QEMU does (`reconnect-delay`): when the server is gone it connects again and sends once
//! more only what was not answered. Before that it reads what these requests may have changed: every sector
//! must be as before or as the request wants it, and everything that was answered must be there.
use super::nbd::{Client, Replies, Request};
use super::random::Random;
use super::{PATIENCE, assert_same};
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What the guest does.
#[derive(Clone, Copy)]
pub struct Habits {
    /// Which sequence of requests.
    pub seed: u64,
    /// Requests in flight at once.
    pub depth: usize,
    /// Longest request in bytes.
    pub len_max: u64,
    /// One request in this many is a flush; 0 for never.
    pub flush_one_in: u64,
    /// Waits so long after each answer, so that a slow copier can catch up.
    pub pause: Duration,
    /// It reads too, also what a discard has left.
    pub reads: bool,
}

impl Default for Habits {
    fn default() -> Self {
        Self { seed: 1, depth: 8, len_max: 128 << 10, flush_one_in: 0, pause: Duration::from_millis(1), reads: true }
    }
}

/// A guest at work in its own thread.
pub struct Writer {
    thread: Option<JoinHandle<Vec<u8>>>,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
}

impl Writer {
    /// Starts writing to `export`, whose disk holds `truth` now.
    pub fn start(socket: &Path, export: &str, truth: Vec<u8>, habits: Habits) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let mut guest = Guest {
            socket: socket.to_owned(),
            export: export.to_owned(),
            client: Client::connect(socket, export, Replies::Structured).expect("the guest's connection"),
            random: Random::new(habits.seed),
            habits,
            truth,
            in_flight: HashMap::new(),
        };
        assert_eq!(guest.client.size(), guest.truth.len() as u64, "the export's size");
        let (stop_too, answered_too) = (stop.clone(), answered.clone());
        let thread = std::thread::spawn(move || guest.live(&stop_too, &answered_too));
        Self { thread: Some(thread), stop, answered }
    }

    /// Waits until `count` more requests were answered.
    #[track_caller]
    pub fn wait(&self, count: u64) {
        let goal = self.answered.load(Ordering::Relaxed) + count;
        super::eventually("the guest's requests are answered", || {
            let dead = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
            assert!(!dead, "the guest is dead: see its own message");
            (self.answered.load(Ordering::Relaxed) >= goal).then_some(())
        });
    }

    /// Stops it when all it asked is answered; returns what the disk must hold.
    #[track_caller]
    pub fn stop(mut self) -> Vec<u8> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("a guest is stopped once");
        thread.join().unwrap_or_else(|_| panic!("the guest found something wrong: see its own message"))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One thing in flight.
enum Asked {
    /// A request that changes the disk, or a flush.
    Change(Request),
    /// A read of what nothing else in flight touches.
    Look { at: u64, read: Request },
    /// The read behind a discard: it shows which sectors are zeroes now and which are as before.
    AfterTrim { at: u64, read: Request },
}

impl Asked {
    fn request(&self) -> &Request {
        match self {
            Self::Change(request) | Self::Look { read: request, .. } | Self::AfterTrim { read: request, .. } => request,
        }
    }
}

struct Guest {
    socket: PathBuf,
    export: String,
    client: Client,
    random: Random,
    habits: Habits,
    truth: Vec<u8>,
    in_flight: HashMap<u64, Asked>,
}

impl Guest {
    fn live(&mut self, stop: &AtomicBool, answered: &AtomicU64) -> Vec<u8> {
        loop {
            let stopping = stop.load(Ordering::Relaxed);
            if stopping && self.in_flight.is_empty() {
                return std::mem::take(&mut self.truth);
            }
            if !stopping {
                self.fill_queue();
            }
            if self.take_answer().is_err() {
                self.come_back();
            }
            answered.fetch_add(1, Ordering::Relaxed);
            if !stopping {
                std::thread::sleep(self.habits.pause);
            }
        }
    }

    fn fill_queue(&mut self) {
        while self.in_flight.len() < self.habits.depth {
            if let Some(asked) = self.wish() {
                self.send(asked);
            }
        }
    }

    fn send(&mut self, asked: Asked) {
        let cookie = self.client.send(asked.request());
        self.in_flight.insert(cookie, asked);
    }

    /// The next request; `None` where it would meet one in flight.
    fn wish(&mut self) -> Option<Asked> {
        if self.habits.flush_one_in > 0 && self.random.one_in(self.habits.flush_one_in) {
            return Some(Asked::Change(Request::Flush));
        }
        let block = u64::from(self.client.block_min()).max(512);
        let blocks = self.truth.len() as u64 / block;
        let len = 1 + self.random.below(self.habits.len_max / block);
        // Half of it goes to the disk's first eighth, so that places are written again and again.
        let reach = if self.random.one_in(2) { blocks / 8 } else { blocks };
        let first = self.random.below(reach.max(1));
        let (at, len) = (first * block, (len.min(blocks - first) * block) as u32);
        if self.in_flight.values().any(|other| meets(other.request(), at, u64::from(len))) {
            return None;
        }
        Some(match self.random.below(16) {
            0 | 1 => Asked::Change(Request::Zero { at, len, keep: self.random.one_in(2) }),
            2 if self.habits.reads => Asked::Change(Request::Trim { at, len }),
            3 | 4 if self.habits.reads => Asked::Look { at, read: Request::Read { at, len } },
            5 => Asked::Change(Request::Write { at, bytes: vec![0; len as usize] }),
            _ => Asked::Change(Request::Write { at, bytes: self.random.bytes(len as usize) }),
        })
    }

    fn take_answer(&mut self) -> io::Result<()> {
        let answer = self.client.receive()?;
        let asked = self.in_flight.remove(&answer.cookie).expect("the client knows its cookies");
        let bytes = answer.result.unwrap_or_else(|number| panic!("{}: error {number}", asked.request()));
        match asked {
            Asked::Change(Request::Trim { at, len }) => {
                self.send(Asked::AfterTrim { at, read: Request::Read { at, len } })
            }
            Asked::Change(request) => apply(&mut self.truth, &request),
            Asked::Look { at, .. } => {
                let place = at as usize..at as usize + bytes.len();
                assert_same(&format!("a read at {at}"), &bytes, &self.truth[place]);
            }
            Asked::AfterTrim { at, .. } => self.learn_trim(at, &bytes),
        }
        Ok(())
    }

    /// Connects again, looks at what was in flight, and sends it once more.
    fn come_back(&mut self) {
        let begun = Instant::now();
        let unanswered: Vec<Asked> = std::mem::take(&mut self.in_flight).into_values().collect();
        // A server may be killed again while it is looked at.
        let found = loop {
            assert!(begun.elapsed() < PATIENCE, "the guest's server did not come back");
            std::thread::sleep(Duration::from_millis(20));
            let Ok(client) = Client::connect(&self.socket, &self.export, Replies::Structured) else { continue };
            self.client = client;
            if let Ok(found) = self.client.try_content() {
                break found;
            }
        };
        self.look_after_kill(&found, &unanswered);
        for asked in unanswered {
            self.send(asked);
        }
    }

    /// The whole disk: answered requests are there, each unanswered one is there or not, sector by sector.
    fn look_after_kill(&mut self, found: &[u8], unanswered: &[Asked]) {
        // A disk that has grown meanwhile: what is new reads as zeroes.
        self.truth.resize(self.truth.len().max(found.len()), 0);
        let mut wanted = self.truth.clone();
        for asked in unanswered {
            match asked {
                Asked::Change(request) => apply(&mut wanted, request),
                Asked::AfterTrim { at, read: Request::Read { len, .. } } => {
                    apply(&mut wanted, &Request::Trim { at: *at, len: *len });
                }
                Asked::Look { .. } | Asked::AfterTrim { .. } => (),
            }
        }
        for at in (0..found.len()).step_by(512) {
            let sector = at..at + 512;
            if found[sector.clone()] == wanted[sector.clone()] {
                self.truth[sector.clone()].copy_from_slice(&found[sector.clone()]);
            }
        }
        assert_same("the disk after the server came back", found, &self.truth);
    }

    fn learn_trim(&mut self, at: u64, found: &[u8]) {
        for (index, sector) in found.chunks(512).enumerate() {
            let from = at as usize + index * 512;
            let known = &mut self.truth[from..from + sector.len()];
            assert!(
                sector == known || sector.iter().all(|byte| *byte == 0),
                "the sector at {from} is neither zeroes nor as it was before its discard"
            );
            known.copy_from_slice(sector);
        }
    }
}

/// What a request makes of the disk; of a discard, all that it may.
fn apply(disk: &mut [u8], request: &Request) {
    match request {
        Request::Write { at, bytes } => disk[*at as usize..][..bytes.len()].copy_from_slice(bytes),
        Request::Zero { at, len, .. } | Request::Trim { at, len } => disk[*at as usize..][..*len as usize].fill(0),
        Request::Read { .. } | Request::Flush => (),
    }
}

fn meets(other: &Request, at: u64, len: u64) -> bool {
    let (other_at, other_len) = match other {
        Request::Read { at, len } | Request::Zero { at, len, .. } | Request::Trim { at, len } => (*at, u64::from(*len)),
        Request::Write { at, bytes } => (*at, bytes.len() as u64),
        Request::Flush => return false,
    };
    at < other_at + other_len && other_at < at + len
}
