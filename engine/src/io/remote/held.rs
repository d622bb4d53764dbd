//! An export as its connections hold it: they keep nobody from forgetting it.
//!
//! Several threads have connections to one export. Counted like everybody else, they would keep each other's open
//! when nobody asks them anything any more, and a server would wait for its clients to leave for ever.
use super::Remote;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// One connection's hold.
pub(super) struct Held(Arc<Remote>);

impl Held {
    pub fn new(remote: Arc<Remote>) -> Self {
        remote.connections.fetch_add(1, Ordering::SeqCst);
        Self(remote)
    }

    pub fn is(&self, remote: &Arc<Remote>) -> bool {
        Arc::ptr_eq(&self.0, remote)
    }

    /// True where connections alone hold it. Where it is being taken up this very moment, one that is dropped for it
    /// is made again.
    pub fn is_forgotten(&self) -> bool {
        Arc::strong_count(&self.0) <= self.0.connections.load(Ordering::SeqCst)
    }
}

impl Deref for Held {
    type Target = Remote;

    fn deref(&self) -> &Remote {
        &self.0
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::SeqCst);
    }
}
