//! Which threads serve which disk, and where a connection goes on.
//!
//! Everything is behind one lock, which is held for moments. A connection that is on its way to a thread counts there
//! from the choice on: a thread that counts none has ended for all others, so nobody is sent to one that will not look.
use super::thread::{Seat, Thread};
use crate::export::gate::Gate;
use crate::io::Waker;
use std::io;
use std::num::NonZero;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{Builder, JoinHandle, available_parallelism};
use std::time::{Duration, Instant};

/// When there is to be one thread more.
pub(super) struct Pace {
    /// How often a thread looks how busy it is.
    pub window: Duration,
    /// From so many hundredths of its time on it is.
    pub busy: u64,
    /// Up to so many it has time to spare. Half of what makes one thread busy fits there, so nobody goes to and fro.
    pub spare: u64,
    /// How many threads a disk has at most.
    pub threads_max: usize,
}

impl Default for Pace {
    fn default() -> Self {
        let threads_max = available_parallelism().map_or(1, NonZero::get);
        Self { window: Duration::from_millis(100), busy: 75, spare: 35, threads_max }
    }
}

/// Which threads serve which disk.
pub(super) struct Crews {
    pub(super) pace: Pace,
    stations: Mutex<Vec<Station>>,
    /// All that were started, those at the door too.
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// How many connections were sent to another thread, for tests.
    #[cfg(test)]
    pub(super) moves: std::sync::atomic::AtomicU64,
}

/// A thread of a disk's.
struct Station {
    disk: Weak<Gate>,
    /// Wakes it, and is its name.
    waker: Waker,
    /// How many it serves, those on their way to it included: it does not end before they came.
    count: usize,
    arrivals: Vec<Seat>,
    /// How much of its time it used when it looked last, and when that was.
    share: (Instant, u64),
}

/// A thread's own hold of its station, which goes with it.
pub(super) struct Post {
    crews: Arc<Crews>,
    waker: Waker,
}

/// Where a connection goes on that has chosen its disk, or is on a thread that is busy.
pub(super) enum Choice {
    /// Where it is.
    Here,
    /// Where it is, and that thread is of this disk from now on.
    First(Post),
    /// On the thread with this waker, which waits for it.
    There(Waker),
    /// On a thread that is to be started.
    OneMore,
}

/// The same before anything is done about it.
#[derive(Debug, PartialEq)]
enum Plan {
    Here,
    First,
    /// On the thread of this station.
    There(usize),
    OneMore,
}

impl Station {
    fn new(disk: Weak<Gate>, waker: Waker) -> Self {
        Self { disk, waker, count: 1, arrivals: Vec::new(), share: (Instant::now(), 0) }
    }

    /// Who has not looked for a while is idle.
    fn has_time(&self, pace: &Pace) -> bool {
        self.share.1 <= pace.spare || self.share.0.elapsed() > 5 * pace.window
    }
}

/// Where a connection of `disk` goes on that is on the thread with this waker.
fn plan(stations: &[Station], disk: &Arc<Gate>, waker: &Waker, pace: &Pace) -> Plan {
    let of_disk = |station: &&Station| station.disk.as_ptr() == Arc::as_ptr(disk);
    let is_full = stations.iter().filter(of_disk).count() >= pace.threads_max;
    let own = stations.iter().find(|station| station.waker.same(waker)).map(|station| station.count);
    let others = stations.iter().enumerate().filter(|(_, station)| of_disk(station) && !station.waker.same(waker));
    let best = others.min_by_key(|(_, station)| (!station.has_time(pace), station.count));
    match (best, own) {
        (Some((number, best)), _) if best.has_time(pace) => Plan::There(number),
        (_, None) if !is_full => Plan::First,
        (_, Some(count)) if !is_full && count > 1 => Plan::OneMore,
        (Some((number, _)), None) => Plan::There(number),
        (Some((number, best)), Some(count)) if best.count + 1 < count => Plan::There(number),
        _ => Plan::Here,
    }
}

impl Crews {
    /// No threads yet.
    pub fn new(pace: Pace) -> Self {
        Self {
            pace,
            stations: Mutex::default(),
            threads: Mutex::default(),
            #[cfg(test)]
            moves: Default::default(),
        }
    }

    /// For a connection that rests on the thread with this waker.
    pub fn choose(self: &Arc<Self>, disk: &Arc<Gate>, waker: &Waker) -> Choice {
        let mut stations = self.stations();
        match plan(&stations, disk, waker, &self.pace) {
            Plan::Here => Choice::Here,
            Plan::First => {
                stations.push(Station::new(Arc::downgrade(disk), waker.clone()));
                Choice::First(Post { crews: Arc::clone(self), waker: waker.clone() })
            }
            Plan::There(number) => {
                stations[number].count += 1;
                Choice::There(stations[number].waker.clone())
            }
            Plan::OneMore => Choice::OneMore,
        }
    }

    /// True where somebody on that thread may find a better place.
    pub fn has_room(&self, disk: &Arc<Gate>, waker: &Waker) -> bool {
        plan(&self.stations(), disk, waker, &self.pace) != Plan::Here
    }

