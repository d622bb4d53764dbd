//! The gate: every guest request passes it, and a pivot closes it.
//!
//! A request gets one consistent view, its `Pass`, and keeps it to its end, whatever happens to the
//! gate meanwhile. A new route is put in place first; then every pass that was given out on the old
//! one has to come back; only then may anybody rely on the new one. A write that holds an old route
//! marks nothing: looked at the mapping before it ended, a copy would miss it for good.
//!
//! The counter of a closed gate only falls. So "closed and nobody inside" stays true until it is
//! opened again, and no more marks can come.
use super::roll::Roll;
use crate::bell::Bell;
use crate::disk::Disk;
use crate::io::Waker;
use crate::mirror::Mirror;
use crate::sync::{AtomicBool, AtomicU64, Mutex, MutexGuard, Ordering};
use std::sync::{Arc, PoisonError, Weak};

/// Where guest requests go.
#[derive(Clone)]
pub struct Route {
    /// The disk that is the truth.
    pub disk: Arc<Disk>,
    /// The mirror that follows it, if any.
    pub mirror: Option<Arc<Mirror>>,
}

/// Lets requests in, or holds them.
pub struct Gate {
    /// Who is connected.
    pub roll: Roll,
    state: Mutex<State>,
    /// Rings when the gate opens.
    opened: Bell,
    /// Rings when the last one leaves a route that is closed or replaced.
    emptied: Arc<Bell>,
}

struct State {
    open: bool,
    place: Arc<Place>,
    /// Places that were replaced: those who are on one keep it, and with them it goes.
    left: Vec<Weak<Place>>,
}

/// One route, as long as it is in place, and who is on it.
struct Place {
    route: Route,
    inside: AtomicU64,
    /// Nobody comes in any more: the last who leaves rings.
    closed: AtomicBool,
    emptied: Arc<Bell>,
}

/// One request's leave to touch the disk; it holds its route until it is dropped.
pub struct Pass(Arc<Place>);

/// What a replaced or closed route leaves behind: who is still on it, or on one before it. A job that
/// was given up leaves at once; its successor has to wait for those who came before both.
pub struct Leaving(Vec<Arc<Place>>);

impl Gate {
    /// An open gate.
    pub fn new(route: Route) -> Self {
        let emptied = Arc::<Bell>::default();
        let place = Place::new(route, &emptied);
        let state = Mutex::new(State { open: true, place, left: Vec::new() });
        Self { roll: Roll::default(), state, opened: Bell::default(), emptied }
    }

    /// A pass, or `None` while the gate is closed: the request waits in its session, whose waker is
    /// called when the gate opens.
    pub fn enter(&self, waker: &Waker) -> Option<Pass> {
        let state = self.state();
        if !state.open {
            // Under the lock: the gate cannot open between the look and the listening.
            self.opened.listen(waker);
            return None;
        }
        state.place.inside.fetch_add(1, Ordering::AcqRel);
        Some(Pass(Arc::clone(&state.place)))
    }

    /// Puts another route in place, for requests that come from now on.
    pub fn replace(&self, route: Route) -> Leaving {
        let mut state = self.state();
        let new = Place::new(route, &self.emptied);
        let old = std::mem::replace(&mut state.place, new);
        old.closed.store(true, Ordering::SeqCst);
        state.left.push(Arc::downgrade(&old));
        state.leaving()
    }

    /// Lets nobody in any more.
    pub fn close(&self) -> Leaving {
        let mut state = self.state();
        assert!(state.open, "a gate is closed once");
        state.open = false;
        state.place.closed.store(true, Ordering::SeqCst);
        let place = Arc::downgrade(&state.place);
        state.left.push(place);
        state.leaving()
    }

    /// Opens a closed gate onto `route`. Nobody may be inside.
    pub fn open(&self, route: Route) {
        let mut state = self.state();
        assert!(!state.open, "only a closed gate is opened");
        assert!(state.leaving().0.is_empty(), "nobody is inside");
        (state.open, state.place) = (true, Place::new(route, &self.emptied));
        drop(state);
        self.opened.ring();
    }

