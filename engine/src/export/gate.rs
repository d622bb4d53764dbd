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
use std::sync::{Arc, PoisonError};

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

/// What a replaced or closed route leaves behind: who is still on it.
pub struct Leaving(Arc<Place>);

impl Gate {
    /// An open gate.
    pub fn new(route: Route) -> Self {
        let emptied = Arc::<Bell>::default();
        let place = Place::new(route, &emptied);
        Self { roll: Roll::default(), state: Mutex::new(State { open: true, place }), opened: Bell::default(), emptied }
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
        Leaving(old)
    }

    /// Lets nobody in any more.
    pub fn close(&self) -> Leaving {
        let mut state = self.state();
        assert!(state.open, "a gate is closed once");
        state.open = false;
        state.place.closed.store(true, Ordering::SeqCst);
        Leaving(Arc::clone(&state.place))
    }

    /// Opens a closed gate onto `route`. Nobody may be inside.
    pub fn open(&self, route: Route) {
        let mut state = self.state();
        assert!(!state.open, "only a closed gate is opened");
        assert!(state.place.inside.load(Ordering::SeqCst) == 0, "nobody is inside");
        *state = State { open: true, place: Place::new(route, &self.emptied) };
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
        let empty = || self.0.inside.load(Ordering::SeqCst) == 0;
        empty() || {
            self.0.emptied.listen(waker);
            empty()
        }
    }
}

impl Pass {
    /// Where this request goes.
    pub fn route(&self) -> &Route {
        &self.0.route
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if self.0.inside.fetch_sub(1, Ordering::SeqCst) == 1 && self.0.closed.load(Ordering::SeqCst) {
            self.0.emptied.ring();
        }
    }
}
