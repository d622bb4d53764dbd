//! Bounds that a user gave: until when the job is to be ready, and how far the target may be behind after that.
//!
//! Rates of the last seconds say whether a bound will be kept. Where it would not, guest writes are slowed in proportion,
//! to a share of their own rate that `slowdown_max` bounds; where not even that is enough, the job says so, with the
//! numbers, long before the time. Without a bound nobody is slowed.
//!
//! The same rates tell `auto` that a copy in the background does not get ahead, or that writing to both sides costs
//! guests too much. Where both is so, guests wait until the job is ready, for else it never would be.
use crate::control::MAX_SLOWDOWN;
use crate::fault::{Fault, planted};
use crate::mirror::Mirror;
use crate::sync::Ordering;
use std::collections::VecDeque;
use std::time::Duration;

/// How often it is decided.
const EVERY: Duration = Duration::from_millis(200);
/// Over how long rates are measured, and over how long at least.
const LATELY: Duration = Duration::from_secs(3);
const LATELY_MIN: Duration = Duration::from_millis(600);
/// Over how long a copy has to fall behind before both sides are written instead.
const STALLS_MIN: Duration = Duration::from_millis(900);
/// A copy of which guests undo that share as it goes would write the disk several times, and take as long.
const UNDONE_MAX: f64 = 0.25;
/// The share of the time left that is planned with: a pause, a flush, a slow second come in between.
const PLANNED: f64 = 0.9;

/// For a wait of that on average, guests write to the source alone again, and for that long.
const WAIT_MAX: Duration = Duration::from_millis(50);
const SPARED: Duration = Duration::from_secs(30);
/// Of fewer writes nothing is concluded.
const WRITES_MIN: u64 = 10;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Time from the next step on in which the job is to be ready.
    pub deadline: Option<Duration>,
    /// How many times as slow guest writes may become for any of these.
    pub slowdown_max: u64,
    /// Bytes that the target may be behind once everything was brought over; 0 is no bound.
    pub lag_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { deadline: None, slowdown_max: MAX_SLOWDOWN, lag_max: 0 }
    }
}

/// What was done so far, in bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    copied: u64,
    dirtied: u64,
    guest: u64,
    /// Guest writes, and for how many nanoseconds they waited for the mirror.
    writes: u64,
    delay_ns: u64,
}

/// Bytes a second.
#[derive(Clone, Copy, Debug, Default)]
struct Rates {
    copied: f64,
    dirtied: f64,
    guest: f64,
}

/// How a job keeps its bounds.
#[derive(Debug)]
pub(super) struct Bounds {
    limits: Limits,
    /// When the deadline is.
    end: Option<Duration>,
    notes: VecDeque<(Duration, Counts)>,
    next: Duration,
    /// What guests write and make anew when nobody slows them.
    natural: Option<Rates>,
    /// The share of that which they have now.
    share: f64,
    /// They are held to it.
    limited: bool,
    /// Which bound will not be kept.
    shortfall: Option<String>,
    /// The copy does not get ahead of what guests make anew.
    stalls: bool,
    /// Guests are not to wait for the target until then.
    spared: Option<Duration>,
    /// The copy did not get ahead while they were spared: they are not again before the job is ready.
    insists: bool,
}

/// Where the job stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Standing {
    /// Bytes that are left to copy.
    pub left: u64,
    /// It is ready, or everything was brought over once.
    pub follows: bool,
    /// It is ready now.
    pub ready: bool,
    /// It was ready: the deadline is kept.
    pub was_ready: bool,
}

impl Bounds {
    pub fn new(limits: Limits) -> Self {
        let (notes, next) = (VecDeque::new(), Duration::ZERO);
        let (natural, shortfall, spared) = (None, None, None);
        let (limited, stalls, insists) = (false, false, false);
        Self { limits, end: None, notes, next, natural, share: 1.0, limited, shortfall, stalls, spared, insists }
    }

    /// Other bounds from now on.
    pub fn set(&mut self, limits: Limits) {
        (self.limits, self.end, self.next) = (limits, None, Duration::ZERO);
    }

    /// How many times as slow guest writes are made now.
    pub fn slowdown(&self) -> f64 {
        if self.limited { 1.0 / self.share } else { 1.0 }
    }

    /// Which bound will not be kept, and by how much.
    pub fn shortfall(&self) -> Option<&str> {
        self.shortfall.as_deref()
    }

    /// True where a copy in the background would not come to an end.
    pub fn stalls(&self) -> bool {
        self.stalls
    }