    /// Opens a closed gate again onto the route that was in place. Others go on inside.
    pub fn reopen(&self) {
        let mut state = self.state();
        assert!(!state.open, "only a closed gate is opened");
        let route = state.place.route.clone();
        (state.open, state.place) = (true, Place::new(route, &self.emptied));
        drop(state);
        self.opened.ring();
    }

    /// The route that is in place, for looking at.
    pub fn route(&self) -> Route {
        self.state().place.route.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Those of the places that were left on which somebody still is. Their counts only fall.
    fn leaving(&mut self) -> Leaving {
        let mut busy: Vec<Arc<Place>> = self.left.iter().filter_map(Weak::upgrade).collect();
        busy.retain(|place| place.inside.load(Ordering::SeqCst) > 0);
        self.left = busy.iter().map(Arc::downgrade).collect();
        Leaving(busy)
    }
}

impl Place {
    fn new(route: Route, emptied: &Arc<Bell>) -> Arc<Self> {
        Arc::new(Self {
            route,
            inside: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            emptied: Arc::clone(emptied),
        })
    }
}

impl Leaving {
    /// True where nobody is inside any more; else `waker` is called when that may have changed.
    pub fn is_empty(&self, waker: &Waker) -> bool {
        let busy = || self.0.iter().find(|place| place.inside.load(Ordering::SeqCst) > 0);
        busy().is_none_or(|place| {
            place.emptied.listen(waker);
            busy().is_none()
        })
    }
}

impl Pass {
    /// Where this request goes.
    pub fn route(&self) -> &Route {
        &self.0.route
    }

    /// The same leave once more: for what the request leaves behind. It counts like any other, and its holder is inside.
    pub fn again(&self) -> Self {
        self.0.inside.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(&self.0))
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if self.0.inside.fetch_sub(1, Ordering::SeqCst) == 1 && self.0.closed.load(Ordering::SeqCst) {
            self.0.emptied.ring();
        }
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::{Gate, Route};
    use crate::chain::{Chain, Layer};
    use crate::disk::{DataFile, Disk};
    use crate::io::{File, FileStorage, Waker};
    use formats::raw::Raw;
    use std::sync::Arc;

    fn route() -> Route {
        let storage = Arc::new(FileStorage::new(tempfile::tempfile().expect("a temporary file")));
        let file = DataFile::buffered(File::simulated(0));
        let layer =
            Layer { image: Box::new(Raw::new(storage, 512)), file, path: "disk".into(), format: "raw", apart: None };
        Route { disk: Arc::new(Disk::new(Chain::new(vec![Arc::new(layer)]), false)), mirror: None }
    }

    /// A write was under way when a job began and was given up, and still when the next one began: it
    /// marks nothing there, and the next job looked at the mapping without waiting for it.
    #[test]
    fn who_leaves_a_route_waits_for_those_on_the_routes_before_it_too() {
        let (gate, waker) = (Gate::new(route()), Waker::simulated(1));
        let pass = gate.enter(&waker).expect("an open gate");
        assert!(!gate.replace(route()).is_empty(&waker));
        let second = gate.replace(route());
        assert!(!second.is_empty(&waker), "somebody is on the first route");
        let closed = gate.close();
        assert!(!closed.is_empty(&waker));
        assert!(!waker.was_woken());
        drop(pass);
        assert!(waker.was_woken());
        assert!(second.is_empty(&waker) && closed.is_empty(&waker));
        gate.open(route());
        assert!(gate.enter(&waker).is_some());
    }

    /// A job that was given up while a guest's request was under way left its target open, and locked, until the next
    /// job: the gate had it still.
    #[test]
    fn what_was_left_goes_with_the_last_who_was_on_it() {
        let (first, waker) = (route(), Waker::simulated(1));
        let disk = Arc::clone(&first.disk);
        let gate = Gate::new(first);
        let pass = gate.enter(&waker).expect("an open gate");
        drop(gate.replace(route()));
        drop(pass);
        assert_eq!(Arc::strong_count(&disk), 1);
    }
}
