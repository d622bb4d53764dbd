//! Guests first: copiers may have as much under way as lets the guest's requests take a few times what they take alone.
//!
//! What they take alone is found out every few seconds, when copiers rest for a moment, and only while a guest is
//! there. Then each window of requests decides: where its 99th percentile is beyond the bound, copiers get half as many
//! runs under way, with one left shorter ones, and then less speed; where it is within, all that grows again. They begin
//! with one run, and a guest that asks for nothing costs a moment. Copying never becomes so slow that it would not come to
//! an end: see `floor`.
use crate::rate::{Rate, per_second};
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Of what takes less alone, this is what counts: copiers do not starve for microseconds.
const ALONE_MIN: Duration = Duration::from_micros(500);
/// What copiers have left under way ends in this time, mostly; then they listen for that time.
const DRAIN: Duration = Duration::from_millis(20);
const LISTEN: Duration = Duration::from_millis(40);
/// From one time of listening to the next.
const LISTEN_AGAIN: Duration = Duration::from_secs(5);
/// A window is over when it has this many requests and is that old, or is so old that few have to do.
const WINDOW_REQUESTS: u64 = 30;
const WINDOW_MIN: Duration = Duration::from_millis(50);
const WINDOW_MAX: Duration = Duration::from_millis(500);
/// Who has asked for nothing by then is not there.
const FIRST: Duration = Duration::from_millis(10);
/// More runs than any copier has.
const RUNS_MAX: u64 = 256;
/// Runs are shortened to a quarter: what is shorter costs more than it spares.
const HALVINGS_MAX: u32 = 2;
/// From here on they grow one by one.
const RUNS_USUAL: u64 = 16;
/// The least speed, in bytes a second, or twice what guests make anew.
const SPEED_MIN: u64 = 8 << 20;

/// How long requests took: counts, in buckets that are 2^(1/4) apart from a microsecond on.
#[derive(Debug)]
struct Latencies([AtomicU64; BUCKETS]);

/// Up to 16 minutes.
const BUCKETS: usize = 120;

type Counts = [u64; BUCKETS];

/// How much copiers may do.
#[derive(Debug)]
pub struct Courtesy {
    factor: AtomicU64,
    latencies: Latencies,
    /// Not now: the job is late.
    suspended: AtomicBool,
    /// What copiers may have under way.
    runs: AtomicU64,
    /// How often the length of a run is halved; only where there is one.
    halvings: AtomicU32,
    rate: Rate,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    stage: Stage,
    /// No window was beyond the bound yet.
    untried: bool,
    listen_next: Duration,
    /// The 99th percentile without copies.
    alone: Option<Duration>,
    /// Of the last window that had requests.
    latest: Option<Duration>,
    window: Window,
}

#[derive(Debug)]
enum Stage {
    Copying,
    Draining(Duration),
    Listening(Duration),
}

/// Where a window began.
#[derive(Debug)]
struct Window {
    begun: Option<Duration>,
    counts: Counts,
    done: Done,
}

/// What was done so far, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    /// By copiers.
    pub copied: u64,
    /// Made anew by guests.
    pub dirtied: u64,
}

impl Default for Courtesy {
    /// None: copiers do what they can.
    fn default() -> Self {
        Self {
            factor: AtomicU64::new(0),
            latencies: Latencies(std::array::from_fn(|_| AtomicU64::new(0))),
            suspended: AtomicBool::new(false),
            runs: AtomicU64::new(RUNS_MAX),
            halvings: AtomicU32::new(0),
            rate: Rate::default(),
            state: Mutex::new(State {
                stage: Stage::Copying,
                untried: true,
                listen_next: Duration::ZERO,
                alone: None,
                latest: None,
                window: Window { begun: None, counts: [0; BUCKETS], done: Done::default() },
            }),
        }
    }
}

impl Courtesy {
    /// Requests may take `factor` times as long as alone; 0 is no bound.
    pub fn set_factor(&self, factor: u64) {
        let before = self.factor.swap(factor, Ordering::Relaxed);
        if factor == 0 {
            self.unbind();
        } else if before == 0 {
            self.set(1, 0, 0);
        }
    }

    /// None while this is set: there is no time for it.
    pub fn suspend(&self, on: bool) {
        if self.suspended.swap(on, Ordering::Relaxed) != on && on {
            self.unbind();
        }
    }

    /// What requests take alone is another time now: it is found out anew.
    pub fn forget(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        (state.alone, state.listen_next) = (None, Duration::ZERO);
    }

    /// The bound; 0 is none.
    pub fn factor(&self) -> u64 {
        self.factor.load(Ordering::Relaxed)
    }

    /// A guest's request took so long.
    pub fn note(&self, took: Duration) {
        self.latencies.0[bucket(took)].fetch_add(1, Ordering::Relaxed);
    }

    /// How many runs copiers may have under way now.
    pub fn runs(&self) -> u64 {
        self.runs.load(Ordering::Relaxed)
    }

    /// How often the length of a run is halved now.
    pub fn halvings(&self) -> u32 {
        self.halvings.load(Ordering::Relaxed)
    }