    /// True where guests have waited for the target too long to be kept waiting now.
    pub fn spares(&self) -> bool {
        self.spared.is_some()
    }

    /// Looks at the rates, and slows guest writes or lets them go.
    pub fn step(&mut self, mirror: &Mirror, now: Duration, standing: Standing) {
        if let Some(left) = self.limits.deadline.take() {
            self.end = Some(now + left);
        }
        if now < self.next {
            return;
        }
        self.next = now + EVERY;
        let count = |counter: &crate::sync::AtomicU64| counter.load(Ordering::Relaxed);
        let stats = &mirror.stats;
        let counts = Counts {
            copied: count(&stats.copied),
            dirtied: count(&stats.dirtied),
            guest: count(&stats.guest),
            writes: count(&stats.guest_writes),
            delay_ns: count(&stats.delay_ns),
        };
        let bounded = (self.end.is_some() && !standing.was_ready) || (self.limits.lag_max > 0 && standing.follows);
        let decided = self.decide(now, counts, standing).filter(|_| bounded);
        let (share, shortfall) = decided.unwrap_or((1.0, None));
        let is_late = self.end.is_none_or(|end| now >= end);
        let shortfall = shortfall.filter(|_| is_late || !planted(Fault::SayItWhenItIsLate));
        self.share = share;
        if shortfall.is_some() && self.shortfall.is_none() {
            tracing::warn!("{}", shortfall.as_deref().unwrap_or_default());
        }
        self.shortfall = shortfall;
        let limit = if share < 1.0 { self.natural.map_or(0, |natural| (natural.guest * share) as u64) } else { 0 };
        self.limited = limit > 0;
        if mirror.brake.limit() != limit && !planted(Fault::LetGuestsGo) {
            mirror.brake.set(limit);
        }
        // Who is late has no time for courtesy.
        mirror.courtesy.suspend(share < 1.0);
        self.spare(mirror.write_both() && !bounded, standing.ready, now);
    }

    /// The share of their own rate that guests may have, and what is in the way of a bound all the same. `None` where it is
    /// too early to say.
    fn decide(&mut self, now: Duration, counts: Counts, standing: Standing) -> Option<(f64, Option<String>)> {
        self.notes.push_back((now, counts));
        while self.notes.len() > 2 && self.notes[1].0 + LATELY <= now {
            self.notes.pop_front();
        }
        let (begun, before) = *self.notes.front()?;
        let over = now.saturating_sub(begun);
        if over < LATELY_MIN {
            return None;
        }
        let rate = |from: u64, to: u64| to.saturating_sub(from) as f64 / over.as_secs_f64();
        let rates = Rates {
            copied: rate(before.copied, counts.copied),
            dirtied: rate(before.dirtied, counts.dirtied),
            guest: rate(before.guest, counts.guest),
        };
        self.stalls = over >= STALLS_MIN && rates.dirtied > 0.0 && rates.dirtied >= UNDONE_MAX * rates.copied;
        if !self.limited {
            self.natural = Some(rates);
        }
        let natural = self.natural?;
        let most = if planted(Fault::SlowBeyondTheMost) { 1000 } else { self.limits.slowdown_max.max(1) };
        let least = 1.0 / most as f64;
        let (share, bound) = match self.end.filter(|_| !standing.was_ready) {
            Some(end) => self.for_deadline(end, now, rates, natural, least, standing.left),
            None => (1.0, None),
        };
        let lag = if standing.follows { self.for_lag(rates, natural, least, standing.left) } else { (1.0, None) };
        Some((share.min(lag.0), bound.or(lag.1)))
    }

    /// Remembers that guests, who write to both sides, wait too long for that.
    fn spare(&mut self, both: bool, ready: bool, now: Duration) {
        self.spared = self.spared.filter(|until| now < *until);
        // Rates of before say nothing of it.
        let tried = self.spared.is_some_and(|until| until.saturating_sub(now) + LATELY <= SPARED);
        if ready {
            self.insists = false;
        } else if tried && self.stalls && !planted(Fault::SpareForEver) {
            (self.spared, self.insists) = (None, true);
        }
        let (Some((_, before)), Some((_, counts))) = (self.notes.front(), self.notes.back()) else { return };
        let writes = counts.writes.saturating_sub(before.writes);
        let waited = Duration::from_nanos(counts.delay_ns.saturating_sub(before.delay_ns));
        if both
            && !self.insists
            && writes >= WRITES_MIN
            && waited > WAIT_MAX * u32::try_from(writes).unwrap_or(u32::MAX)
        {
            self.spared = Some(now + SPARED);
        }
    }

