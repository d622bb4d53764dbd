//! A few compressed clusters as they are inflated: small reads ask for the same one again and again.
//!
//! What is kept is found by its place in a file. A place has other contents only after the image was
//! told that nobody can be reading the old ones, and before that everything kept is dropped: what a
//! read keeps after it, it also mapped after it.
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How much is kept, in bytes; one cluster at least.
const KEPT_MAX: usize = 1 << 20;

/// Which compressed cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cluster {
    /// Number of the layer in the chain.
    pub layer: usize,
    /// Offset in its file.
    pub host: u64,
    /// Bytes of it, inflated.
    pub len: u32,
}

/// The clusters that were inflated last and of which only a part was asked for.
#[derive(Default)]
pub(super) struct Inflated(Mutex<Vec<(Cluster, Arc<[u8]>)>>);

impl Inflated {
    /// Fills `part` with what is `skip` bytes into `cluster`; false where that is not kept.
    pub fn copy(&self, cluster: Cluster, skip: u32, part: &mut [u8]) -> bool {
        let found = self.kept().iter().find(|(kept, _)| *kept == cluster).map(|(_, bytes)| Arc::clone(bytes));
        let Some(bytes) = found else { return false };
        part.copy_from_slice(&bytes[skip as usize..][..part.len()]);
        true
    }

    /// Keeps a cluster, in place of the oldest ones.
    pub fn keep(&self, cluster: Cluster, bytes: &[u8]) {
        let new = Arc::from(bytes);
        let mut kept = self.kept();
        kept.retain(|(other, _)| *other != cluster);
        let count_max = (KEPT_MAX / bytes.len()).max(1);
        let oldest = (kept.len() + 1).saturating_sub(count_max);
        kept.drain(..oldest);
        kept.push((cluster, new));
    }

    /// Keeps nothing.
    pub fn clear(&self) {
        self.kept().clear();
    }

    fn kept(&self) -> MutexGuard<'_, Vec<(Cluster, Arc<[u8]>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::{Cluster, Inflated, KEPT_MAX};

    #[test]
    fn the_oldest_ones_go_first() {
        let inflated = Inflated::default();
        let cluster = |host| Cluster { layer: 1, host, len: 65536 };
        let count = (KEPT_MAX / 65536) as u64;
        for host in 0..=count {
            inflated.keep(cluster(host), &[host as u8; 65536]);
        }
        let mut part = [0; 512];
        assert!(!inflated.copy(cluster(0), 0, &mut part), "no room for it any more");
        assert!((1..=count).all(|host| inflated.copy(cluster(host), 65024, &mut part) && part == [host as u8; 512]));
        assert!(!inflated.copy(Cluster { layer: 0, ..cluster(3) }, 0, &mut part), "another file");
        inflated.keep(Cluster { layer: 1, host: 99, len: 2 << 20 }, &vec![7; 2 << 20]);
        assert!(
            inflated.copy(Cluster { layer: 1, host: 99, len: 2 << 20 }, 1 << 20, &mut part),
            "one cluster at least"
        );
        inflated.clear();
        assert!(!inflated.copy(cluster(count), 0, &mut part));
    }
}