    /// The speed that they are held to, in bytes a second; 0 is none.
    pub fn speed(&self) -> u64 {
        self.rate.limit()
    }

    /// The 99th percentile of how long requests take without copies, and how long they took lately.
    pub fn measured(&self) -> (Option<Duration>, Option<Duration>) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        (state.alone, state.latest)
    }

    /// Whether a copy may be started at `now`, when so much was `done`; else how long to wait.
    pub fn check(&self, now: Duration, done: Done) -> Result<(), Duration> {
        if self.factor() == 0 || self.suspended.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match state.stage {
            Stage::Draining(end) | Stage::Listening(end) if now < end => return Err(end - now),
            Stage::Draining(_) => {
                state.window = self.window(now, done);
                state.stage = Stage::Listening(now + LISTEN);
                return Err(LISTEN);
            }
            Stage::Listening(_) => {
                if let Some(found) = percentile(&self.latencies.since(&state.window.counts)) {
                    // What one moment said is not all there is.
                    let alone = state.alone.map_or(found, |before| (before * 3 + found) / 4);
                    state.alone = Some(alone);
                }
                (state.stage, state.listen_next) = (Stage::Copying, now + LISTEN_AGAIN);
                state.window = self.window(now, done);
            }
            Stage::Copying => self.decide(&mut state, now, done),
        }
        match state.stage {
            Stage::Draining(end) => Err(end.saturating_sub(now)),
            _ => self.rate.check(now),
        }
    }

    /// A copy of `count` bytes was started.
    pub fn spend(&self, count: u64) {
        self.rate.spend(count);
    }

    fn window(&self, now: Duration, done: Done) -> Window {
        Window { begun: Some(now), counts: self.latencies.now(), done }
    }

    fn decide(&self, state: &mut State, now: Duration, done: Done) {
        let Some(begun) = state.window.begun else {
            state.window = self.window(now, done);
            return;
        };
        let (age, requests) = (now.saturating_sub(begun), self.latencies.since(&state.window.counts));
        let count: u64 = requests.iter().sum();
        let nobody = count == 0 && state.latest.is_none() && age >= FIRST;
        if !nobody && (age < WINDOW_MIN || (count < WINDOW_REQUESTS && age < WINDOW_MAX)) {
            return;
        }
        let before = state.window.done;
        state.window = self.window(now, done);
        let Some(late) = percentile(&requests) else {
            self.unbind();
            return;
        };
        state.latest = Some(late);
        if now >= state.listen_next {
            state.stage = Stage::Draining(now + DRAIN);
            return;
        }
        let Some(alone) = state.alone else { return };
        let copied = per_second(done.copied.saturating_sub(before.copied), age);
        let dirtied = per_second(done.dirtied.saturating_sub(before.dirtied), age);
        let within = late <= alone.max(ALONE_MIN) * u32::try_from(self.factor()).unwrap_or(u32::MAX);
        state.untried &= within;
        match (within, self.runs(), self.halvings(), self.speed()) {
            (false, 2.., ..) => self.set((self.runs().min(RUNS_USUAL) / 2).max(1), 0, 0),
            (_, _, halvings @ 1.., 0) if copied < floor(dirtied) => self.set(1, halvings - 1, 0),
            (false, _, halvings, _) if halvings < HALVINGS_MAX => self.set(1, halvings + 1, 0),
            (false, _, halvings, _) => self.set(1, halvings, (copied - copied / 4).max(floor(dirtied))),
            // Faster than they are even so: no bound at all.
            (true, _, halvings, speed @ 1..) if speed / 2 > copied => self.set(1, halvings, 0),
            (true, _, halvings, speed @ 1..) => self.set(1, halvings, speed + speed / 4),
            (true, _, halvings @ 1.., _) => self.set(1, halvings - 1, 0),
            (true, runs, ..) if state.untried && runs < RUNS_USUAL => self.set(runs * 2, 0, 0),
            (true, runs, ..) => self.set((runs + 1).min(RUNS_MAX), 0, 0),
        }
    }

    fn unbind(&self) {
        self.set(RUNS_MAX, 0, 0);
    }

    fn set(&self, runs: u64, halvings: u32, speed: u64) {
        self.runs.store(runs, Ordering::Relaxed);
        self.halvings.store(halvings, Ordering::Relaxed);
        if self.rate.limit() != speed {
            self.rate.set(speed);
        }
    }
}

/// What copiers may do in any case: twice what guests make anew, or they would not come to an end.
fn floor(dirtied: u64) -> u64 {
    SPEED_MIN.max(dirtied.saturating_mul(2))
}

impl Latencies {
    fn now(&self) -> Counts {
        std::array::from_fn(|bucket| self.0[bucket].load(Ordering::Relaxed))
    }

    fn since(&self, before: &Counts) -> Counts {
        std::array::from_fn(|bucket| self.0[bucket].load(Ordering::Relaxed).saturating_sub(before[bucket]))
    }
}

fn bucket(took: Duration) -> usize {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(4);
    let octave = 63 - micros.leading_zeros();
    let quarter = micros >> (octave - 2) & 3;
    (octave as usize * 4 + quarter as usize).min(BUCKETS - 1)
}