    /// What is left and what guests make anew has to be copied by then.
    fn for_deadline(
        &self,
        end: Duration,
        now: Duration,
        rates: Rates,
        natural: Rates,
        least: f64,
        left: u64,
    ) -> (f64, Option<String>) {
        let time = end.saturating_sub(now).as_secs_f64() * PLANNED;
        let spare = if time > 0.0 { rates.copied - left as f64 / time } else { f64::NEG_INFINITY };
        if spare >= natural.dirtied {
            return (1.0, None);
        }
        let share = if natural.dirtied > 0.0 { (spare / natural.dirtied).clamp(least, 1.0) } else { least };
        if spare >= natural.dirtied * least {
            return (share, None);
        }
        let progress = rates.copied - natural.dirtied * least;
        let needed = if progress > 0.0 { format!("{:.0} s", left as f64 / progress) } else { "for ever".to_owned() };
        let words = format!(
            "the deadline in {:.0} s will not be kept: {left} bytes are left, {:.0} a second are copied, guests make \
             {:.0} a second anew and may be made {} times as slow, so it takes {needed}: set a later deadline, a larger \
             --max-slowdown or more speed",
            end.saturating_sub(now).as_secs_f64(),
            rates.copied,
            natural.dirtied,
            self.limits.slowdown_max,
        );
        (share, Some(words))
    }

