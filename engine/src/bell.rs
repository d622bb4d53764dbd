//! Wakes those who wait for another thread's progress.
//!
//! Who finds that something is not possible yet listens first, tries once more, and only then waits:
//! a ring between the first try and the listening would wake nobody.
use crate::io::Waker;
use crate::sync::{AtomicBool, Mutex, MutexGuard, Ordering, fence};
use std::sync::PoisonError;

/// A bell that wakes everybody who listened since it last rang.
#[derive(Debug, Default)]
pub struct Bell {
    /// True where somebody listens; so that ringing for nobody costs one look.
    awaited: AtomicBool,
    listeners: Mutex<Vec<Waker>>,
}

impl Bell {
    /// The next ring wakes `waker`, once.
    pub fn listen(&self, waker: &Waker) {
        let mut listeners = self.listeners();
        if !listeners.iter().any(|known| known.same(waker)) {
            listeners.push(waker.clone());
        }
        self.awaited.store(true, Ordering::SeqCst);
        // The look that follows sees what was in place before a ring that saw nobody listen.
        fence(Ordering::SeqCst);
    }

    /// Wakes everybody who listens. What they wait for has to be in place before.
    pub fn ring(&self) {
        fence(Ordering::SeqCst);
        if self.awaited.load(Ordering::SeqCst) {
            let mut listeners = self.listeners();
            self.awaited.store(false, Ordering::SeqCst);
            listeners.drain(..).for_each(|waker| waker.wake());
        }
    }

    fn listeners(&self) -> MutexGuard<'_, Vec<Waker>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