    /// Starts a thread of `disk`, which waits for one connection; the waker of it. Waits until it is known that it can.
    pub fn one_more(self: &Arc<Self>, disk: &Arc<Gate>) -> io::Result<Waker> {
        let (tell, told) = channel();
        let (crews, disk) = (Arc::clone(self), Arc::downgrade(disk));
        self.spawn(move || {
            let begun = Thread::new(crews).map(|mut thread| {
                let waker = thread.wait_for_one(disk);
                (thread, waker)
            });
            match begun {
                Ok((thread, waker)) => {
                    // Whoever asked waits for it.
                    let _ = tell.send(Ok(waker));
                    thread.serve();
                }
                Err(error) => drop(tell.send(Err(error))),
            }
        })?;
        told.recv().unwrap_or_else(|_| Err(io::Error::other("it ended at once")))
    }

    /// The station of the thread with this waker, for one connection that is on its way.
    pub fn man(self: &Arc<Self>, disk: Weak<Gate>, waker: &Waker) -> Post {
        self.stations().push(Station::new(disk, waker.clone()));
        Post { crews: Arc::clone(self), waker: waker.clone() }
    }

    /// Starts a thread.
    pub fn spawn(&self, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let thread = Builder::new().name("nbd".into()).spawn(body)?;
        self.threads().push(thread);
        Ok(())
    }

    /// Sends a connection to the thread that waits for it. Where that has failed meanwhile, it shares the others' fate.
    pub fn deliver(&self, seat: Seat, there: &Waker) {
        #[cfg(test)]
        self.moves.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        self.with(there, |station| station.arrivals.push(seat));
        there.wake();
    }

    /// A connection of that thread has ended, or gone elsewhere.
    pub fn serves_one_fewer(&self, waker: &Waker) {
        self.with(waker, |station| station.count -= 1);
    }

    /// How much of its time that thread uses, in hundredths.
    pub fn note(&self, waker: &Waker, share: u64) {
        self.with(waker, |station| station.share = (Instant::now(), share));
    }

    fn with<T: Default>(&self, waker: &Waker, work: impl FnOnce(&mut Station) -> T) -> T {
        self.stations().iter_mut().find(|station| station.waker.same(waker)).map(work).unwrap_or_default()
    }

    fn stations(&self) -> MutexGuard<'_, Vec<Station>> {
        self.stations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that were started.
    pub fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Post {
    /// Who has come.
    pub fn arrivals(&self) -> Vec<Seat> {
        self.crews.with(&self.waker, |station| std::mem::take(&mut station.arrivals))
    }

    /// True where nobody is left, and nobody on the way. Nobody will come any more.
    pub fn is_over(&self) -> bool {
        let mut stations = self.crews.stations();
        stations.retain(|station| !station.waker.same(&self.waker) || station.count > 0);
        stations.iter().all(|station| !station.waker.same(&self.waker))
    }
}

impl Drop for Post {
    fn drop(&mut self) {
        let mut stations = self.crews.stations();
        let place = stations.iter().position(|station| station.waker.same(&self.waker));
        let gone = place.map(|place| stations.swap_remove(place));
        drop(stations);
        // Whoever was on the way, outside the lock.
        drop(gone);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::One;
    use super::{Arc, Duration, Gate, Instant, Pace, Plan, Station, Waker, plan};

    #[test]
    fn a_connection_goes_where_there_is_time() {
        let [ours, theirs] = [(); 2].map(|()| Arc::clone(&One::new().gate));
        let pace = Pace { window: Duration::from_secs(60), busy: 75, spare: 35, threads_max: 2 };
        let (asker, other) = (Waker::simulated(0), Waker::simulated(1));
        let station = |disk: &Arc<Gate>, waker: &Waker, count, share| Station {
            count,
            share: (Instant::now(), share),
            ..Station::new(Arc::downgrade(disk), waker.clone())
        };
        let another = Waker::simulated(2);
        for (what, stations, planned) in [
            ("nobody serves it", vec![], Plan::First),
            ("another disk's thread", vec![station(&theirs, &other, 1, 0)], Plan::First),
            ("one with time", vec![station(&ours, &other, 9, 35)], Plan::There(0)),
            ("a busy one", vec![station(&ours, &other, 1, 36)], Plan::First),
            ("all busy", vec![station(&ours, &other, 3, 90), station(&ours, &another, 2, 90)], Plan::There(1)),
            ("alone on its thread", vec![station(&ours, &asker, 1, 90)], Plan::Here),
            ("one of two", vec![station(&ours, &asker, 2, 90)], Plan::OneMore),
            ("one of many", vec![station(&ours, &asker, 4, 90), station(&ours, &other, 3, 90)], Plan::Here),
            ("one of more", vec![station(&ours, &asker, 4, 90), station(&ours, &other, 2, 90)], Plan::There(1)),
            ("time elsewhere", vec![station(&ours, &asker, 2, 90), station(&ours, &other, 5, 10)], Plan::There(1)),
        ] {
            assert_eq!(plan(&stations, &ours, &asker, &pace), planned, "{what}");
        }
    }
}