/// Where a bucket ends.
fn end(bucket: usize) -> Duration {
    let (octave, quarter) = (bucket / 4, bucket as u64 % 4);
    Duration::from_micros((5 + quarter) << octave >> 2)
}

/// The 99th of each hundred requests; `None` where there are none.
fn percentile(counts: &Counts) -> Option<Duration> {
    let count: u64 = counts.iter().sum();
    let mut left = (count * 99).div_ceil(100);
    let found = counts.iter().position(|requests| {
        left = left.saturating_sub(*requests);
        left == 0
    });
    found.filter(|_| count > 0).map(end)
}

#[cfg(test)]
mod tests {
    use super::{Counts, Courtesy, Done, SPEED_MIN, bucket, end, percentile};
    use std::time::Duration;

    const FACTOR: u64 = 4;
    const RUN: u64 = 256 << 10;
    const STEP: Duration = Duration::from_millis(1);

    /// A disk that a guest asks once a millisecond, where each run that is under way adds to what a request takes.
    struct Disk {
        courtesy: Courtesy,
        now: Duration,
        done: Done,
        /// Microseconds that a request takes alone, and that each run adds.
        alone: u64,
        each: u64,
        dirtied: u64,
        asks: bool,
    }

    impl Disk {
        fn new(alone: u64, each: u64) -> Self {
            let courtesy = Courtesy::default();
            courtesy.set_factor(FACTOR);
            Self { courtesy, now: STEP, done: Done::default(), alone, each, dirtied: 0, asks: true }
        }

        /// For so many milliseconds; what requests took, and how many bytes were copied.
        fn go_on(&mut self, steps: u64) -> (Counts, u64) {
            let (before, copied) = (self.courtesy.latencies.now(), self.done.copied);
            for _ in 0..steps {
                let mut runs = 0;
                // A run takes a millisecond.
                let mut bytes = 0;
                while runs < self.courtesy.runs().min(16) && self.courtesy.check(self.now, self.done).is_ok() {
                    let run = RUN >> self.courtesy.halvings();
                    self.courtesy.spend(run);
                    bytes += run;
                    runs += 1;
                }
                self.done.copied += bytes;
                if self.asks {
                    self.courtesy.note(Duration::from_micros(self.alone + self.each * bytes / RUN));
                }
                self.done.dirtied += self.dirtied;
                self.now += STEP;
            }
            (self.courtesy.latencies.since(&before), self.done.copied - copied)
        }
    }

    #[test]
    fn requests_take_a_few_times_what_they_take_alone() {
        let mut disk = Disk::new(1000, 1000);
        disk.go_on(3000);
        let (counts, copied) = disk.go_on(20_000);
        let late = percentile(&counts).expect("requests");
        assert!(late <= Duration::from_millis(6), "{late:?}");
        // Three runs of sixteen are what the bound allows.
        assert!(copied >= 20_000 * RUN * 3 / 2, "{}", copied / RUN);
    }

    #[test]
    fn a_guest_that_asks_for_nothing_costs_nothing() {
        let mut disk = Disk::new(1000, 1000);
        disk.asks = false;
        // It begins with one, and learns of nobody.
        assert!(disk.go_on(5000).1 >= 4980 * 16 * RUN);
        disk.asks = true;
        disk.go_on(3000);
        assert!(disk.courtesy.runs() < 16);
        disk.asks = false;
        disk.go_on(1000);
        assert_eq!(disk.go_on(1000).1, 1000 * 16 * RUN, "it has gone");
    }

    #[test]
    fn a_disk_that_one_run_is_too_much_for_is_copied_slowly_and_to_the_end() {
        let mut disk = Disk::new(1000, 20_000);
        disk.go_on(10_000);
        assert_eq!(disk.courtesy.runs(), 1);
        let (_, copied) = disk.go_on(10_000);
        assert!(copied >= 10 * SPEED_MIN * 9 / 10, "{copied}");
        assert!(copied <= 10 * SPEED_MIN * 3, "{copied}");
        // A guest that makes 20 MB/s anew: the copy is faster than that.
        disk.dirtied = 20_000;
        disk.go_on(2000);
        let (_, copied) = disk.go_on(10_000);
        assert!(copied > 10 * 30_000_000, "{copied}");
    }

    #[test]
    fn without_a_factor_nobody_waits() {
        let mut disk = Disk::new(1000, 1000);
        disk.courtesy.set_factor(0);
        assert_eq!(disk.go_on(3000).1, 3000 * 16 * RUN);
        assert_eq!(disk.courtesy.measured(), (None, None));
    }

    #[test]
    fn buckets_are_near_what_they_count() {
        for micros in [4, 5, 7, 8, 100, 999, 1000, 12_345, 1_000_000, 500_000_000] {
            let took = Duration::from_micros(micros);
            let end = end(bucket(took));
            assert!(end > took && end <= took * 5 / 4 + Duration::from_micros(1), "{took:?}: {end:?}");
        }
        assert!(bucket(Duration::MAX) == bucket(Duration::from_secs(10_000)));
        assert_eq!(percentile(&[0; _]), None);
    }
}