    /// From half of the bound on guests are slowed, the more the less room is left: so far that no more is made anew than is
    /// copied, wherever that is.
    fn for_lag(&self, rates: Rates, natural: Rates, least: f64, left: u64) -> (f64, Option<String>) {
        let bound = self.limits.lag_max;
        if bound == 0 || left <= bound / 2 || natural.dirtied <= 0.0 {
            return (1.0, None);
        }
        let room = bound.saturating_sub(left) as f64 / (bound / 2).max(1) as f64;
        let sustained = (rates.copied / natural.dirtied).min(1.0);
        // By what is left alone: a target that has just become slow has copied fast of late.
        let share = room.clamp(least, 1.0);
        let words = (left > bound && sustained <= least).then(|| {
            format!(
                "the target is {left} bytes behind, {bound} are allowed: {:.0} bytes a second are copied, guests make \
                 {:.0} a second anew and may be made {} times as slow: allow more, or a larger --max-slowdown",
                rates.copied, natural.dirtied, self.limits.slowdown_max,
            )
        });
        (share, words)
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::{Bounds, Counts, Limits, Standing};
    use std::time::Duration;

    const MIB: f64 = 1048576.0;

    /// A copy of `left` MiB at `copied` MiB a second, whose guests make `dirtied` anew where nobody slows them.
    struct Copy {
        bounds: Bounds,
        left: f64,
        counts: [f64; 3],
        was_ready: bool,
    }

    impl Copy {
        fn new(limits: Limits, left: f64) -> Self {
            let mut bounds = Bounds::new(limits);
            bounds.end = bounds.limits.deadline.take();
            Self { bounds, left: left * MIB, counts: [0.0; 3], was_ready: false }
        }

        /// Seconds until nothing was left, 1000 at most.
        fn run(&mut self, copied: f64, dirtied: f64) -> f64 {
            for tick in 0..5000 {
                let now = Duration::from_millis(200 * tick);
                let [copied_count, dirtied_count, guest] = self.counts.map(|count| count as u64);
                let counts = Counts { copied: copied_count, dirtied: dirtied_count, guest, ..Counts::default() };
                let ready = self.was_ready;
                let standing = Standing { left: self.left as u64, follows: ready, ready, was_ready: ready };
                let decided = self.bounds.decide(now, counts, standing).unwrap_or((1.0, None));
                (self.bounds.share, self.bounds.shortfall) = decided;
                self.bounds.limited = self.bounds.share < 1.0;
                let anew = dirtied * self.bounds.share * MIB / 5.0;
                let brought = (copied * MIB / 5.0).min(self.left + anew);
                self.left += anew - brought;
                self.counts[0] += brought;
                self.counts[1] += anew;
                self.counts[2] += anew;
                if self.left < 1.0 {
                    return now.as_secs_f64();
                }
            }
            1000.0
        }
    }

    fn within(seconds: u64) -> Limits {
        Limits { deadline: Some(Duration::from_secs(seconds)), ..Limits::default() }
    }

    #[test]
    fn a_deadline_is_kept_by_slowing_guests_as_much_as_it_takes() {
        assert!(Copy::new(Limits::default(), 1000.0).run(100.0, 95.0) > 150.0);
        for (left, copied, dirtied, seconds) in [(1000.0, 100.0, 95.0, 40), (1000.0, 100.0, 300.0, 60)] {
            let mut copy = Copy::new(within(seconds), left);
            let took = copy.run(copied, dirtied);
            assert!(took <= seconds as f64, "{took} s of {seconds}");
            assert!(took > seconds as f64 / 3.0, "guests were slowed more than that needs: {took} s of {seconds}");
        }
    }

    #[test]
    fn who_is_in_time_slows_nobody() {
        let mut copy = Copy::new(within(60), 1000.0);
        copy.run(100.0, 50.0);
        assert_eq!((copy.bounds.slowdown(), copy.bounds.shortfall()), (1.0, None));
    }

    #[test]
    fn what_cannot_be_kept_is_said_early_and_guests_keep_their_share() {
        let mut copy = Copy::new(within(20), 10_000.0);
        let mut said = None;
        let mut slowest: f64 = 1.0;
        for tick in 0..50 {
            let now = Duration::from_millis(200 * tick);
            let [copied, dirtied] = [(tick * 20) << 20, (tick * 10) << 20];
            let counts = Counts { copied, dirtied, guest: dirtied, ..Counts::default() };
            let standing = Standing { left: copy.left as u64, follows: false, ready: false, was_ready: false };
            if let Some((share, words)) = copy.bounds.decide(now, counts, standing) {
                slowest = slowest.min(share);
                said = said.or(words.map(|words| (now, words)));
            }
        }
        let (when, words) = said.expect("a hundred seconds of copying do not fit into twenty");
        assert!(when < Duration::from_secs(1), "{when:?}");
        assert!(words.contains("the deadline in 19 s will not be kept"), "{words}");
        assert_eq!(slowest, 0.1);
    }

    #[test]
    fn a_copy_that_does_not_get_ahead_is_seen_and_guests_that_wait_too_long_are_spared() {
        let standing = Standing { left: 1 << 30, follows: true, ready: false, was_ready: false };
        for (dirtied, stalls) in [(4, false), (6, true)] {
            let mut bounds = Bounds::new(Limits::default());
            for tick in 0..20 {
                let [copied, dirtied] = [(20 * tick) << 20, (dirtied * tick) << 20];
                let counts = Counts { copied, dirtied, guest: dirtied, ..Counts::default() };
                bounds.decide(Duration::from_millis(200 * tick), counts, standing);
            }
            assert_eq!(bounds.stalls(), stalls, "{dirtied}");
        }
        let mut bounds = Bounds::new(Limits::default());
        for tick in 0..10 {
            let counts = Counts { writes: tick * 10, delay_ns: tick * 600_000_000, ..Counts::default() };
            let now = Duration::from_millis(200 * tick);
            bounds.decide(now, counts, standing);
            bounds.spare(true, false, now);
        }
        assert!(bounds.spares(), "60 ms each");
        bounds.spare(false, false, Duration::from_secs(40));
        assert!(!bounds.spares());
    }

    #[test]
    fn guests_that_are_spared_in_vain_are_not_spared_again_before_the_job_is_ready() {
        let mut bounds = Bounds::new(Limits::default());
        let waits = |bounds: &mut Bounds, from: u64, ready| {
            for tick in from..from + 10 {
                let counts = Counts { writes: tick * 10, delay_ns: tick * 600_000_000, ..Counts::default() };
                let now = Duration::from_millis(200 * tick);
                let _ = bounds.decide(now, counts, Standing { left: 1 << 30, follows: true, ready, was_ready: false });
                bounds.spare(true, ready, now);
            }
            bounds.spares()
        };
        assert!(waits(&mut bounds, 0, false));
        bounds.stalls = true;
        bounds.spare(false, false, Duration::from_secs(3));
        assert!(bounds.spares(), "it is too early to say");
        bounds.spare(false, false, Duration::from_secs(5));
        assert!(!bounds.spares(), "it would never be ready");
        assert!(!waits(&mut bounds, 30, false));
        assert!(waits(&mut bounds, 50, true));
    }

    #[test]
    fn the_lag_stays_within_its_bound() {
        let mut copy = Copy::new(Limits { lag_max: 100 << 20, ..Limits::default() }, 10.0);
        copy.was_ready = true;
        copy.run(50.0, 200.0);
        assert!(copy.left <= 110.0 * MIB, "{} MiB", copy.left / MIB);
        assert!(copy.left >= 40.0 * MIB, "{} MiB: slowed for nothing", copy.left / MIB);
    }
}
